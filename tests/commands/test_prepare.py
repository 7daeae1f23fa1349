"""`mmcore prepare`, as a user calls it."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from mmcore.data.sources.dataset import SOURCES
from tests.commands.raw_data import KINDS, TALK, annotations, files, good, members, nothing_but, prepare, write_pictures
from tests.data.fabricated import conversation, loader, picture, tokenizer


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Where the pictures lie in `images`, and annotations are written."""
    return write_pictures(tmp_path / "raw")


def test_rows_become_samples_with_their_own_bytes(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "dataset"
    assert prepare("llava-pretrain", output, good(raw), "--samples-per-shard", "2") == 0
    found = members(output)
    extensions = ("png", "jpg", "webp", "jpg", "gif")
    for index, (name, extension) in enumerate(zip(KINDS, extensions, strict=True)):
        sample = f"train_{index // 2:06d}.tar/{index:08d}"
        assert found[f"{sample}.{extension}"] == (raw / "images" / name).read_bytes()
        assert json.loads(found[f"{sample}.json"]) == {"id": f"id.{name}", "conversations": TALK}
    assert len(found) == 10
    assert (output / "rejected.jsonl").read_text() == ""
    assert nothing_but(tmp_path / "new", "dataset")
    summary = capsys.readouterr().out
    assert "kept, train" in summary and "5" in summary and "rejected" not in summary


def test_training_reads_what_was_prepared(raw: Path, tmp_path: Path) -> None:
    text = {"id": 7, "conversations": conversation("Hi", "Hello")}
    assert prepare("llava-instruct", tmp_path / "out", good(raw, text)) == 0
    stream = loader(tmp_path / "out", tokenizer(tmp_path / "tokenizer"), data={"shuffle_buffer_size": 0})
    keys = {key for _, batch in zip(range(8), stream, strict=False) for key in batch.keys}
    assert keys == {f"{index:08d}" for index in range(6)} and stream.skipped == 0


def test_val_rows_are_shards_of_their_own_with_keys_of_their_own(raw: Path, tmp_path: Path) -> None:
    val = annotations(raw, [{"id": "v", "image": "a.png", "conversations": TALK}], "val.json")
    assert prepare("llava-pretrain", tmp_path / "out", good(raw), "--val-annotations", str(val)) == 0
    names = list(members(tmp_path / "out"))
    assert "val_000000.tar/00000005.json" in names
    assert len({Path(name).stem for name in names}) == 6


BAD: dict[str, dict[str, Any]] = {
    "missing picture": {"image": "nowhere.png", "conversations": TALK},
    "not a picture": {"image": "text.png", "conversations": TALK},
    "unreadable picture": {"image": "sub", "conversations": TALK},
    "unsafe path": {"image": "../images/a.png", "conversations": TALK},
    "conversation": {"image": "a.png", "conversations": []},
    "image tags": {"image": "a.png", "conversations": conversation("<image><image>", "A")},
    "no picture": {"conversations": conversation("Q", "A")},
}
MORE_BAD: list[tuple[str, dict[str, Any]]] = [
    ("unsafe path", {"image": "/etc/hostname", "conversations": TALK}),
    ("unsafe path", {"image": "a\0.png", "conversations": TALK}),
    ("not a picture", {"image": "short.png", "conversations": TALK}),
    ("image tags", {"image": "a.png", "conversations": conversation("Q", "A")}),
    ("image tags", {"conversations": TALK}),
    ("conversation", {"image": "a.png", "conversations": conversation("<image>")}),
    ("conversation", {"image": "a.png", "conversations": conversation("<image>", " ")}),
    ("conversation", {"image": "a.png", "conversations": conversation("<image>", "half \ud83d of a pair")}),
    ("conversation", {"image": "a.png", "conversations": [{"from": "bot", "value": "A"}]}),
]


def test_bad_rows_are_left_out_counted_and_listed(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (raw / "images" / "text.png").write_text("not a picture")
    (raw / "images" / "short.png").write_bytes(picture(1, (64, 64))[:3000])
    bad = [*BAD.items(), *[row for row in MORE_BAD if row != ("image tags", {"conversations": TALK})]]
    rows = good(raw, *[{"id": f"bad {index}", **row} for index, (_, row) in enumerate(bad)])
    assert prepare("llava-pretrain", tmp_path / "out", rows, "--max-rejected", "0.8") == 0
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [entry["reason"] for entry in listed] == [reason for reason, _ in bad]
    assert [(entry["row"], entry["id"]) for entry in listed] == [(5 + n, f"bad {n}") for n in range(len(bad))]
    assert all(entry["detail"] and entry["file"] == str(rows) for entry in listed)
    assert len(members(tmp_path / "out")) == 10
    summary = capsys.readouterr().out
    for reason in BAD:
        count = [reason for reason, _ in bad].count(reason)
        assert any(f"rejected, {reason} " in line and f" {count} " in line for line in summary.splitlines())


def test_a_text_row_is_for_instruct_only(raw: Path, tmp_path: Path) -> None:
    text = {"id": "t", "conversations": conversation("Hi", "Hello")}
    assert prepare("llava-instruct", tmp_path / "a", good(raw, text)) == 0
    assert prepare("llava-pretrain", tmp_path / "b", good(raw, text)) == 1
    tagged = {"id": "t", "conversations": TALK}
    assert prepare("llava-instruct", tmp_path / "c", good(raw, tagged), "--max-rejected", "0.5") == 0
    assert json.loads((tmp_path / "c" / "rejected.jsonl").read_text())["reason"] == "image tags"


def test_too_many_bad_rows_leave_nothing(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = good(raw, {"id": "x", "image": "nowhere.png", "conversations": TALK})
    assert prepare("llava-pretrain", tmp_path / "new" / "out", rows, "--max-rejected", "0.16") == 1
    assert nothing_but(tmp_path / "new")
    error = capsys.readouterr().err
    assert "1 of 6 rows cannot be used" in error and "1 missing picture (row 5 of " in error and "nowhere.png" in error
    assert prepare("llava-pretrain", tmp_path / "new" / "out", rows, "--max-rejected", "0.17") == 0
    assert prepare("llava-pretrain", tmp_path / "empty", annotations(raw, [])) == 1
    assert not (tmp_path / "empty").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "rows.json is not JSON"),
        ({"images": []}, "rows.json holds an object where a list belongs"),
        ([3], "row 0 of .*rows.json is a number"),
        ([{"id": 1, "image": "a.png", "caption": "A"}], r"row 0 .* no list of conversations \(its keys: id, image, c"),
        ([{"id": 1, "conversations": TALK}, {"id": 2, "conversations": ["A"]}], "row 1 .* a turn without the texts"),
        ([{"id": 1, "image": ["a.png", "b.jpg"], "conversations": TALK}], "row 0 .* a list as image"),
    ],
)
def test_another_format_is_wrong_usage(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, message: str
) -> None:
    assert prepare("llava-instruct", tmp_path / "new" / "out", annotations(raw, content)) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.startswith("mmcore prepare: ") and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_missing_inputs_and_an_existing_output_are_wrong_usage(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, output = good(raw), tmp_path / "out"
    assert prepare("llava-instruct", output, raw / "nowhere.json") == 2
    assert prepare("llava-instruct", output, rows, "--images", str(raw / "nowhere")) == 2
    assert prepare("llava-instruct", output, rows, "--samples-per-shard", "0") == 2
    assert prepare("llava-instruct", output, rows, "--max-rejected", "2") == 2
    assert prepare("llava", output, rows) == 2
    assert not output.exists()
    output.mkdir()
    assert prepare("llava-instruct", output, rows) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert prepare("llava-instruct", output, rows, "--overwrite") == 0
    assert len(members(output)) == 10


def test_archives_give_the_same_dataset_as_folders(raw: Path, tmp_path: Path) -> None:
    rows = good(raw)
    with zipfile.ZipFile(raw / "sub.zip", "w") as archive:
        archive.write(raw / "images" / "sub" / "c.webp", "c.webp")
    with tarfile.open(raw / "rest.tar", "w") as tar:
        for name in KINDS:
            if "/" not in name:
                tar.add(raw / "images" / name, name)
    assert prepare("llava-pretrain", tmp_path / "a", rows) == 0
    places = ["--images", f"sub={raw / 'sub.zip'}", str(raw / "rest.tar")]
    assert prepare("llava-pretrain", tmp_path / "b", rows, *places) == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_large_pictures_are_shrunk_and_the_others_left_alone(raw: Path, tmp_path: Path) -> None:
    from PIL import Image

    turned = Image.open(io.BytesIO(picture(1, (90, 30))))
    exif = turned.getexif()
    exif[0x0112] = 6  # turned by a quarter: shown 30 wide and 90 high
    turned.save(raw / "images" / "turned.jpg", exif=exif)
    (raw / "images" / "thin.png").write_bytes(picture(2, (500, 1)))
    rows = good(raw, *({"id": n, "image": n, "conversations": TALK} for n in ("turned.jpg", "thin.png")))

    def sizes(*options: str) -> tuple[dict[str, tuple[int, int]], dict[str, bytes]]:
        output = tmp_path / "-".join(options)
        assert prepare("llava-pretrain", output, rows, "--image-max-side", *options) == 0
        found = members(output)
        pictures = {Path(name).name: data for name, data in found.items() if not name.endswith("json")}
        return {name: Image.open(io.BytesIO(data)).size for name, data in pictures.items()}, pictures

    size, data = sizes("60")
    assert (size["00000005.jpg"], size["00000006.jpg"]) == ((20, 60), (60, 1))
    assert data["00000000.png"] == (raw / "images" / "a.png").read_bytes() and size["00000000.png"] == (20, 16)
    assert {Image.open(io.BytesIO(data[f"0000000{n}.jpg"])).format for n in (5, 6)} == {"JPEG"}
    poor = sizes("60", "--image-quality", "10")[1]
    assert len(poor["00000005.jpg"]) < len(data["00000005.jpg"]) and poor["00000000.png"] == data["00000000.png"]
    size, data = sizes("20")
    assert data["00000000.png"] == (raw / "images" / "a.png").read_bytes()  # exactly that large
    for wrong in (["--image-max-side", "0"], ["--image-quality", "0"], ["--image-quality", "101"], ["--workers", "0"]):
        assert prepare("llava-pretrain", tmp_path / "wrong", rows, *wrong) == 2


def many(raw: Path) -> Path:
    """Rows enough for several workers, with a bad one here and there."""
    rows = [{"id": str(n), "image": list(KINDS)[n % 5], "conversations": TALK} for n in range(100)]
    for number in (0, 31, 32, 99):
        rows[number]["image"] = "nowhere.png"
    return annotations(raw, rows, "many.json")


def test_the_number_of_workers_changes_no_byte(raw: Path, tmp_path: Path) -> None:
    options = ["--samples-per-shard", "7", "--max-rejected", "0.1", "--image-max-side", "10"]
    for workers in ("1", "2", "3"):
        assert prepare("llava-instruct", tmp_path / workers, many(raw), *options, "--workers", workers) == 0
    assert files(tmp_path / "1") == files(tmp_path / "2") == files(tmp_path / "3")
    assert len((tmp_path / "1" / "rejected.jsonl").read_text().splitlines()) == 4


def test_a_killed_job_goes_on_and_ends_with_the_same_bytes(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val = annotations(raw, [{"id": n, "image": "a.png", "conversations": TALK} for n in range(9)], "val.json")
    options = ["--samples-per-shard", "7", "--max-rejected", "0.1", "--val-annotations", str(val)]
    assert prepare("llava-instruct", tmp_path / "whole", many(raw), *options) == 0
    assert "by an earlier job" not in capsys.readouterr().out
    # Of 7 samples each, with 3 bad rows on the way, shards end after rows 8, 15, 22, 29, 38, ..., 94, 107.
    for sample, done in ((6, 0), (30, 29), (96, 94), (104, 107)):
        assert kill_at(sample, "llava-instruct", tmp_path / "out", many(raw), *options) == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
        assert prepare("llava-instruct", tmp_path / "out", many(raw), *options) == 0
        summary = capsys.readouterr().out
        assert (f"rows done by an earlier job │ {done} " in summary) == (done > 0), summary
        assert files(tmp_path / "out") == files(tmp_path / "whole")
        shutil.rmtree(tmp_path / "out")
    assert nothing_but(tmp_path, "raw", "whole")


def kill_at(sample: int, source: str, output: Path, annotations: Path, *options: str) -> int:
    """Run the verb in a process that is killed in place of writing that sample."""
    code = (
        "import os, signal, sys\n"
        "from mmcore.data.shards import Shard\n"
        "from mmcore.__main__ import main\n"
        "write, count = Shard.write_sample, 0\n"
        "def write_or_die(*arguments):\n"
        "    global count\n"
        f"    if count == {sample}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    count += 1\n"
        "    write(*arguments)\n"
        "Shard.write_sample = write_or_die\n"
        "sys.exit(main())\n"
    )
    verb = ["prepare", source, "--annotations", str(annotations), "--images", str(annotations.parent / "images")]
    argv = [sys.executable, "-c", code, *verb, "--output", str(output), "--workers", "1", *options]
    return subprocess.run(argv, timeout=60).returncode


def test_other_options_or_inputs_start_afresh(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = many(raw)
    options = ["--samples-per-shard", "7", "--max-rejected", "0.1"]
    for change in (["--image-max-side", "10"], ["--samples-per-shard", "8"], []):
        assert kill_at(30, "llava-instruct", tmp_path / "out", rows, *options) == -signal.SIGKILL
        if not change:
            rows.write_text(rows.read_text() + " ")
        assert prepare("llava-instruct", tmp_path / "out", rows, *options, *change) == 0
        assert "by an earlier job" not in capsys.readouterr().out
        shutil.rmtree(tmp_path / "out")


def test_sources_of_pictures_want_a_place_and_text_does_not(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare("llava-pretrain", tmp_path / "out", good(raw), "--images") == 2
    assert "say where they lie with --images" in capsys.readouterr().err
    assert prepare("jsonl", tmp_path / "out", annotations(raw, '{"text": "A."}'), "--images") == 0


def test_a_killed_worker_is_a_fault_without_traceback(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmcore.data.sources import workers

    monkeypatch.setattr(workers, "_run", _die)
    assert prepare("llava-instruct", tmp_path / "new" / "out", many(raw), "--workers", "2") == 1
    error = capsys.readouterr().err
    assert error.startswith("mmcore prepare: a worker was killed") and "--workers" in error
    assert nothing_but(tmp_path / "new")


def test_ctrl_c_keeps_what_is_finished(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmcore.data.sources.sample import Reader

    read, rows = Reader.read, many(raw)

    def interrupt(reader: Reader, row: Any) -> Any:
        if row.number == 20:
            raise KeyboardInterrupt
        return read(reader, row)

    options = ["--samples-per-shard", "7", "--max-rejected", "0.1", "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(Reader, "read", interrupt)
        assert prepare("llava-instruct", tmp_path / "out", rows, *options) == 1
    assert capsys.readouterr().err.startswith("mmcore prepare: interrupted; ")
    assert nothing_but(tmp_path, "raw", ".out.incomplete")
    assert prepare("llava-instruct", tmp_path / "out", rows, *options) == 0
    assert "rows done by an earlier job │ 15 " in capsys.readouterr().out
    assert nothing_but(tmp_path, "raw", "out")


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, signal, time\n"
        "from mmcore.data.sources.workers import map_in_order\n"
        "if __name__ == '__main__':\n"
        "    results = map_in_order(abs, range(-1000, 0), 2)\n"
        "    print(next(results))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / "job.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    # Returns when the pipe is closed: a worker that lives on holds it open.
    argv = [sys.executable, str(tmp_path / "job.py")]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == -signal.SIGKILL


def _die(chunk: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_full_disk_is_a_fault_without_traceback(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("mmcore.data.shards.Shard.write_sample", fail)
    assert prepare("llava-instruct", tmp_path / "new" / "out", good(raw)) == 1
    assert capsys.readouterr().err == f"mmcore prepare: [Errno 28] {os.strerror(28)}\n"
    assert nothing_but(tmp_path / "new")


def test_help_is_light() -> None:
    code = (
        "import sys; sys.argv = ['mmcore', 'prepare', '--help']\n"
        "from mmcore.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'PIL', 'numpy', 'megatron'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"{{{','.join(SOURCES)}}}" in done.stdout and "--max-rejected" in done.stdout
