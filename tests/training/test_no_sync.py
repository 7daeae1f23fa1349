"""From a batch's arrival to the update the host waits for the device once: all that would make it wait is watched."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch.utils._python_dispatch import TorchDispatchMode

from mmcore import distributed, host
from mmcore.config import OptimizerConfig, ParallelConfig
from mmcore.data.batch import Batch, collate, with_image_positions
from mmcore.models.interleaved import build_model
from mmcore.models.llava import base_config
from mmcore.models.splice import splice
from mmcore.training import freezing, step
from mmcore.training.loss import token_loss
from mmcore.training.optimizer import build_optimizer, build_scheduler, wrap
from mmcore.training.step import train_step
from tests import ranks, tiny
from tests.models.test_pictures import ANYRES, SIZES, anyres_sample

# Operators whose result's shape, or the host's next line, depends on numbers that the device has.
OPERATORS = (
    *("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique", "_unique", "_unique2"),
    *("unique_dim", "unique_consecutive", "bincount", "repeat_interleave", "masked_scatter_backward"),
)
METHODS = ("item", "tolist", "numpy", "cpu", "__int__", "__float__", "__bool__", "__index__")
# Numbers of the host that are brought to the device: not being pinned, they too make it wait.
FACTORIES = ("tensor", "as_tensor")
# What a GPU does not run: Transformer Engine's attention, rotary embeddings, optimizer and norms take their places.
ONLY_ON_CPU = {
    "mmcore/models/attention.py:_packed",
    "mmcore/host.py:step",
    "core/utils.py:local_multi_tensor_l2_norm",
    "core/models/common/embeddings/rope_utils.py:_apply_rotary_pos_emb_thd",
}
# Ours, and megatron-core's, which the other may hold: a checkout may be named as it likes, with its environment inside.
PACKAGES = [Path(module.__file__).parent for module in (parallel_state, host)]
CULPRITS = ("spoiled_loss", "spoiled_splice")  # below


def place() -> str:
    """The function that does what was seen; torch, this file and `mmcore.host`'s wrappers of torch are passed over."""
    frame: Any = sys._getframe(2)
    between = (str(Path(torch.__file__).parent), __file__)
    while frame.f_code.co_filename.startswith(between) or frame.f_code.co_name == "on_host":
        if frame.f_code.co_name in CULPRITS:
            break
        frame = frame.f_back
    path = frame.f_code.co_filename
    package = next((folder for folder in PACKAGES if path.startswith(str(folder))), Path(path).parent)
    return f"{Path(path).relative_to(package.parent)}:{frame.f_code.co_name}"


class Operators(TorchDispatchMode):
    """Sees what autograd runs too."""

    def __init__(self, seen: Counter[tuple[str, str]]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name != "index" and by_mask:
            by_mask = args[2].numel() > 1  # one number is filled in by the mask
        if by_mask or (name in OPERATORS and not (kwargs or {}).get("output_size")):
            self.seen[place(), name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def watched() -> Iterator[Counter[tuple[str, str]]]:
    """Everything inside that would make the host wait, by where and what, as often as it was done."""
    seen: Counter[tuple[str, str]] = Counter()

    def counting(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if name not in FACTORIES or kwargs.get("device"):
                seen[place(), name] += 1
            return function(*args, **kwargs)

        return counted

    names = [(torch.Tensor, name) for name in METHODS] + [(torch, name) for name in FACTORIES]
    before = [getattr(owner, name) for owner, name in names]
    for (owner, name), function in zip(names, before, strict=True):
        setattr(owner, name, counting(function, name))
    try:
        with Operators(seen):
            yield seen
    finally:
        for (owner, name), function in zip(names, before, strict=True):
            setattr(owner, name, function)


def batches(kind: str) -> list[Batch]:
    """As they arrive: what has to be looked for was looked for on the host."""
    if kind == "anyres":
        found = [collate([anyres_sample(seed, size) for seed, size in enumerate(SIZES)])]
    else:
        found = [tiny.batch(0, 3, images=2), tiny.batch(3, 2, images=0)]
    return [with_image_positions(batch, tiny.LANGUAGE.vocab_size) for batch in found]


def waits(layout: ParallelConfig, kind: str, states: Any = "full", frozen: tuple[str, ...] = ()) -> dict[Any, int]:
    """Of the second of two steps: the first fills what is kept from step to step."""
    dtype = torch.bfloat16 if states == "lean" else torch.float32
    model = tiny.build(layout, arch=ANYRES if kind == "anyres" else tiny.architecture(), dtype=dtype).to(dtype)
    freezing.freeze(model, frozen)
    ddp = wrap(model, layout, states)
    config = OptimizerConfig(lr=2e-3, clip_grad=1e-3, states=states)
    optimizer = build_optimizer(config, ddp)
    scheduler = build_scheduler(config, optimizer, 10)
    given = batches(kind)
    train_step(ddp, optimizer, scheduler, given)
    with watched() as seen:
        train_step(ddp, optimizer, scheduler, given)
    return {what: count for what, count in seen.items() if what[0] not in ONLY_ON_CPU}


ONCE = {("mmcore/training/step.py:train_step", "tolist"): 1}


@pytest.mark.skipif(host.has_cuda(), reason="a GPU watches itself: test_a_gpu_is_waited_for_once")
@pytest.mark.parametrize(
    ("size", "layout", "options"),
    [
        (1, {}, {"kind": "pictures"}),
        (1, {}, {"kind": "anyres", "frozen": ("vision_model", "language_model")}),
        (1, {}, {"kind": "pictures", "states": "lean"}),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, {"kind": "pictures"}),
    ],
    ids=["alone", "frozen tiles", "lean", "tp2sp"],
)
def test_a_step_waits_once(size: int, layout: dict[str, Any], options: dict[str, Any]) -> None:
    parallel = ParallelConfig(**layout)
    for found in ranks.run(_waits, parallel, size, parallel, options):
        assert found == ONCE


def _waits(layout: ParallelConfig, options: dict[str, Any]) -> dict[Any, int]:
    return waits(layout, **options)


def on_gpu() -> int:
    """Steps of the engine's kernels, with torch on the watch but for the one reading."""
    layout, mode = ParallelConfig(), torch.cuda.set_sync_debug_mode
    base = base_config(layout, torch.bfloat16)
    ddp = wrap(build_model(tiny.architecture(), "auto", **base).to(host.device(), torch.bfloat16), layout)
    config = OptimizerConfig(lr=2e-3)
    optimizer = build_optimizer(config, ddp)
    scheduler = build_scheduler(config, optimizer, 10)
    given = [distributed.broadcast_in_replica(batch) for batch in batches("pictures")]
    train_step(ddp, optimizer, scheduler, given)  # the first fills what is kept from step to step
    readings: list[float] = []

    def judge(*numbers: float) -> str:
        readings.extend(numbers)
        mode("error")
        return ""

    mode("error")
    train_step(ddp, optimizer, scheduler, given, judge, lambda: mode("default"))
    mode("default")
    return len(readings)


@pytest.mark.skipif(not host.has_cuda(), reason="wants a GPU")
def test_a_gpu_is_waited_for_once() -> None:
    assert ranks.run(on_gpu, ParallelConfig(), 1) == [2]


def spoiled_loss(batch: Batch, losses: torch.Tensor, **window: Any) -> Any:
    losses.sum().item()
    losses[losses > 0]
    return token_loss(batch, losses, **window)


def spoiled_splice(text: torch.Tensor, images: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    if positions.sum() > 0:
        text = text * torch.tensor(1.0, device=text.device)
    mask = torch.zeros(text.shape[:2], dtype=torch.bool).index_fill(0, positions, True)
    spliced: torch.Tensor = splice(text, images, positions)
    return spliced.masked_scatter(mask[:, :, None], images)  # whose gradient is selected by the mask


def spoiled() -> dict[Any, int]:
    import mmcore.models.llava as llava

    step.token_loss, llava.splice = spoiled_loss, spoiled_splice  # type: ignore
    return waits(ParallelConfig(), "pictures")


@pytest.mark.skipif(host.has_cuda(), reason="a GPU watches itself")
def test_whoever_waits_is_seen() -> None:
    (found,) = ranks.run(spoiled, ParallelConfig(), 1)
    by_name: Counter[str] = Counter()
    for (_, what), count in found.items():
        by_name[what] += count
    assert by_name["item"] == by_name["index"] == by_name["masked_scatter_backward"] == by_name["__bool__"] == 2
    assert by_name["tensor"] == 1 and found[next(iter(ONCE))] == 1


def test_placeholders_are_found_on_the_host() -> None:
    batch = tiny.batch(0, 3, images=2)
    assert batch.image_positions is None
    found = with_image_positions(batch, tiny.LANGUAGE.vocab_size)
    assert found.image_positions is not None and len(found.image_positions) == 3 * 2 * 4
    assert (found.tokens[0, found.image_positions] == tiny.LANGUAGE.vocab_size).all()
