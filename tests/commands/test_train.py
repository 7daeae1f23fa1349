"""What the command checks and settles before a run begins."""

from dataclasses import replace
from pathlib import Path

import pytest

from mmcore.commands.train import check, parse
from mmcore.config import CheckpointConfig, DataConfig, ModelConfig, RunConfig
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
