"""Where a step's time goes."""

import time
from types import SimpleNamespace

import pytest
import torch

from mmcore import host
from mmcore.config import ParallelConfig
from mmcore.training.step import packed_seq_params
from mmcore.training.timing import ModuleTimes
from tests import ranks, tiny


def timed(frozen: tuple[str, ...]) -> dict[str, float]:
    model = tiny.build(ParallelConfig())
    for name in frozen:
        getattr(model, name).requires_grad_(False)
    slow = {"vision_model": 0.03, "language_model.output_layer": 0.05}
    for name, seconds in slow.items():
        model.get_submodule(name).register_forward_hook(lambda *_, seconds=seconds: time.sleep(seconds))
    times = ModuleTimes(model)
    batch = tiny.batch(0, 2, 1)
    for _ in range(2):  # of a layer's gradients too
        losses = model(
            batch.tokens,
            batch.images,
            labels=batch.labels,
            positions=batch.loss_positions,
            packed_seq_params=packed_seq_params(batch),
        )
        losses.register_hook(lambda _: time.sleep(0.01))  # between two modules
        losses.sum().backward()
    times.mark("optimizer")
    time.sleep(0.02)
    found = times.seconds()
    assert times.seconds().keys() <= {"rest"}
    return found


@pytest.mark.parametrize("frozen", [(), ("vision_model",), ("vision_model", "language_model")])
def test_of_each_module(frozen: tuple[str, ...]) -> None:
    begun = time.perf_counter()
    found = ranks.run(timed, ParallelConfig(), 1, frozen)[0]
    least = {"vision_model": 0.06, "output_layer": 0.1, "rest": 0.02, "optimizer": 0.02}
    assert found.keys() == {"vision_projection", "language_model", *least}
    for name, seconds in least.items():
        assert found[name] >= seconds
    assert sum(found.values()) < time.perf_counter() - begun


def test_a_gpu_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.peak_tflops() is None
    monkeypatch.setattr(host, "has_cuda", lambda: True)
    for name, peak in [("NVIDIA H200", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 80GB HBM3", 989), ("T4", None)]:
        monkeypatch.setattr(torch, "cuda", SimpleNamespace(get_device_name=lambda name=name: name))
        assert host.peak_tflops() == peak
