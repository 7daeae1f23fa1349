"""What the command checks and settles before a run begins."""

import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from mmcore.checkpoint_files import checkpoint_bytes
from mmcore.commands.train import check, parse
from mmcore.config import CheckpointConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from mmcore.models.architecture import PictureArch, save_architecture
from tests import tiny


def test_the_mode_of_pictures(tmp_path: Path) -> None:
    """Of the checkpoint, unless the run says another; it is not for pictures in tiles, whose mode is given."""
    config = RunConfig(
        model=ModelConfig(checkpoint=str(tmp_path)),
        data=DataConfig(path=str(tmp_path)),
        checkpoint=CheckpointConfig(save=str(tmp_path / "run")),
    )
    padded = replace(config, data=replace(config.data, image_mode="pad"))
    architecture = replace(tiny.architecture(), pictures=PictureArch(mode="squash"))
    save_architecture(architecture, tmp_path)
    assert check(config, 1) == architecture
    assert check(padded, 1) == replace(architecture, pictures=PictureArch(mode="pad"))
    tiles = PictureArch(mode="squash", tiling="dynamic", max_num_tiles=4)
    save_architecture(replace(architecture, pictures=tiles), tmp_path)
    assert check(config, 1).pictures == tiles
    with pytest.raises(ValueError, match="image mode 'pad' with tiling 'dynamic'"):
        check(padded, 1)


def test_the_mode_is_an_option() -> None:
    config, _ = parse(["quickstart_sft", "--data.image-mode", "pad"])
    assert config.data.image_mode == "pad"


def test_too_little_disk_is_said_before_anything_starts(tmp_path: Path) -> None:
    """Two checkpoints that stay and the one being written, of the tiny model."""
    save_architecture(tiny.architecture(), tmp_path)
    config = RunConfig(
        model=ModelConfig(checkpoint=str(tmp_path), freeze=("vision_model",)),
        data=DataConfig(path=str(tmp_path)),
        train=TrainConfig(steps=1_000),
        checkpoint=CheckpointConfig(save=str(tmp_path / "run"), save_interval=1),
    )
    assert check(config, 1)
    size = checkpoint_bytes(tiny.architecture(), ("vision_model",), 2)
    with mock.patch.object(shutil, "disk_usage", lambda folder: mock.Mock(free=3 * size - 1)):
        with pytest.raises(ValueError, match=r"run has too little room: 3 checkpoints of 0\.00162 GB at once"):
            check(config, 1)
        check(replace(config, checkpoint=replace(config.checkpoint, keep_last=1)), 1)
