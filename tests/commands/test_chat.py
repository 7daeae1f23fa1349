"""`mmcore chat` as its user meets it: in a terminal, and through pipes."""

import re
import signal
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmcore.__main__ import main
from mmcore.data.sources import jsonl
from mmcore.data.sources.images import Folder
from mmcore.data.templates import Turn
from tests import answering
from tests.answering import Command
from tests.data.fabricated import picture
from tests.test_command_line import mmcore

NEW = 10
ENDLESS = ("--max-new-tokens", 3000, "--repetition-penalty", answering.ENDLESS)
PICTURES = [picture(seed) for seed in range(2)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside it two pictures, one with a space in its name."""
    folder = tmp_path_factory.mktemp("chat")
    for name, data in zip(("a.png", "b c.png"), PICTURES, strict=True):
        (folder / name).write_bytes(data)
    return answering.write_checkpoint(folder / "tiny")


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[str]:
    """Answers to "What?", and then to "Is <image> like <image>?" with both pictures."""
    first = [Turn("user", "What?")]
    ((answer, _),) = answering.engine_answers(checkpoint, [(first, [])], NEW)
    second = [*first, Turn("assistant", answer), Turn("user", "Is <image> like <image>?")]
    ((other, _),) = answering.engine_answers(checkpoint, [(second, PICTURES)], NEW)
    assert answer != other
    return [answer, other]


def arguments(checkpoint: Path, *options: object) -> tuple[object, ...]:
    return ("chat", "--checkpoint", checkpoint, "--max-new-tokens", NEW, *options)


def lines(folder: Path) -> str:
    return f"What?\n/image {folder}/a.png '{folder}/b c.png'\n\nIs <image> like <image>?\n/reset\nWhat?\n"


def test_lines_of_a_pipe(checkpoint: Path, expected: list[str], tmp_path: Path) -> None:
    """Answers alone come out: of turns that build on one another, and of a conversation begun anew."""
    command = Command(tmp_path, *arguments(checkpoint), stdin=lines(checkpoint.parent))
    assert command.end() == 0, command.errors
    assert command.output == "".join(f"{text}\n" for text in [*expected, expected[0]])
    assert not command.errors


@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_the_first_rank_reads_and_all_answer(
    checkpoint: Path, expected: list[str], tmp_path: Path, layout: str
) -> None:
    """A mistake in a line ends them all, and is told once."""
    options = arguments(checkpoint, f"--{layout}-model-parallel-size", 2)
    stdin = f"{lines(checkpoint.parent)}/imgae x\nWhat?\n"
    commands = [
        Command(tmp_path, *options, stdin=stdin, environment=environment)
        for environment in answering.rank_environment(2)
    ]
    assert [command.end() for command in commands] == [2, 0]
    assert commands[0].output == "".join(f"{text}\n" for text in [*expected, expected[0]])
    assert commands[0].errors == "mmcore chat: /imgae is no command, did you mean '/image'?; /help lists them\n"
    assert not commands[1].output and not commands[1].errors


def test_a_conversation_opens_with_pictures_and_a_system_text(checkpoint: Path, tmp_path: Path) -> None:
    turns = [Turn("system", "Be brief."), Turn("user", "<image>\nWhat?")]
    ((answer, _),) = answering.engine_answers(checkpoint, [(turns, PICTURES[:1])], NEW)
    options = ("--system", "Be brief.", "--image", checkpoint.parent / "a.png")
    command = Command(tmp_path, *arguments(checkpoint, *options), stdin="What?\n")
    assert command.end() == 0 and command.output == f"{answer}\n"


def test_drawn_answers(checkpoint: Path, tmp_path: Path) -> None:
    """A seed draws the same again; by default every answer is another."""
    question = "What?\n/reset\n" * 3
    outputs = []
    for options in (("--seed", 1), ("--seed", 1), ()):
        command = Command(tmp_path, *arguments(checkpoint, "--temperature", 2, *options), stdin=question)
        assert command.end() == 0
        outputs.append(command.output)
    assert outputs[0] == outputs[1] != outputs[2]
    assert outputs[0][: len(outputs[0]) // 3] * 3 == outputs[0]
    assert outputs[2][: len(outputs[2]) // 3] * 3 != outputs[2]


@pytest.fixture
def talk(checkpoint: Path, tmp_path: Path) -> Iterator[Command]:
    """In a terminal."""
    command = Command(tmp_path, *arguments(checkpoint, *ENDLESS), stdin=None)
    try:
        command.wait_for(r"(?s)tiny/step_00000001 .* vicuna_v1, 4096 tokens.*/help tells the rest.*\n> ")
        yield command
    finally:
        command.end(timeout=0)


def test_a_user_at_a_terminal(talk: Command, checkpoint: Path, tmp_path: Path) -> None:
    folder = checkpoint.parent
    talk.type("/im\t")  # completed
    talk.type(f"{folder}/a.\t\n")
    talk.wait_for(r"a\.png: 20 x 16 pixels, 4 tokens\n\n\[1 picture\] > ")
    talk.type(f"/image {folder}/b c.png\n")  # no name in quotes, but a file's as it stands
    talk.wait_for(r"b c\.png: 20 x 16 pixels, 4 tokens\n\n\[2 pictures\] > ")

    talk.type("Is <image> alone?\n")
    talk.wait_for(r"\n(the question has 1 <image> for 2 pictures: .*)\n\n\[2 pictures\] > ")
    for mistake, told in (
        ("/image nowhere.png", "nowhere.png cannot be read: No such file or directory"),
        (f"/image {folder}/tiny", "tiny cannot be read: Is a directory"),
        (f"/image {folder}/tiny/step_00000001/model.json", "model.json: not a picture"),
        ("/image 'a", "No closing quotation"),
        ("/image", "give a picture's file"),
        ("/sav", "did you mean '/save'?"),
        ("/save x", "there is nothing to save yet"),
        ("/reset now", "/reset takes nothing behind it"),
    ):
        talk.type(f"{mistake}\n")
        found = talk.wait_for(r"\n([^\n>]*" + re.escape(told) + r"[^\n]*)\n\n\[2 pictures\] > ")
        assert "Traceback" not in found[0]

    talk.type("What are they?\n")
    time.sleep(0.5)
    talk.type("\x03")  # which stops the answer, and not the conversation
    found = talk.wait_for(r"\n(\d+) tokens, stopped, \d+ a second; \d+ of 4096 in all\n\n> ")
    assert 0 < int(found[1]) < 3000

    saved = tmp_path / "talk.md"
    for _ in range(2):  # again, for there may be more of it
        talk.type(f"/save {saved}\n")
        talk.wait_for(r"saved in .*\n\n> ")
    assert saved.read_text().startswith(
        f"## user\n\n[{folder}/a.png]\n[{folder}/b c.png]\nWhat are they?\n\n## assistant\n\n"
    )
    (tmp_path / "mine.md").write_text("mine")
    talk.type(f"/save {tmp_path}/mine.md\n")
    talk.wait_for(r"mine\.md exists already: give another name\n\n> ")
    for _ in range(2):
        talk.type(f"/save {tmp_path}/talks.jsonl\n")
        talk.wait_for(r"saved in .*\n\n> ")
    rows = jsonl.read_rows(tmp_path / "talks.jsonl")
    assert len(rows) == 2 and rows[1].fault is None
    assert [Folder(Path("/")).read(name) for name in rows[1].images] == PICTURES
    assert rows[1].conversations is not None
    assert rows[1].conversations[0] == {"from": "human", "value": "<image>\n<image>\nWhat are they?"}
    assert rows[1].conversations[1]["from"] == "gpt" and rows[1].conversations[1]["value"]

    talk.type("/reset\n")
    talk.wait_for(r"begun anew\n\n> ")
    talk.type("half a line\x03")
    talk.wait_for(r"/exit or Ctrl-D ends the conversation\n\n> ")
    talk.type("/help\n")
    talk.wait_for(r"(?s)/image FILE \.\.\. .*Ctrl-C +stop an answer.*\n> ")
    talk.type("\x04")
    assert talk.end() == 0
    history = (tmp_path / "mmcore" / "chat_history").read_text().splitlines()
    assert "What are they?" in history and history[-1] == "/help"


def test_history_of_earlier_conversations_and_a_long_one(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mmcore").mkdir()
    (tmp_path / "mmcore" / "chat_history").write_text("What was it?\n")
    command = Command(tmp_path, *arguments(checkpoint, "--max-length", 100), stdin=None)
    try:
        command.wait_for(r"(?s)Ctrl-D ends.*\n> ")
        command.type("\x1b[A\n")  # the key with the arrow up
        command.wait_for(rf"(?s)What was it\?\n.*{NEW} tokens, cut there, .*\n\n> ")
        command.type(f"{'What? ' * 40}\n")
        command.wait_for(r"\nthe conversation has \d+ tokens, .* 99 leave room for an answer: /reset begins anew\n\n> ")
        command.type("/exit\n")
        assert command.end() == 0
    finally:
        command.end(timeout=0)


def test_under_torchrun_ctrl_c_is_a_key(checkpoint: Path, tmp_path: Path) -> None:
    """Else torchrun, which waits in the same terminal, would end all ranks."""
    options = arguments(checkpoint, "--tensor-model-parallel-size", 2, *ENDLESS)
    first, second = answering.rank_environment(2)
    command = Command(tmp_path, *options, environment={**first, "TORCHELASTIC_RUN_ID": "x"}, stdin=None)
    other = Command(tmp_path, *options, environment=second)
    try:
        interrupt = termios.tcgetattr(command.terminal)[6][termios.VINTR]
        command.wait_for(r"(?s)TP 2 x PP 1.*\n> ")
        time.sleep(0.2)  # until readline has set the terminal
        assert termios.tcgetattr(command.terminal)[6][termios.VINTR] == b"\0" != interrupt
        command.type("half a line\x03What?\n")  # the line is cleared
        time.sleep(0.5)
        command.type("\x03")
        command.wait_for(r"(?s)\d+ tokens, stopped, .*\n> ")
        command.type("/exit\n")
        assert (command.end(), other.end()) == (0, 0)
        history = (tmp_path / "mmcore" / "chat_history").read_text().splitlines()
        assert history == ["What?", "/exit"]
    finally:
        for each in (command, other):
            each.end(timeout=0)


def test_a_signal_ends_it_in_a_pipe(checkpoint: Path, tmp_path: Path) -> None:
    """Nobody is there to go on."""
    command = Command(tmp_path, *arguments(checkpoint, *ENDLESS), stdin="What?\nWhat?\n")
    while not command.output:
        time.sleep(0.01)
    command.kill(signal.SIGINT)
    assert command.end(timeout=10) not in (0, None)


@pytest.mark.parametrize("verb", ["chat", "serve"])
def test_help_needs_no_torch(verb: str) -> None:
    done = mmcore(verb, "--help")
    assert done.returncode == 0 and f"usage: mmcore {verb}" in done.stdout


def test_a_mistake_needs_no_torch(checkpoint: Path) -> None:
    done = mmcore("chat", "--checkpoint", checkpoint, env={"WORLD_SIZE": "2"})
    assert done.returncode == 2
    assert done.stderr == (
        "mmcore chat: 2 ranks make 2 models where one is to answer: start 1, or raise --tensor-model-parallel-size or "
        "--pipeline-model-parallel-size\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["chat", "--checkpoint", "."], "is no checkpoint and holds none"),
        (["chat", "--checkpoint", "RUN", "--image", "nowhere.png"], "--image nowhere.png is no file"),
        (["chat", "--checkpoint", "RUN", "--max-length", "5000"], "--max-length 5000 is more than the 4096"),
        (["chat", "--checkpoint", "RUN", "--tensor-model-parallel-size", "3"], "does not divide"),
        (["chat", "--checkpoint", "RUN", "--top-p", "2"], "top_p must be above 0 and at most 1"),
        (["serve", "--checkpoint", "RUN", "--max-batch-size", "0"], "--max-batch-size must be above 0, not 0"),
        (["serve", "--checkpoint", "RUN", "--max-waiting", "-1"], "--max-waiting must not be negative"),
        (["serve", "--checkpoint", "RUN", "--port", "65536"], "--port must be from 0 to 65535"),
        (["serve", "--checkpoint", "RUN", "--host", "192.0.2.1"], "--host 192.0.2.1 --port 8000 cannot be listened at"),
    ],
)
def test_mistakes(
    checkpoint: Path,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["mmcore", *(str(checkpoint) if word == "RUN" else word for word in options)])
    try:
        status = main()
    except SystemExit as exit_:  # tyro's
        status = exit_.code
    assert status == 2 and message in " ".join(capsys.readouterr().err.replace("\u2502", " ").split())
