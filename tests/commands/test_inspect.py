"""`mmcore inspect`, as a user calls it, on a dataset with every fault there is."""

import json
import multiprocessing
import pickle
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmcore.__main__ import main
from mmcore.constants import TOKENIZER_DIR
from mmcore.data.findings import FINDINGS
from mmcore.data.shards import ShardWriter
from mmcore.data.sources.workers import map_in_order
from mmcore.models.architecture import save_architecture
from tests import tiny
from tests.data.fabricated import conversation, picture, write_tokenizer

# Of the tokenizer; the picture's placeholder comes behind.
VOCAB_SIZE = 300
WINDOW = 64

ATTACK = "<script>document.title = 'owned'</script> \u202e"


def talk(question: str, answer: str) -> bytes:
    return json.dumps({"conversations": conversation(question, answer)}).encode()


def inspect(*arguments: object) -> int:
    """Run the verb in this process, through the same door as the console script."""
    before, sys.argv = sys.argv, ["mmcore", "inspect", *map(str, arguments)]
    try:
        return main()
    except SystemExit as stop:  # a wrong option
        return int(stop.code or 0)
    finally:
        sys.argv = before


def write_checkpoint(folder: Path, vocab_size: int = VOCAB_SIZE) -> Path:
    write_tokenizer(folder / TOKENIZER_DIR)
    whole = tiny.architecture()
    assert whole.language is not None
    language = replace(whole.language, vocab_size=vocab_size)
    save_architecture(replace(whole, language=language, image_token_id=VOCAB_SIZE), folder)
    return folder


def write(output: Path, samples: Mapping[str, dict[str, bytes]] | list[tuple[str, dict[str, bytes]]]) -> Path:
    with ShardWriter(output, samples_per_shard=10) as writer:
        for key, parts in samples.items() if isinstance(samples, Mapping) else samples:
            writer.write("train", key, parts)
    return output


def good(seed: int) -> dict[str, bytes]:
    return {"png": picture(seed), "json": talk("<image>\nwhat is it", f"it is number {seed}")}


# What is wrong with a sample, by the sample's key.
FAULTS = {
    "unreadable": ("damaged", good(100)),
    "broken_picture": ("broken", {"png": picture(101)[:400], "json": talk("<image>what", "one")}),
    "missing_picture": ("lacking", {"json": talk("<image>what", "one")}),
    "picture_without_place": ("unasked", {"png": picture(102), "json": talk("what", "one")}),
    "no_layout": ("garbled", {"json": b'{"conversations": [{"from": "nobody", "value": "one"}, {"from": "gpt"'}),
    "nothing_trained": ("silent", {"json": talk("what is it", " ")}),
    "cut_picture": ("late", {"png": picture(103), "json": talk("what " * WINDOW + "<image>", "one")}),
    "small_picture": ("tiny", {"png": picture(104, (7, 30)), "json": talk("<image>what", "one")}),
    "text_only": ("text", {"json": talk("what", "one")}),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("inspect") / "checkpoint")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 good samples, one of each fault, two too long, a key and a picture twice, half a letter, one left out."""
    samples = [(f"good{seed}", good(seed)) for seed in range(20)]
    samples += list(FAULTS.values())
    samples.append(("long", {"json": talk("what", "one " * WINDOW)}))
    samples.append(("unheard", {"json": talk("what " * WINDOW, "one")}))
    samples.append(("good3", {"png": picture(7), "json": talk("<image>again", ATTACK)}))
    samples.append(("half", {"json": talk("what", "half a surrogate pair \ud800")}))
    samples.append(("left_out", {"json": b"no json"}))
    output = write(tmp_path_factory.mktemp("inspect") / "faulty", samples)
    place = list(dict(samples)).index("damaged")  # its header becomes noise
    shard = output / f"train_{place // 10:06d}.tar"
    data = bytearray(shard.read_bytes())
    start = data.index(b"damaged.png")
    data[start : start + 512] = bytes(range(256)) * 2
    shard.write_bytes(data)
    split = output / ".nv-meta" / "split.yaml"
    content = yaml.safe_load(split.read_text())
    content["exclude"] = ["train_000003.tar/left_out"]
    split.write_text(yaml.safe_dump(content))
    return output


def inspected(output: Path, dataset: Path, checkpoint: Path, *options: object) -> tuple[int, dict[str, Any]]:
    """Exit code, and the report."""
    code = inspect(dataset, "--checkpoint", checkpoint, "--seq-length", WINDOW, "--output", output, *options)
    return code, json.loads((output / "report.json").read_text())


def counts(report: Mapping[str, Any]) -> dict[str, int]:
    return {finding["name"]: finding["count"] for finding in report["findings"] if finding["count"]}


def keys(report: Mapping[str, Any], name: str) -> list[str]:
    found = next(finding for finding in report["findings"] if finding["name"] == name)
    return [example["key"] for example in found["examples"]]


def test_every_fault_is_found_and_counted(faulty: Path, checkpoint: Path, tmp_path: Path) -> None:
    code, report = inspected(tmp_path, faulty, checkpoint, "--workers", 1, "--num-readers", 50)
    assert code == 1 and not report["passed"]
    assert counts(report) == {
        **dict.fromkeys(FAULTS, 1),
        "no_layout": 2,
        "nothing_trained": 2,
        "longer": 3,
        "text_only": 3,
        "repeated_key": 1,
        "repeated_picture": 1,
        "too_few": 16,
    }
    more = {
        "unreadable": [""],
        "no_layout": ["garbled", "half"],
        "nothing_trained": ["silent", "unheard"],
        "longer": ["late", "long", "unheard"],
        "repeated_key": ["good3"],
        "repeated_picture": ["good3"],
        "text_only": [],
    }
    for name, (key, _) in FAULTS.items():
        assert keys(report, name) == more.get(name, [key]), name
    told = {finding["name"]: finding["examples"] for finding in report["findings"]}
    assert told["repeated_picture"][0] == {
        "source": "faulty",
        "shard": "train_000003.tar",
        "key": "good3",
        "detail": "also in sample good7 of train_000000.tar",
    }
    assert told["repeated_key"][0]["detail"] == "also in sample good3 of train_000000.tar"
    assert "train_000002.tar" in told["unreadable"][0]["detail"]
    assert report["counts"]["samples"] == 33 and report["counts"]["excluded"] == 1
    assert report["num_samples"] == 34
    # 20 good ones, tiny, text, long (cut), and good3's namesake.
    assert report["sources"][0]["usable"] == 24


def test_every_finding_can_be_met(faulty: Path, checkpoint: Path, tmp_path: Path) -> None:
    """The dataset above lacks one, which takes another model: every sample has an id beyond 128."""
    _, report = inspected(tmp_path, faulty, checkpoint, "--workers", 1, "--num-readers", 50)
    small = write_checkpoint(tmp_path / "small", vocab_size=128)
    code, other = inspected(tmp_path / "other", write(tmp_path / "good", {"a": good(0), "b": good(1)}), small)
    assert code == 1 and counts(other) == {"outside_vocabulary": 2}
    assert {*counts(report), *counts(other)} == {*FINDINGS}
    assert other["token_ids"]["lowest_and_highest"][1] > 128 == other["token_ids"]["model"]


def test_a_good_dataset_passes(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = write(tmp_path / "dataset", {f"{seed}": good(seed) for seed in range(5)})
    code, report = inspected(tmp_path / "output", dataset, checkpoint)
    assert code == 0 and report["passed"] and not counts(report)
    assert sorted(path.name for path in (tmp_path / "output").iterdir()) == ["report.html", "report.json"]
    told = capsys.readouterr().out
    assert "nothing would hurt a run" in told and "pictures of a sample" in told


def test_padding_is_that_of_the_hand(checkpoint: Path, tmp_path: Path) -> None:
    """Nine samples of 19 tokens and one of 55, in rows of 64: a row takes three of the short ones.

    The order that is drawn has the long one in the last micro batch of 4, which holds two.
    """
    samples = {f"{seed}": good(seed) for seed in range(9)}
    samples["long"] = {"png": picture(9), "json": talk("<image>\nwhat is it", "it is number 0" + " one" * 18)}
    _, report = inspected(tmp_path / "output", write(tmp_path / "dataset", samples), checkpoint, "--workers", 1)
    assert report["lengths"]["percentiles"] == {"0": 19, "10": 19, "50": 19, "90": 19, "99": 55, "100": 55}
    assert [row for row in report["lengths"]["bins"] if row[2]] == [[18, 19, 9], [54, 55, 1]]
    tokens = 9 * 19 + 55
    assert report["padding"] == {
        "a row of 64 for each sample": pytest.approx(1 - tokens / (10 * 64)),
        "micro batches of 4, padded to their longest": pytest.approx(1 - tokens / (8 * 19 + 2 * 55)),
        "micro batches of 16, padded to their longest": pytest.approx(1 - tokens / (10 * 55)),
        **{
            f"rows of 64, packed from {size} samples": pytest.approx(1 - tokens / (4 * 64)) for size in (100, 500, 2000)
        },
    }


def test_the_number_of_workers_changes_nothing(
    faulty: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(Forked here, since spawned processes import torch for seconds; what they would be sent is pickled.)"""
    context, pools = multiprocessing.get_context("fork"), []

    def fork(_: str) -> Any:
        pools.append(context)
        return context

    def map_pickled(function: Any, *rest: Any) -> Any:
        return map_in_order(pickle.loads(pickle.dumps(function)), *rest)

    monkeypatch.setattr("mmcore.data.sources.workers.multiprocessing.get_context", fork)
    monkeypatch.setattr("mmcore.data.inspection.map_in_order", map_pickled)
    monkeypatch.setattr("mmcore.data.inspection.STRETCH", 1)  # else so few samples are one process's work
    for workers in (1, 2):
        inspected(tmp_path / str(workers), faulty, checkpoint, "--workers", workers, "--show", 40)
    assert len(pools) == 1
    for name in ("report.json", "report.html"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_a_blend_is_told_by_source(checkpoint: Path, tmp_path: Path) -> None:
    write(tmp_path / "pictures", {f"{seed}": good(seed) for seed in range(6)})
    write(tmp_path / "texts", {"a": {"json": talk("what", "one")}, "b": {"json": talk("what", "")}})
    blend = [{"repetitions": 0.5, "path": "./pictures"}, {"repetitions": 1, "path": "./texts"}]
    content = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}
    content |= {"splits": {"train": {"blend_epochized": blend}}}
    (tmp_path / "blend.yaml").write_text(yaml.safe_dump(content))
    _, report = inspected(tmp_path / "output", tmp_path / "blend.yaml", checkpoint, "--num-readers", 6)
    first, second = report["sources"]
    assert (first["name"], first["share_of_draws"], first["samples"], first["usable"]) == ("pictures", 0.6, 6, 6)
    assert (second["name"], second["share_of_draws"], second["samples"], second["usable"]) == ("texts", 0.4, 2, 1)
    assert second["findings"] == {"nothing_trained": 1, "text_only": 1}
    assert counts(report) == {"nothing_trained": 1, "text_only": 1, "too_few": 1}


def test_options_that_look_at_less(checkpoint: Path, tmp_path: Path) -> None:
    samples = [(f"good{seed}", good(seed)) for seed in range(9)] + [FAULTS["broken_picture"]]
    dataset = write(tmp_path / "dataset", samples)
    code, report = inspected(tmp_path / "a", dataset, checkpoint, "--no-decode")
    assert code == 0 and not report["pictures_decoded"]  # its header is sound
    code, report = inspected(tmp_path / "b", dataset, checkpoint, "--max-samples", 3, "--show-key", "good3")
    assert code == 0 and report["num_inspected"] == report["counts"]["samples"] == 3
    code, report = inspected(tmp_path / "c", dataset, checkpoint, "--max-samples", 100)
    assert code == 1 and counts(report) == {"broken_picture": 1}


def test_a_window_may_be_too_small_for_some(checkpoint: Path, tmp_path: Path) -> None:
    samples = {f"{seed}": good(seed) for seed in range(3)} | {"long": {"json": talk("what", "one " * WINDOW)}}
    dataset = write(tmp_path / "dataset", samples)
    assert inspected(tmp_path / "a", dataset, checkpoint)[0] == 1
    code, report = inspected(tmp_path / "b", dataset, checkpoint, "--max-longer", 0.25)
    assert code == 0 and counts(report) == {"longer": 1, "text_only": 1}


def test_the_first_examples_are_kept(checkpoint: Path, tmp_path: Path) -> None:
    samples = {f"{number:02}": {"json": talk("what", " ")} for number in range(20)}
    _, report = inspected(tmp_path / "output", write(tmp_path / "dataset", samples), checkpoint, "--workers", 1)
    assert keys(report, "nothing_trained") == ["00", "01", "02", "03", "04"]
    assert counts(report) == {"nothing_trained": 20}


def test_samples_can_be_looked_at(faulty: Path, checkpoint: Path, tmp_path: Path) -> None:
    inspected(tmp_path, faulty, checkpoint, "--workers", 1, "--show", 34, "--show-key", "good3")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<article") == 34 and "<script" not in page
    assert page.index("<h3>good3 ") < page.index("<h3>good0 ")
    assert "&lt;s&gt;</span>" in page and '<span class="t image" title="id 300">image \u00d7 4</span>' in page
    assert "the dataset&#x27;s metadata leaves it out" in page and "\\u202e" in page
    assert not re.search(r"https?://|url\(|@import", page)
    assert {source[:11] for source in re.findall(r'src="([^"]*)', page)} == {"data:image/"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seq-length", 0), "--seq-length must be above 0, not 0"),
        (("--max-longer", 2), "--max-longer is a fraction"),
        (("--conversation", "vicuna"), "no conversation template 'vicuna', did you mean 'vicuna_v1'?"),
        (("--seq-length", 4), "seq-length 4 has no room for a picture (up to 4 tokens) and text"),
        (("--conversation", "llama3"), "has no control token '<|eot_id|>'"),
        (("--split", "val"), "val"),
        (("--output", "OUTPUT", "--show-key", "nobody"), "no sample that was looked at has the key --show-key nobody"),
    ],
)
def test_mistakes(
    options: tuple[Any, ...],
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dataset = write(tmp_path / "dataset", {"a": good(0)})
    given = [tmp_path / "output" if option == "OUTPUT" else option for option in options]
    assert inspect(dataset, "--checkpoint", checkpoint, *given) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "output").exists()


def test_an_interruption_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mmcore.data.inspection.look_at", interrupt)
    dataset = write(tmp_path / "dataset", {"a": good(0)})
    assert inspect(dataset, "--checkpoint", checkpoint, "--output", tmp_path / "output", "--workers", 1) == 1
    assert capsys.readouterr().err == "mmcore inspect: interrupted; nothing was written\n"
    assert not (tmp_path / "output").exists()
