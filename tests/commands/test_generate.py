"""The command as people run it: killed and started again, on several ranks, with other options, by choices."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmcore import distributed
from mmcore.checkpoint import save_checkpoint
from mmcore.commands import generate
from mmcore.commands.generate import GenerateConfig
from mmcore.config import ParallelConfig
from mmcore.constants import TOKENIZER_DIR
from mmcore.data.tokenizer import Tokenizer, load_tokenizer
from mmcore.evaluation.loss import read_losses
from mmcore.evaluation.task import Example
from mmcore.inference.answers import choice_tokens, end_ids, layout
from mmcore.inference.parts import Part
from mmcore.models.architecture import PictureArch
from tests import ranks, tiny
from tests.data import fabricated
from tests.data.fabricated import conversation, picture
from tests.data.vocabularies import spaced

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
EXAMPLES = 9
TP1, TP2 = ParallelConfig(), ParallelConfig(tensor_model_parallel_size=2)
PP2 = ParallelConfig(pipeline_model_parallel_size=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: Any) -> Path:
    """A checkpoint, and questions of which the last has no picture."""
    root: Path = tmp_path_factory.mktemp("generate")
    tokenizer = spaced(root / "tokenizer", SPECIAL)
    size = load_tokenizer(tokenizer).vocab_size
    base = tiny.architecture()
    language = replace(base.language, vocab_size=size, max_position_embeddings=400)
    architecture = replace(base, language=language, image_token_id=size, conversation="vicuna_v1")

    def save() -> None:
        model = tiny.build(TP1, arch=architecture)
        content = {"architecture": architecture, "tokenizer": tokenizer, "state": {}, "loader_state": None}
        save_checkpoint(root / "run", 1, keep_last=1, model=model, optimizer=None, **content)

    ranks.run(save, TP1, 1)
    rows = []
    for index in range(EXAMPLES):
        (root / f"{index}.png").write_bytes(picture(index))
        rows.append({"id": f"q{index}", "image": f"{index}.png", "conversations": conversation("a " * index, "no")})
    del rows[-1]["image"]
    (root / "data.json").write_text(json.dumps(rows))
    return root


def mmcore(root: Path, name: str, *options: object, layout: ParallelConfig = TP1, world_size: int = 1) -> list[str]:
    """Let the command write a file in `root`; what each rank printed. The test's ranks are up already."""
    arguments = ["--checkpoint", root / "run", "--task", "exact-match", "--data", root / "data.json"]
    arguments += ["--output", root / name, "--max-new-tokens", 7, *options]
    arguments += ["--tensor-model-parallel-size", layout.tensor_model_parallel_size]
    arguments += ["--pipeline-model-parallel-size", layout.pipeline_model_parallel_size]

    def run() -> str:
        said: list[str] = []
        distributed.initialize = lambda *_, **__: None  # type: ignore
        generate.print = lambda *words, **_: said.append(" ".join(map(str, words)))  # type: ignore
        assert generate.main([str(argument) for argument in arguments]) == 0
        return "\n".join(said)

    return ranks.run(run, layout, world_size)


def killed(monkeypatch: pytest.MonkeyPatch, after: int, half: bytes, *arguments: Any, **options: Any) -> None:
    """The same, but each rank that writes is killed within its row after so many."""
    with monkeypatch.context() as patch:
        add: Callable[..., None] = Part.add
        count = [0]

        def counted(part: Part, row: Any) -> None:
            if count[0] == after:
                part.file.write(half)
                part.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
            add(part, row)

        patch.setattr(Part, "add", counted)
        with pytest.raises(AssertionError, match=r"or killed|Connection"):
            mmcore(*arguments, **options)


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def parts(root: Path, name: str) -> list[Path]:
    return sorted(root.glob(f"{name}.part*"))


@pytest.fixture(scope="module")
def whole(root: Path) -> bytes:
    (said,) = mmcore(root, "whole")
    found = rows(root / "whole")
    assert [row["id"] for row in found] == [f"q{index}" for index in range(EXAMPLES)]
    assert all(row.keys() == {"id", "prompt", "answer"} for row in found)
    assert len({row["answer"] for row in found}) > 4, "all answers are alike: the tests would see nothing"
    assert said.startswith(f"{EXAMPLES} answers in {root / 'whole'} (") and "cut off at --max-new-tokens 7" in said
    assert not parts(root, "whole")
    return (root / "whole").read_bytes()


@pytest.mark.parametrize(("after", "half"), [(0, b""), (1, b'{"id": "q'), (8, b"{"), (5, "{\u2028".encode()[:-1])])
def test_a_killed_run_goes_on(
    root: Path, whole: bytes, after: int, half: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with other sizes of what answers do not depend on."""
    name = f"killed {after}"
    killed(monkeypatch, after, half, root, name)
    assert not (root / name).exists() and len(parts(root, name)) == 1
    said = mmcore(root, name, "--batch-size", 2, layout=TP2, world_size=2)
    assert (root / name).read_bytes() == whole and not parts(root, name)
    there = f"{after} of {EXAMPLES} answers are there already: going on"
    assert (there in said[0]) == (after > 0) and not said[1]


def test_replicas_share_the_work(root: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed on two replicas, then on one of two stages, ended by one rank alone."""
    mmcore(root, "two", world_size=2)
    assert (root / "two").read_bytes() == whole
    killed(monkeypatch, 2, b"", root, "replicas", world_size=2)  # the slower one is killed before its third row
    found = [path.read_text().splitlines()[1:] for path in parts(root, "replicas")]
    assert max(map(len, found)) == 2
    killed(monkeypatch, 1, b"", root, "replicas", "--batch-size", 1, layout=PP2, world_size=2)
    count = 1 + sum(map(len, found))
    (said,) = mmcore(root, "replicas")
    assert f"{count} of {EXAMPLES} answers are there already" in said and (root / "replicas").read_bytes() == whole


def test_all_answers_are_there_but_the_file(root: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kill came before the last rename: no model is needed any more."""
    monkeypatch.setattr(generate, "publish", lambda *_: None)
    mmcore(root, "named")
    assert not (root / "named").exists()
    monkeypatch.undo()
    monkeypatch.setattr("mmcore.checkpoint.load_checkpoint", None)
    mmcore(root, "named")
    assert (root / "named").read_bytes() == whole


HOT = ("--temperature", 1.5, "--top-k", 50, "--top-p", 0.9, "--repetition-penalty", 1.2, "--seed", 3)


def test_samples_do_not_depend_on_kills_and_batches(root: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    mmcore(root, "hot", *HOT)
    killed(monkeypatch, 4, b"", root, "hot again", *HOT, "--batch-size", 2)
    mmcore(root, "hot again", *HOT, "--batch-size", 3, layout=PP2, world_size=2)
    assert (root / "hot").read_bytes() == (root / "hot again").read_bytes() != whole
    mmcore(root, "other seed", *HOT[:-1], 4)
    assert rows(root / "other seed") != rows(root / "hot")


def test_another_run_is_not_gone_on_with(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(monkeypatch, 3, b"", root, "other", "--stop", ".")
    before = parts(root, "other")[0].read_bytes()
    for options, difference in (
        (("--stop", ".", *HOT), "--temperature: 0.0, now 1.5; --top-p: 1.0, now 0.9"),
        ((), '--stop: ["."], now []'),
        (("--stop", ".", "--answer-by", "text", "--shuffle-images"), "--shuffle-images: false, now true"),
    ):
        with pytest.raises(AssertionError, match="holds answers of another run") as caught:
            mmcore(root, "other", *options)
        assert difference in str(caught.value)
    assert parts(root, "other")[0].read_bytes() == before
    data = json.loads((root / "data.json").read_text())
    (root / "data.json").write_text(json.dumps(data) + " ")
    with pytest.raises(AssertionError, match=r"another run \(--data: "):
        mmcore(root, "other", "--stop", ".")
    (root / "data.json").write_text(json.dumps(data))


def test_prompts_that_the_model_was_not_made_for(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mmcore(root, "long", "--prompt", "x " * 200)
    assert f"WARNING: {EXAMPLES} of {EXAMPLES} prompts are" in capfd.readouterr().err
    mmcore(root, "short")
    assert "WARNING" not in capfd.readouterr().err


def test_a_stop_text_ends_answers(root: Path, whole: bytes) -> None:
    answers = [json.loads(line)["answer"] for line in whole.decode().splitlines()]
    stop = next(answer[2:4] for answer in answers if len(answer) > 5)
    mmcore(root, "stopped", "--stop", stop, "nowhere")
    found = [row["answer"] for row in rows(root / "stopped")]
    assert len(found) == EXAMPLES
    assert found == [answer.split(stop)[0].strip() for answer in answers] != answers


def test_the_answer_is_a_choice(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = ("no", "a cat", "It is a very long answer.", "x")
    examples = [
        Example(
            id=f"c{index}", prompt=f"What is {index}?", images=(root / f"{index}.png",) * (index % 3), choices=choices
        )
        for index in range(6)
    ]
    monkeypatch.setattr(generate, "chosen", lambda _: examples)
    mmcore(root, "choices", "--answer-by", "option-loss")
    found = [row["answer"] for row in rows(root / "choices")]
    assert set(found) <= set(choices) and len(set(found)) > 1
    killed(monkeypatch, 2, b"", root, "choices again", "--answer-by", "option-loss", "--batch-size", 1)
    mmcore(root, "choices again", "--answer-by", "option-loss", layout=PP2, world_size=4)
    assert rows(root / "choices again") == rows(root / "choices")
    monkeypatch.undo()
    with pytest.raises(AssertionError, match=r"option-loss: 9 of 9 examples of exact-match have no choices, .* is q0"):
        mmcore(root, "none", "--answer-by", "option-loss")


def test_losses_of_a_dataset(root: Path) -> None:
    """The last of an option counts, so the task and its data are others."""
    fabricated.write_shards(root / "shards", 5, split="val")
    options = ("--task", "loss", "--data", root / "shards")
    said, _ = mmcore(root, "losses", *options, layout=TP2, world_size=2)
    found = [*read_losses(root / "losses")]
    assert said == f"losses of 5 samples in {root / 'losses'}" and all(row.loss_sum > 0 for row in found)
    mmcore(root, "losses again", *options)
    again = [row.loss_sum for row in read_losses(root / "losses again")]
    assert again == pytest.approx([row.loss_sum for row in found], rel=1e-5)


def config(**options: Any) -> GenerateConfig:
    paths = {name: Path(name) for name in ("checkpoint", "data", "output")}
    return GenerateConfig(**{"task": "coco", **paths, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be above 0, not 0"),
        ({"max_new_tokens": -1}, "--max-new-tokens must be above 0"),
        ({"temperature": -1.0}, "temperature must be 0 .greedy. or at least 0.001, and is -1.0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"stop": ("a", "")}, "--stop is empty"),
        ({"task": "loss", "prompt": "What?"}, "--prompt What[?]: --task loss asks nothing"),
        ({"top_p": 0.9}, "--top-p 0.9: nothing is drawn without --temperature"),
        ({"seed": 1}, "--seed 1: nothing is drawn without --temperature"),
        ({"answer_by": "option-loss", "temperature": 1.0}, "--temperature 1.0: with --answer-by option-loss"),
        ({"answer_by": "option-loss", "stop": ("a",)}, "option-loss the model writes nothing"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(spaced(tmp_path / TOKENIZER_DIR, SPECIAL))


@pytest.mark.parametrize(("template", "ends"), [("vicuna_v1", (2,)), ("internlm2", (4, 2))])
def test_answers_end_where_the_template_ends_them(tokenizer: Tokenizer, template: str, ends: tuple[int, ...]) -> None:
    assert end_ids(tokenizer, template) == ends
    architecture = replace(tiny.architecture(), conversation=template, image_token_id=1 << 20)
    tokens = choice_tokens("a cat", tokenizer, architecture)
    assert tokenizer.decode(tokens).strip() == "a cat" and not set(tokens) & set(ends)


def test_pictures_among_words(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(picture(0))
    architecture = replace(tiny.architecture(), conversation="vicuna_v1", image_token_id=1 << 20)
    for count in range(3):
        example = Example(id="a", prompt="What?", images=(tmp_path / "picture.png",) * count)
        prompt = layout(example, tokenizer, architecture)
        assert len(prompt.images) == count
        assert prompt.tokens.count(1 << 20) == count * tiny.VISION.num_image_embeddings
        assert layout(example, tokenizer, architecture, has_pixels=False).tokens == prompt.tokens


def test_pictures_are_cut_as_in_training(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(picture(0, (60, 21)))
    example = Example(id="a", prompt="What?", images=(tmp_path / "picture.png",))
    architecture = replace(tiny.architecture(), conversation="vicuna_v1", image_token_id=1 << 20)
    tilings = {
        "anyres": {"grid_pinpoints": ((16, 32), (32, 16))},
        "dynamic": {"max_num_tiles": 6, "tile_tags": True},
    }
    for tiling, options in tilings.items():
        pictures: Any = PictureArch(mode="squash", tiling=tiling, **options)
        cut = replace(architecture, pictures=pictures)
        prompt = layout(example, tokenizer, cut)
        num_places = prompt.tokens.count(architecture.image_token_id)
        assert len(prompt.images) == {"anyres": 3, "dynamic": 4}[tiling]
        assert layout(example, tokenizer, cut, has_pixels=False).tokens == prompt.tokens
        if tiling == "anyres":
            assert prompt.image_sources is not None and len(prompt.image_sources) == num_places
        else:
            assert prompt.image_sources is None and num_places == 4 * tiny.VISION.num_image_embeddings
    (tmp_path / "picture.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"picture\.png of example a: not a picture"):
        layout(example, tokenizer, cut)
