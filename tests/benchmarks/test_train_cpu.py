"""The training's benchmark runs: both sides train the same model, and it would be seen if they did not."""

from pathlib import Path
from typing import Any

import pytest
import transformers.models.llava.modeling_llava  # noqa: F401  (here once, not in the rank)

from benchmarks import train_cpu
from benchmarks.train_cpu import ALONE, OURS, PADDED, Side
from mmcore.config import ParallelConfig
from mmcore.models.architecture import LanguageArch, VisionArch
from tests import ranks

VISION = VisionArch(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, image_size=28, patch_dim=7)
LANGUAGE = LanguageArch(
    model_type="llama",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=2,
    num_query_groups=2,
    kv_channels=32,
    vocab_size=256,
    max_position_embeddings=1024,
)


def measured(folder: Path) -> dict[str, dict[str, Any]]:
    arch = train_cpu.architecture(VISION, LANGUAGE)
    train_cpu.write_model(arch, folder)
    return {stage: train_cpu.measure(arch, folder, freeze, 5, 1) for stage, freeze in train_cpu.FREEZES.items()}


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = ranks.run(measured, ParallelConfig(), 1, tmp_path / "model")[0]
    for result in results.values():
        assert 0 < result["largest_difference"] < train_cpu.MAX_DIFFERENCE
        assert result["padding"][OURS] == result["padding"][ALONE] == 0 < result["padding"]["transformers, 16 padded"]
        assert all(taken > 0 for taken in result["ms_per_step"].values())
    train_cpu.report(results)
    table = capsys.readouterr().out
    assert all(name in table for name in (OURS, *PADDED, *train_cpu.FREEZES))


def test_another_loss_is_seen() -> None:
    same, other = (Side(step=lambda _, loss=loss: loss, rows=len) for loss in (2.0, 2.0002))
    assert train_cpu.check_losses({OURS: same, ALONE: same}, [[]]) == 0
    with pytest.raises(RuntimeError, match=r"step 1: the losses are .*2.0002"):
        train_cpu.check_losses({OURS: same, ALONE: other}, [[]])


def test_the_bar_is_that_of_padded_batches() -> None:
    times = {OURS: 10.0, ALONE: 5.0, "transformers, 4 padded": 12.0, "transformers, 16 padded": 30.0}
    assert train_cpu.ratio({"ms_per_step": times}) == 1.2
