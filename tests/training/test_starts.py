"""What a job says of itself when it starts, alike at every layout."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmcore.config import CheckpointConfig, ParallelConfig, RunConfig, StageConfig, TrainConfig
from mmcore.models.parameters import num_parameters
from mmcore.training.starts import trainable_sizes, write_start
from tests import ranks, tiny


def started(layout: ParallelConfig, root: Path) -> dict[str, Any]:
    sizes = trainable_sizes(tiny.build(layout))
    stages = (StageConfig(until=2, freeze=("vision_model", "language_model")), StageConfig(freeze=(r".*\.bias",)))
    config = RunConfig(
        parallel=layout, train=TrainConfig(steps=4, stages=stages), checkpoint=CheckpointConfig(save=str(root))
    )
    if ranks.distributed.is_main():
        write_start(3, config, tiny.architecture(), sizes)
        write_start(4, config, tiny.architecture(), sizes)  # all is done: it trains nothing
    return sizes


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2)], ids=["tp1", "tp2", "pp2"])
def test_parameters_are_counted_once(layout: tuple[int, int], tmp_path: Path) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=layout[0], pipeline_model_parallel_size=layout[1])
    sizes = ranks.run(started, parallel, layout[0] * layout[1], parallel, tmp_path)
    assert all(of_rank == sizes[0] for of_rank in sizes)
    counts = num_parameters(tiny.architecture())
    for part in ("vision_projection", "language_model"):
        assert sum(numel for name, numel in sizes[0].items() if name.startswith(part)) == counts[part]
    (row,) = map(json.loads, (tmp_path / "starts.jsonl").read_text().splitlines())
    biases = sum(numel for name, numel in sizes[0].items() if name.endswith(".bias"))
    assert row["trained"] == [counts["vision_projection"], sum(sizes[0].values()) - biases] and biases > 0
    assert (row["step"], row["parameters"], row["device"]) == (3, counts, "cpu")
    assert (row["world_size"], row["data_parallel_size"]) == (layout[0] * layout[1], 1)
    assert row["config"]["train"]["stages"][0]["until"] == 2
