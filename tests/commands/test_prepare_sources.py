"""`mmcore prepare` with the sources that have formats of their own."""

import gzip
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.commands.raw_data import KINDS, TALK, annotations, members, prepare, write_pictures
from tests.data.fabricated import conversation, loader, tokenizer


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Where the pictures lie in `images`, and annotations are written."""
    return write_pictures(tmp_path / "raw")


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


def test_karpathys_file_has_its_own_splits(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def image(split: str, number: int) -> dict[str, Any]:
        sentences = [{"raw": f" Caption\n{n}. ", "sentid": n} for n in (2 * number, 2 * number + 1)]
        return {"filepath": "sub", "filename": "c.webp", "split": split, "sentences": sentences}

    content = {"images": [image(split, n) for n, split in enumerate(["test", "val", "restval", "train"])]}
    assert prepare("coco-captions", tmp_path / "out", annotations(raw, content)) == 0
    found = members(tmp_path / "out")
    ids = {name: json.loads(data)["id"] for name, data in found.items() if name.endswith("json")}
    # In the order of the file within a split, the splits one after the other.
    assert list(ids.values()) == ["0", "1", "4", "5", "6", "7", "2", "3"]
    assert [name.split("_")[0] for name in ids] == ["test"] * 2 + ["train"] * 4 + ["val"] * 2
    assert sorted(Path(name).stem for name in ids) == [f"{n:08d}" for n in range(8)]
    assert json.loads(found["train_000000.tar/00000003.json"])["conversations"][1]["value"] == "Caption 7."
    content["images"].append(image("dev", 4))
    assert prepare("coco-captions", tmp_path / "bad", annotations(raw, content)) == 2
    error = capsys.readouterr().err
    assert "picture 4 of" in error and "'dev'" in error and "restval" in error


def jsonl(raw: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    path = raw / name
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def test_jsonl_rows_of_every_form(raw: Path, tmp_path: Path) -> None:
    two = conversation("<image>\nand<image>?", "Two.", "Sure?", "Yes.")
    document = "Before.\n<image>\nBetween.\n<image>\n<image>\nAfter."
    rows = [
        {"id": 5, "image": "a.png", "conversations": TALK, "source": "elsewhere"},
        "",
        {"images": ["b.jpg", "a.png"], "conversations": two},
        {"images": ["a.png", "wrong.png", "a.png"], "text": document},
        {"text": "Nothing but text."},
    ]
    assert prepare("jsonl", tmp_path / "out", jsonl(raw, rows)) == 0
    found = {name.split("/")[1]: data for name, data in members(tmp_path / "out").items()}
    read = {name: (raw / "images" / name).read_bytes() for name in KINDS}
    assert {name: data for name, data in found.items() if not name.endswith("json")} == {
        "00000000.png": read["a.png"],
        "00000001.0.jpg": read["b.jpg"],
        "00000001.1.png": read["a.png"],
        "00000002.0.png": read["a.png"],
        "00000002.1.gif": read["wrong.png"],
        "00000002.2.png": read["a.png"],
    }
    assert [json.loads(data) for name, data in found.items() if name.endswith("json")] == [
        {"id": "5", "conversations": TALK},
        {"id": "2", "conversations": two},
        {"id": "3", "text": document},
        {"id": "4", "text": "Nothing but text."},
    ]


def test_training_reads_several_pictures_in_order(raw: Path, tmp_path: Path) -> None:
    from mmcore.data.task_encoder import picture_files

    rows = [{"images": ["a.png", "b.jpg"] * 6, "conversations": conversation("<image>" * 12, "Many.")}]
    assert prepare("jsonl", tmp_path / "out", jsonl(raw, rows)) == 0
    files = [(raw / "images" / name).read_bytes() for name in ("a.png", "b.jpg")]
    parts = {name.split(".", 2)[2]: data for name, data in members(tmp_path / "out").items()}
    assert picture_files(dict(sorted(parts.items()))) == files * 6
    text = loader(tmp_path / "out", tokenizer(tmp_path / "tokenizer"), data={"shuffle_buffer_size": 0})
    assert next(iter(text)).images.shape[0] == 4 * 12 and text.skipped == 0


BAD_LINES: list[tuple[str, Any, str]] = [
    ("format", "{", "not JSON"),
    ("format", [3], "not an object"),
    ("format", {"id": 1}, "not both or neither"),
    ("format", {"conversations": TALK, "text": "A"}, "not both or neither"),
    ("format", {"image": "a.png", "images": [], "text": "A"}, "not both"),
    ("format", {"image": ["a.png"], "conversations": TALK}, "several belong into images"),
    ("format", {"images": "a.png", "conversations": TALK}, "no list of paths"),
    ("format", {"text": ["A"]}, "text is no text"),
    ("format", {"id": [], "text": "A"}, "id is neither"),
    ("conversation", {"conversations": "A"}, "a list of turns"),
    ("text", {"image": "a.png", "text": "<image>\n"}, "has none"),
    ("text", {"text": "half \ud83d of a pair"}, "surrogates"),
    ("image tags", {"image": "a.png", "text": "A"}, "0 <image> for 1 picture"),
    ("image tags", {"images": ["a.png"] * 3, "text": "<image> A <image>"}, "2 <image> for 3 pictures"),
    ("missing picture", {"images": ["a.png", "half \ud83d"], "text": "<image> A <image>"}, "half"),
    ("unsafe path", {"images": ["a.png", "../a.png"], "text": "<image> A <image>"}, "../a.png"),
]


def test_bad_lines_are_rejected_one_by_one(raw: Path, tmp_path: Path) -> None:
    path = jsonl(raw, [row for _, row, _ in BAD_LINES] + [{"text": "Good."}])
    assert prepare("jsonl", tmp_path / "out", path, "--max-rejected", "0.95") == 0
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(entry["row"], entry["reason"]) for entry in listed] == [(n, row[0]) for n, row in enumerate(BAD_LINES)]
    for entry, (_, _, detail) in zip(listed, BAD_LINES, strict=True):
        assert detail in entry["detail"]
    assert len(members(tmp_path / "out")) == 1
    assert prepare("jsonl", tmp_path / "none", path) == 1


def test_compressed_lines_are_read_as_they_are(raw: Path, tmp_path: Path) -> None:
    plain = jsonl(raw, [{"id": "a", "text": "One."}, {"id": "b", "text": "Two."}])
    packed = raw / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    zipped = raw / "rows.jsonl.zip"
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.write(plain, "rows.jsonl")
    assert prepare("jsonl", tmp_path / "plain", plain, str(packed), str(zipped)) == 0
    ids = [json.loads(data)["id"] for data in members(tmp_path / "plain").values()]
    assert ids == ["a", "b"] * 3
    packed.write_bytes(packed.read_bytes()[:-9])
    assert prepare("jsonl", tmp_path / "cut", packed) == 2
    (raw / "no.zip").write_text("no")
    assert prepare("jsonl", tmp_path / "no", raw / "no.zip") == 2
    with zipfile.ZipFile(zipped, "a") as archive:
        archive.write(plain, "more.jsonl")
    assert prepare("jsonl", tmp_path / "two", zipped) == 2


def test_training_reads_documents(raw: Path, tmp_path: Path) -> None:
    rows = [{"images": ["a.png", "b.jpg"], "text": "one<image>two<image>three"}] * 4
    assert prepare("jsonl", tmp_path / "out", jsonl(raw, rows)) == 0
    stream = loader(tmp_path / "out", tokenizer(tmp_path / "tokenizer"), data={"shuffle_buffer_size": 0})
    batch = next(iter(stream))
    assert batch.images.shape[0] == 4 * 2 and stream.skipped == 0


def page(sentences: list[str], pictures: dict[str, int | None], **more: Any) -> dict[str, Any]:
    info = [
        {"image_name": name, "raw_url": f"https://x.org/{name}?s=1"}
        | ({} if sentence is None else {"matched_text_index": sentence})
        for name, sentence in pictures.items()
    ]
    return {"url": "https://x.org", "text_list": sentences, "image_info": info, **more}


def test_mmc4_pictures_stand_before_their_sentences(raw: Path, tmp_path: Path) -> None:
    pages = [
        page(["A.", "B.", "C."], {"b.jpg": 2, "a.png": 1, "d.jpeg": 2}),
        page(["A.", "B."], {"a.png": None}, similarity_matrix=[[0.1, 0.3]]),
        page(["A.", "B.", "C."], {"lost.png": 0, "b.jpg": 1, "gone.png": 2}),
        page(["A."], {"lost.png": 0}),
        page(["A."], {}),
        page(["A."], {"a.png": 1}),
        page(["A <image>."], {"a.png": 0}),
        {"text_list": ["A."]},
        "{",
    ]
    assert prepare("mmc4", tmp_path / "out", jsonl(raw, pages), "--max-rejected", "0.7") == 0
    found = members(tmp_path / "out")
    texts = [json.loads(data)["text"] for name, data in found.items() if name.endswith("json")]
    assert texts == ["A.<image>B.<image><image>C.", "A.<image>B.", "A.<image>B. C."]
    read = {name: (raw / "images" / name).read_bytes() for name in KINDS}
    assert [data for name, data in found.items() if not name.endswith("json")] == [
        *(read[name] for name in ("a.png", "b.jpg", "d.jpeg")),
        read["a.png"],
        read["b.jpg"],
    ]
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    dropped = "only a picture: missing picture"
    assert [(entry["row"], entry["reason"]) for entry in listed] == [
        (2, dropped),
        (2, dropped),
        (3, "no picture"),
        (4, "no picture"),
        *((row, "format") for row in (5, 6, 7, 8)),
    ]


def test_mmc4_pictures_may_be_kept_by_their_urls(raw: Path, tmp_path: Path) -> None:
    with tarfile.open(raw / "downloads.tar", "w") as tar:
        tar.add(raw / "images" / "b.jpg", "https://x.org/7.jpg?s=1")
    path = jsonl(raw, [page(["A."], {"7.jpg": 0})])
    assert prepare("mmc4", tmp_path / "out", path, "--images", str(raw / "downloads.tar")) == 0
    assert members(tmp_path / "out")["train_000000.tar/00000000.jpg"] == (raw / "images" / "b.jpg").read_bytes()


def test_the_benchmark_asks_what_was_trained() -> None:
    from mmcore.data.sources.coco import PROMPT
    from mmcore.evaluation import coco

    assert PROMPT == coco.PROMPT
