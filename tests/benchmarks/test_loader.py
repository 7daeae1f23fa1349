"""The loader's benchmark runs, from its data to its table."""

from pathlib import Path

import pytest

from benchmarks import loader
from benchmarks.loader import BARE, LLAVA, OURS, TORCHVISION, WEBDATASET
from benchmarks.loader_peers import files


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data"
    loader.fabricate(folder, 16)
    assert len(files(folder)) == 16
    speeds = {name: loader.speed(name, folder, 0, 16) for name in (BARE, LLAVA, TORCHVISION, WEBDATASET, OURS)}
    assert all(rate > 0 and worked > 0 for rate, worked in speeds.values())
    memory, state = loader.workers_and_state(folder, 0, 16)
    assert memory == []
    restored = loader.restore(folder, 0, state)
    assert min(restored) > 0
    result = {
        "samples_per_second": {"0": {name: rate for name, (rate, _) in speeds.items()}},
        "processor_ms_per_sample": {"0": {name: worked for name, (_, worked) in speeds.items()}},
        "restore_s": {"0": restored[1]},
        "worker_memory_mb": 0.0,
    }
    loader.report(result)
    table = capsys.readouterr().out
    assert all(name in table for name in (*speeds, "restored", "largest worker"))
