"""How long ranks wait for each other, and where they do so for as long as it takes."""

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mmcore import distributed
from mmcore.config import ParallelConfig
from tests import ranks


def timeouts() -> list[timedelta]:
    groups = [dist.group.WORLD, parallel_state.get_tensor_model_parallel_group()]
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


def test_the_timeout_is_an_option() -> None:
    layout = ParallelConfig(tensor_model_parallel_size=2, distributed_timeout_minutes=7)
    assert ranks.run(timeouts, layout, 2) == [[timedelta(minutes=7)] * 2] * 2
    with pytest.raises(ValueError, match="distributed-timeout-minutes must be above 0"):
        ParallelConfig(distributed_timeout_minutes=0)


def test_a_meeting_takes_as_long_as_it_takes(tmp_path: Path) -> None:
    """Longer than the timeout of collectives; and nobody goes on before the last one is there."""

    def met() -> list[bool]:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
        seen = []
        for late in (0, 1, 2):
            if dist.get_rank() == late:
                time.sleep(1.5)
                (tmp_path / str(late)).touch()
            distributed.meet()
            seen.append((tmp_path / str(late)).exists())
        return seen

    assert ranks.run(met, ParallelConfig(), 3) == [[True] * 3] * 3
    ranks.run(distributed.meet, ParallelConfig(), 1)


def test_the_largest_of_all_ranks() -> None:
    def found() -> list[float]:
        rank = dist.get_rank()
        return distributed.largest((2**40 + rank, 0.1 - rank))

    assert ranks.run(found, ParallelConfig(), 2) == [[2**40 + 1, 0.1]] * 2
