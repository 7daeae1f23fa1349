"""`mmcore inspect`, as a user calls it, on a dataset with every fault there is."""

import json
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
    """20 good samples, one of each fault, one behind the window, one key and one picture twice, one left out."""
    samples = [(f"good{seed}", good(seed)) for seed in range(20)]
    samples += list(FAULTS.values())
    samples.append(("long", {"json": talk("what", "one " * WINDOW)}))
    samples.append(("unheard", {"json": talk("what " * WINDOW, "one")}))
    samples.append(("good3", {"png": picture(7), "json": talk("<image>again", ATTACK)}))
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


def read_report(output: Path) -> dict[str, Any]:
    return json.loads((output / "report.json").read_text())


def counts(report: Mapping[str, Any]) -> dict[str, int]:
    return {finding["name"]: finding["count"] for finding in report["findings"] if finding["count"]}


def test_every_fault_is_found_and_counted(faulty: Path, checkpoint: Path, tmp_path: Path) -> None:
    options = ("--checkpoint", checkpoint, "--seq-length", WINDOW, "--output", tmp_path, "--workers", 1)
    assert inspect(faulty, *options) == 1
    report = read_report(tmp_path)
    found = counts(report)
    assert found == {
        **dict.fromkeys(FAULTS, 1),
        "nothing_trained": 2,  # silent, unheard
        "longer": 3,  # late, long, unheard
        "text_only": 3,  # text, long, unheard
        "repeated_key": 1,
        "repeated_picture": 1,
    }
