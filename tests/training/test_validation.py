"""The loss on the val split, from files to its numbers by source."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmcore.config import DataConfig, ParallelConfig, RunConfig, TrainConfig
from mmcore.constants import TOKENIZER_DIR
from mmcore.training.loop import validation_loss
from mmcore.training.optimizer import wrap
from tests import ranks, tiny
from tests.data import fabricated

SIZES = {"large": 16, "small": 8}


def losses(parallel: ParallelConfig, config: RunConfig, root: Path) -> Any:
    language = replace(tiny.LANGUAGE, vocab_size=300)
    arch = replace(tiny.architecture(), language=language, image_token_id=300)
    return validation_loss(wrap(tiny.build(parallel, arch=arch)), config, arch, root)


def test_losses_of_two_sources(tmp_path: Path) -> None:
    """Each source's is what it is alone, all of them together the mean by tokens; so at every layout."""
    fabricated.write_tokenizer(tmp_path / TOKENIZER_DIR)
    for name, size in SIZES.items():
        fabricated.write_shards(tmp_path / name, size, split="val")
    parts = [{"repetitions": 1, "path": str(tmp_path / name)} for name in SIZES]
    blend = {
        "__module__": "megatron.energon",
        "__class__": "MetadatasetV2",
        "splits": {"val": {"blend_epochized": parts}},
    }
    (tmp_path / "blend.yaml").write_text(yaml.safe_dump(blend))

    def run(path: str, val_batches: int, layout: ParallelConfig, world_size: int) -> Any:
        config = RunConfig(
            parallel=layout,
            data=DataConfig(path=path, num_workers=0, num_streams=2, seq_length=64, packing_buffer_size=0),
            train=TrainConfig(global_batch_size=8, micro_batch_size=2, val_batches=val_batches),
        )
        return ranks.run(losses, layout, world_size, layout, config, tmp_path)[0]

    alone = {name: run(str(tmp_path / name), size // 8, ParallelConfig(), 1)[0] for name, size in SIZES.items()}
    for layout, world_size in ((ParallelConfig(), 2), (ParallelConfig(pipeline_model_parallel_size=2), 2)):
        total, sources = run(str(tmp_path / "blend.yaml"), 3, layout, world_size)
        assert list(sources) == list(SIZES) and total.num_samples == 24
        for name, size in SIZES.items():
            share, expected = sources[name], alone[name]
            assert (share.num_samples, share.num_tokens) == (size, expected.num_tokens)
            assert share.loss == pytest.approx(expected.loss, rel=1e-6)
        mean = sum(share.loss * share.num_tokens for share in sources.values()) / total.num_tokens
        assert total.loss == pytest.approx(mean, rel=1e-12)
