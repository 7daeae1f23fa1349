"""Losses of a dataset's samples, packed and sharded, against the plain definition: one sample, one pass, one sum."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from mmcore.config import ParallelConfig
from mmcore.data.dataset import open_dataset
from mmcore.data.shards import ShardWriter
from mmcore.data.task_encoder import build_layout, encode_sample, lay_out
from mmcore.data.tokenizer import load_tokenizer
from mmcore.evaluation import loss
from mmcore.evaluation.loss import SampleLoss
from mmcore.evaluation.scores import EvaluationError
from mmcore.inference.losses import dataset_losses
from mmcore.models.architecture import Architecture, ProjectorArch
from mmcore.models.presets import compose
from tests import ranks, tiny
from tests.data import fabricated

LAYOUTS = {
    "tp2": (ParallelConfig(tensor_model_parallel_size=2), 2),
    "pp2": (ParallelConfig(pipeline_model_parallel_size=2), 2),
    "tp2pp2": (ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), 4),
    "dp2": (ParallelConfig(), 2),
}
# float32 sums in another order; the largest difference seen is 1.3e-7.
CLOSE = 1e-5


def architecture() -> Architecture:
    language = replace(tiny.LANGUAGE, vocab_size=300)
    return replace(compose(tiny.VISION, language, ProjectorArch(ffn_hidden_size=40)), conversation="mistral_instruct")


@pytest.fixture(scope="module")
def data(tmp_path_factory: Any) -> Path:
    """Conversations over pictures, one of them broken, and documents, one too long and one left out; both blended."""
    root = tmp_path_factory.mktemp("losses")
    fabricated.write_tokenizer(root / "tokenizer")
    fabricated.write_shards(root / "pictures", 13, broken=frozenset({3}), split="val")
    with ShardWriter(root / "texts", samples_per_shard=3) as writer:
        for index in range(5):
            text = "one two three " * (200 if index == 1 else index + 1)
            writer.write("val", f"{index:08d}", {"json": json.dumps({"text": text}).encode()})
    split = root / "texts" / loss.SPLIT
    split.write_text(split.read_text().replace("exclude: []", "exclude: [val_000000.tar/00000002]"))
    blend = {"val": {"blend": [{"weight": 3, "path": "./pictures"}, {"weight": 1, "path": "./texts"}]}}
    content = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": blend}
    (root / "blend.yaml").write_text(yaml.safe_dump(content))
    return root


def ours(layout: ParallelConfig, data: Path, max_tokens: int) -> tuple[list[SampleLoss], list[tuple[int, int]]]:
    told: list[tuple[int, int]] = []
    rows = dataset_losses(
        tiny.build(layout, arch=architecture()),
        architecture(),
        load_tokenizer(data / "tokenizer"),
        str(data / "blend.yaml"),
        max_tokens=max_tokens,
        on_progress=lambda done, total: told.append((done, total)),
    )
    return rows, told


@torch.no_grad()
def plain(data: Path) -> dict[str, tuple[float, int]]:
    """Of each sample that can be used: its loss from all logits of a pass of its own, and its trained tokens."""
    model = tiny.build(ParallelConfig(), arch=architecture()).eval()
    pictures = fabricated.pictures(300, background=(0, 0, 0))
    layout = build_layout(load_tokenizer(data / "tokenizer"), "mistral_instruct", pictures, 128)
    found = {}
    for source in open_dataset(str(data / "blend.yaml"), "val").sources:
        for index in range(len(source)):
            raw = source.read(index)
            if raw is None:
                continue
            try:
                sample = encode_sample(raw.key, raw.parts, lay_out(raw.parts, layout), layout)
            except ValueError:
                continue
            logits = model(sample.tokens[None], sample.images)  # [s, v]
            is_trained = sample.loss_mask > 0
            total = F.cross_entropy(logits[is_trained].double(), sample.labels[is_trained], reduction="sum")
            found[f"{source.name}/{raw.shard}/{raw.key}"] = float(total), int(is_trained.sum())
    return found


@pytest.fixture(scope="module")
def expected(data: Path) -> dict[str, tuple[float, int]]:
    found: dict[str, tuple[float, int]] = ranks.run(plain, ParallelConfig(), 1, data)[0]
    assert len(found) == 12 + 4
    return found


@pytest.fixture(scope="module")
def single(data: Path) -> list[SampleLoss]:
    rows, told = ranks.run(ours, ParallelConfig(), 1, ParallelConfig(), data, 100)[0]
    assert told[-1] == (17, 18) and len(told) > 5  # one is left out by the metadata
    return rows


def test_each_sample_has_the_plain_loss(single: list[SampleLoss], expected: dict[str, tuple[float, int]]) -> None:
    good = {row.id: row for row in single if not row.problem}
    assert list(good) == list(expected)
    for name, (total, num_tokens) in expected.items():
        assert good[name].loss_sum == pytest.approx(total, rel=CLOSE), name
        assert good[name].num_tokens == num_tokens > 0
    assert len({round(row.loss_sum, 3) for row in good.values()}) == 16, "the test would not see rows mixed up"


def test_what_cannot_be_used_and_what_is_cut_is_said(single: list[SampleLoss]) -> None:
    broken = [row for row in single if row.problem]
    assert [(row.id, row.num_tokens) for row in broken] == [("pictures/val_000000.tar/00000003", 0)]
    assert "picture" in broken[0].problem
    assert [row.id for row in single if row.was_cut] == ["texts/val_000000.tar/00000001"]
    assert not any("00000002" in row.id for row in single if row.source == "texts")


@pytest.mark.parametrize("max_tokens", [1, 10_000])
def test_a_loss_does_not_depend_on_its_neighbours(data: Path, single: list[SampleLoss], max_tokens: int) -> None:
    rows, told = ranks.run(ours, ParallelConfig(), 1, ParallelConfig(), data, max_tokens)[0]
    assert [row.id for row in rows] == [row.id for row in single]
    for row, one in zip(rows, single, strict=True):
        assert row.loss_sum == pytest.approx(one.loss_sum, rel=CLOSE)
    assert (len(told) > 15) == (max_tokens == 1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_losses(name: str, data: Path, single: list[SampleLoss]) -> None:
    layout, world_size = LAYOUTS[name]
    for rows, _ in ranks.run(ours, layout, world_size, layout, data, 100):
        assert [replace(row, loss_sum=0.0) for row in rows] == [replace(row, loss_sum=0.0) for row in single]
        for row, one in zip(rows, single, strict=True):
            assert row.loss_sum == pytest.approx(one.loss_sum, rel=CLOSE), name


def test_the_file_is_scored_without_a_model(data: Path, single: list[SampleLoss], tmp_path: Path) -> None:
    loss.write_losses(tmp_path / "p.jsonl", single)
    scores = loss.score(tmp_path / "p.jsonl", data / "blend.yaml", options={"split": "val"})
    total, tokens = sum(row.loss_sum for row in single), sum(row.num_tokens for row in single)
    assert scores.metrics["loss"] == pytest.approx(total / tokens, rel=1e-12)
    assert {name: group.num_samples for name, group in scores.groups["source"].items()} == {"pictures": 12, "texts": 4}
    assert (scores.counts["skipped"], scores.counts["cut"], scores.size) == (1, 1, 16)
    with pytest.raises(EvaluationError, match="of texts 4 samples where the split has 0"):
        loss.score(tmp_path / "p.jsonl", data / "pictures", options={"split": "val"})


def test_sources_are_named_and_counted_as_they_are_read(data: Path) -> None:
    """The scorer reads a dataset's metadata without its reader, which needs torch."""
    parts = [{"path": "pictures"}, {"path": "blend.yaml"}]
    content = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": {"val": {"blend": parts}}}
    path = data / "nested.yaml"
    path.write_text(yaml.safe_dump(content))
    sources = open_dataset(str(path), "val").sources
    read = {source.name: sum(source.read(index) is not None for index in range(len(source))) for source in sources}
    assert loss.count_samples(path, "val") == read == {"pictures_0": 13, "pictures_1": 13, "texts": 4}
