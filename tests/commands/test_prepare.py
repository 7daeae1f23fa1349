"""`mmcore prepare`, as a user calls it."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from mmcore.__main__ import main
from mmcore.data.sources.dataset import SOURCES
from tests.data.fabricated import conversation, loader, picture, tokenizer

KINDS = {"a.png": "PNG", "b.jpg": "JPEG", "sub/c.webp": "WEBP", "d.jpeg": "JPEG", "wrong.png": "GIF"}
TALK = conversation("<image>\nWhat is it?", "A cat.")


def prepare(source: str, output: Path, annotations: Path, *options: str) -> int:
    """Run the verb in this process, through the same door as the console script."""
    argv = ["mmcore", "prepare", source, "--annotations", str(annotations), "--output", str(output), *options]
    if "--images" not in options:
        argv += ["--images", str(annotations.parent / "images")]
    before, sys.argv = sys.argv, argv
    try:
        return main()
    except SystemExit as stop:  # a wrong option
        return int(stop.code or 0)
    finally:
        sys.argv = before


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A folder of pictures in several formats."""
    for seed, (name, kind) in enumerate(KINDS.items()):
        path = tmp_path / "raw" / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(seed, kind=kind))
    return tmp_path / "raw"


def annotations(raw: Path, content: Any, name: str = "rows.json") -> Path:
    path = raw / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def good(raw: Path, *more: dict[str, Any]) -> Path:
    return annotations(raw, [{"id": f"id.{name}", "image": name, "conversations": TALK} for name in KINDS] + list(more))


def members(output: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in sorted(output.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {f"{path.name}/{member.name}": tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    return found


def nothing_but(folder: Path, *names: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


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


def test_coco_captions(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mmcore.data.sources.coco import PROMPT

    content: dict[str, Any] = {
        "images": [{"id": 4, "file_name": "a.png"}, {"id": 5, "file_name": "sub/c.webp"}],
        "annotations": [{"id": n, "image_id": 4 + n % 2, "caption": f" A cat\n{n}. "} for n in range(3)],
    }
    assert prepare("coco-captions", tmp_path / "out", annotations(raw, content)) == 0
    found = members(tmp_path / "out")
    assert found["train_000000.tar/00000001.webp"] == (raw / "images" / "sub/c.webp").read_bytes()
    sample = json.loads(found["train_000000.tar/00000002.json"])
    assert sample == {"id": "2", "conversations": conversation(f"<image>\n{PROMPT}", "A cat 2.")}
    broken: list[Any] = [
        [],
        {"images": []},
        {"images": [{"id": 4}], "annotations": []},
        {**content, "annotations": [{"image_id": 9, "caption": "A"}]},
        {**content, "annotations": [{"image_id": 4}]},
    ]
    for other in broken:
        assert prepare("coco-captions", tmp_path / "bad", annotations(raw, other)) == 2
        assert "COCO's captions format is" in capsys.readouterr().err


def test_the_benchmark_asks_what_was_trained() -> None:
    from mmcore.data.sources.coco import PROMPT
    from mmcore.evaluation import coco

    assert PROMPT == coco.PROMPT


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
