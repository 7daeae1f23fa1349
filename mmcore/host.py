"""Megatron-core on a machine without CUDA: the only file that touches torch.cuda's names.

Megatron-core asks torch.cuda for its device, streams, events and random state, creates tensors with
device="cuda", and takes Adam from Transformer Engine or Apex. `use_host()` answers all of that with
the CPU. Names are wrapped, not intercepted by a torch-function mode, which would tax every operator.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.utils._device
from torch.optim.adamw import adamw

_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like"),
    *("rand", "randint", "randn", "tensor", "zeros", "zeros_like"),
)


def peak_memory() -> int:
    """Most bytes that this process has held so far: of the GPU's memory where there is one, else of the machine's."""
    if has_cuda():
        return int(torch.cuda.max_memory_allocated())
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def has_cuda() -> bool:
    """Whether this process computes on a GPU."""
    return torch.cuda.is_available()


def compute_capability() -> tuple[int, int] | None:
    """Of this rank's GPU, as (9, 0) of an H100; None on a CPU."""
    return torch.cuda.get_device_capability() if has_cuda() else None


# Dense matrix products in bf16, TFLOP/s, by what the name of a GPU contains, the more special first. Sources:
# NVIDIA's data sheets of the H200 and H100 (SXM: 989, PCIe: 756, NVL: 835), A100 (312), L40S (362), B200 (2250).
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "B200": 2250}


def peak_tflops() -> float | None:
    """What this rank's GPU can do at most, in bf16; None on a CPU or an unknown GPU."""
    name = torch.cuda.get_device_name() if has_cuda() else ""
    return next((float(peak) for kind, peak in PEAK_TFLOPS.items() if kind in name), None)


def tick() -> Any:
    """This moment, in the GPU's queue of work where there is a GPU."""
    if not has_cuda():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first: Any, second: Any) -> float:
    """Between two ticks; waits for the GPU to come there."""
    if not has_cuda():
        return float(second - first)
    second.synchronize()
    return float(first.elapsed_time(second)) / 1e3


def has_passed(moment: Any) -> bool:
    """Whether the GPU has come to a tick already; does not wait for it."""
    return not has_cuda() or bool(moment.query())


class SideStream:
    """A queue of the GPU's work beside the one that computes; on a CPU everything is done at once."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    @contextlib.contextmanager
    def queue(self, *, after: bool = False) -> Iterator[None]:
        """Queue here what is called inside.

        Args:
            after: whether it is to wait for what computes so far.
        """
        if after:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def end(self) -> Any:
        """The end of what is queued here so far."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return event


class Captured:
    """A function's work on the GPU, noted once and done again by one call: a CUDA graph. On a CPU the function itself.

    The function must not wait for the GPU, and must read the same memory each time.
    """

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], example: torch.Tensor) -> None:
        """
        Args:
            example: of the shape that is computed; the first dimension may be used in part.
        """
        self._input, self._graph = example.clone(), None
        if not has_cuda():
            self._output, self._function = function(self._input), function
            return
        side = torch.cuda.Stream()  # what is made at a first call, such as work spaces, is not part of the graph
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                function(self._input)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # Threads, such as NCCL's, may go on with what a capture forbids.
        with torch.cuda.graph(self._graph, pool=_graph_memory(), capture_error_mode="thread_local"):
            self._output = function(self._input)

    def run(self, inputs: torch.Tensor) -> torch.Tensor:
        """Of inputs [n, ...] the first n of the outputs, as a tensor of their own."""
        self._input[: len(inputs)].copy_(inputs)
        if self._graph:
            self._graph.replay()
        else:
            self._output = self._function(self._input)
        return self._output[: len(inputs)].clone()


class CapturedPass:
    """A forward and a backward pass, noted once and done again by one call each. On a CPU the function and autograd.

    The function must not wait for the GPU, and must read the same memory each time.
    """

    def __init__(
        self,
        function: Callable[..., torch.Tensor],
        inputs: Iterable[torch.Tensor],
        sums: Iterable[tuple[torch.Tensor, torch.Tensor]] = (),
    ) -> None:
        """
        Args:
            function: of the inputs, the first of which gets a gradient.
            inputs: of the shapes that are computed.
            sums: other leaves that the function reads, each with what its gradient is added to in the backward pass.
        """
        self._function, self._sums = function, tuple(sums)
        self._inputs = [one.detach().clone() for one in inputs]
        self._inputs[0].requires_grad_()
        self._output = self._gradient = self._input_gradient = self._inputs[0]  # until they are computed
        self._graphs: tuple[Any, ...] = ()
        if not has_cuda():
            return
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, pool=_pass_memory(), capture_error_mode="thread_local"):
            self._compute()
        self._gradient = torch.empty_like(self._output)
        with torch.cuda.graph(backward, pool=_pass_memory(), capture_error_mode="thread_local"):
            self._go_back()
        self._output = self._output.detach()  # what was kept for the backward pass lies in the graphs' memory
        self._graphs = forward, backward

    def _compute(self) -> None:
        with torch.enable_grad():
            self._output = self._function(*self._inputs)

    def _go_back(self) -> None:
        leaves = (self._inputs[0], *(leaf for leaf, _ in self._sums))
        self._input_gradient, *others = torch.autograd.grad(self._output, leaves, self._gradient, allow_unused=True)
        for gradient, (_, total) in zip(others, self._sums, strict=True):
            if gradient is not None:
                total.add_(gradient)

    def forward(self, inputs: Iterable[torch.Tensor]) -> torch.Tensor:
        """The output, a tensor of its own. The backward pass must come before the next forward pass of any."""
        with torch.no_grad():
            for own, given in zip(self._inputs, inputs, strict=True):
                own.copy_(given)
        if self._graphs:
            self._graphs[0].replay()
        else:
            self._compute()
        return self._output.detach().clone()

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of the first input, a tensor of its own."""
        if self._graphs:
            self._gradient.copy_(gradient)
            self._graphs[1].replay()
        else:
            self._gradient = gradient
            self._go_back()
        return self._input_gradient.clone()


@functools.cache
def _pass_memory() -> Any:
    """Shared by the passes, of which one is under way at a time."""
    return torch.cuda.graph_pool_handle()


@functools.cache
def _graph_memory() -> Any:
    """Shared by all graphs: they run one after the other, and what they give is copied."""
    return torch.cuda.graph_pool_handle()


def wait_for(end: Any, tensors: Iterable[torch.Tensor]) -> None:
    """Let the GPU's work from here on wait for the end of a side stream's; the host does not.

    Args:
        tensors: what was made there and is used here, so that its memory is not given away before.
    """
    stream = torch.cuda.current_stream()
    stream.wait_event(end)
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(stream)


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """Bring a tensor of the CPU to this rank's device, to a GPU by way of pinned memory: the host does not wait."""
    if not has_cuda() or tensor.is_cuda:
        return tensor
    return tensor.pin_memory().to(device(), non_blocking=True)


def device() -> torch.device:
    """Where this rank's tensors live."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def communication_backend(local_world_size: int) -> str:
    """Of torch.distributed: NCCL, but it refuses ranks that share a GPU.

    Args:
        local_world_size: ranks on this machine.
    """
    if not has_cuda():
        return "gloo"
    # Slurm may show each of its tasks one GPU alone (--gpus-per-task), and says how many they have together.
    num_gpus = max(torch.cuda.device_count(), int(os.environ.get("SLURM_GPUS_ON_NODE", 0)))
    return "nccl" if local_world_size <= num_gpus else "gloo"


def set_device(local_rank: int) -> None:
    """Take the GPU of this rank; nothing on the CPU."""
    if has_cuda():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())


def quiet() -> None:
    """Drop what the libraries say at import and cannot be acted on; keep their errors."""
    os.environ.setdefault("NVTE_FRAMEWORK", "pytorch")
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.|multistorageclient|transformer_engine")
    warnings.filterwarnings("ignore", message=r".*(Apex|Transformer Engine|transformer_engine|pin_memory).*")
    for name in ("torch.utils.cpp_extension", "megatron", "torch.distributed", "multistorageclient"):
        logging.getLogger(name).setLevel(logging.ERROR)


@functools.cache
def use_host() -> None:
    """Let megatron-core run where it is. Call it before megatron-core is imported; idempotent."""
    quiet()
    if has_cuda():
        if not any(importlib.util.find_spec(name) for name in ("transformer_engine", "apex")):
            _replace_adam()
        return
    assert "megatron.core" not in sys.modules, "import mmcore.host and call use_host() before anything of megatron.core"
    _replace_cuda()
    _replace_factories()
    # Megatron-core compiles its fusions as it is imported; here that would want a C++ compiler and half a minute.
    setattr(torch, "compile", lambda function=None, **_: function or (lambda function: function))  # noqa: B010
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    random.CudaRNGStatesTracker.fork = _fork
    _replace_adam()


class _Nothing:
    """A stream or event of a machine that has none: every method is a no-op."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None

    def __enter__(self) -> "_Nothing":
        return self

    def __exit__(self, *_: Any) -> None: ...


def _replace_cuda() -> None:
    cuda: Any = torch.cuda
    for name in ("synchronize", "empty_cache", "set_device", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *_, **__: None)
    for name in ("Stream", "Event", "stream", "current_stream", "default_stream"):
        setattr(cuda, name, _Nothing)
    cuda.current_device = lambda: "cpu"
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    to, kind, names = (
        tensor.to,
        tensor.type,
        {torch.float32: "Float", torch.float16: "Half", torch.bfloat16: "BFloat16"},
    )

    @functools.wraps(to)
    def to_host(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = tuple("cpu" if _is_cuda(argument) else argument for argument in args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return to(self, *args, **kwargs)

    @functools.wraps(kind)
    def cuda_type(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        # The distributed optimizer sorts parameters by the names of CUDA tensor types.
        if dtype is None and self.dtype in names:
            return f"torch.cuda.{names[self.dtype]}Tensor"
        return kind(self, **kwargs) if dtype is None else kind(self, dtype, **kwargs)

    tensor.to, tensor.type = to_host, cuda_type


def _is_cuda(place: Any) -> bool:
    return (isinstance(place, str) and place.startswith("cuda")) or (
        isinstance(place, torch.device) and place.type == "cuda"
    )


def _replace_factories() -> None:
    # `with torch.device("meta")` knows the factories by identity: let it note them before they change.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_host(getattr(torch, name)))


def _on_host(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def on_host(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return on_host


@contextlib.contextmanager
def _fork(self: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """`CudaRNGStatesTracker.fork` where the GPU's generator is the CPU's, which may therefore change."""
    if name not in self.states_:
        raise KeyError(f"random state {name!r} was never added")
    outside = torch.get_rng_state()
    torch.set_rng_state(self.states_[name])
    try:
        yield
    finally:
        self.states_[name] = torch.get_rng_state()
        torch.set_rng_state(outside)


class Adam(torch.optim.Optimizer):
    """AdamW with the interface of Apex's and Transformer Engine's FusedAdam.

    The step count lives in the parameter group and a parameter's state is its two moments only: what
    megatron-core's resharding of optimizer state expects. torch's own AdamW keeps a step for every
    parameter, and loading at another layout fails on it.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay (Loshchilov and Hutter, arXiv:1711.05101).
        adam_w_mode: FusedAdam's name for decoupled decay, which megatron-core passes.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        assert adam_w_mode, "only decoupled weight decay is written here"
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                    self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
            beta1, beta2 = group["betas"]
            adamw(
                parameters,
                [parameter.grad for parameter in parameters],
                [self.state[parameter]["exp_avg"] for parameter in parameters],
                [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
                [],
                [torch.tensor(float(group["step"] - 1)) for _ in parameters],
                foreach=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def _l2_norm(chunk_size: int, noop: Any, tensors: list[list[torch.Tensor]], per_tensor: bool) -> Any:
    """The norm of all in float32, whatever they are in, as Apex's: megatron-core's own rounds it to bf16 with them."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors[0]]
    return torch.stack(norms).norm().reshape(1), None


def _replace_adam() -> None:
    import megatron.core.optimizer as optimizer
    from megatron.core.optimizer import clip_grads, distrib_optimizer

    clip_grads.l2_norm_impl = _l2_norm

    optimizer.Adam = Adam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = Adam
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_TE_OPTIMIZER = True
