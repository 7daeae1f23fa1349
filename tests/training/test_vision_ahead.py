"""A frozen tower that sees the pictures of the next micro batch before it is that one's turn: the same numbers."""

from pathlib import Path
from typing import Any

import pytest

from mmcore.config import ModelConfig, ParallelConfig, RunConfig
from mmcore.models.graphs import Graphs
from tests import ranks
from tests.training import operated

AHEAD = ("--model.vision-ahead", "--train.val-interval", 3)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: Any) -> Path:
    return operated.write_inputs(tmp_path_factory.mktemp("inputs"))


def watched(inputs: Path, run: Path, *options: object) -> list[str]:
    """The order of the tower's work and its takers in a run."""
    told: list[str] = []
    begin, take = Graphs.begin, Graphs.take

    def begun(self: Graphs, images: Any, weights: Any) -> None:
        before = len(self._begun)
        begin(self, images, weights)
        told.extend(["begun"] * (len(self._begun) - before))

    def taken(self: Graphs, images: Any) -> Any:
        features = take(self, images)
        told.append("computed" if features is None else "taken")
        return features

    Graphs.begin, Graphs.take = begun, taken  # type: ignore[method-assign]
    no_other = ("--train.replica-check-interval", 0, "--train.steps", 4)
    assert operated.train(inputs, run, *no_other, *options) == 0
    return told


def test_the_same_run(inputs: Path, tmp_path: Path) -> None:
    """Two micro batches a step on each of two replicas, and losses on the val split between steps."""
    told = [
        ranks.run(watched, ParallelConfig(), 2, inputs, tmp_path / name, *options)[0]
        for name, options in (("alone", AHEAD[1:]), ("ahead", AHEAD))
    ]
    assert "begun" not in told[0] and told[1][:4] == ["begun", "begun", "taken", "taken"]
    assert told[1].count("taken") == told[1].count("begun") == 4 * 2, told[1]
    assert operated.log(tmp_path / "alone") == operated.log(tmp_path / "ahead")
    names = ("alone", "ahead")
    last = [{path.name: path.read_bytes() for path in (tmp_path / n / "step_00000004").glob("*.distcp")} for n in names]
    assert last[0] and last[0] == last[1]


def test_where_it_would_do_nothing() -> None:
    model = ModelConfig(vision_ahead=True, freeze=("vision_model",))
    RunConfig(model=model).check()
    with pytest.raises(ValueError, match="is for a frozen vision tower"):
        RunConfig(model=ModelConfig(vision_ahead=True)).check()
    with pytest.raises(ValueError, match=r"does not go with --parallel\.pipeline-model-parallel-size"):
        RunConfig(model=model, parallel=ParallelConfig(pipeline_model_parallel_size=2)).check()
