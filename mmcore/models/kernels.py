"""Which kernels compute a model, by what the host has: the one place that decides.

| work | Transformer Engine | a GPU without it | CPU |
|---|---|---|---|
| linear layers, attention, norms | its own; a norm is part of the layer after it | local, over torch | local |
| attention on Hopper | FlashAttention 3 where it is installed, else cuDNN's | local | local |
| their biases | in the matrix product (of tensor ranks' shared outputs after it) | by themselves | by themselves |
| SwiGLU | its kernel, in FP8 giving that at once (`swiglu_between`) | mcore's, compiled by torch | torch |
| quick_gelu, gelu_tanh | its kernels | torch | torch |
| gelu | torch: its kernel is the tanh approximation, and so is mcore's fused one | torch | torch |
| rotary embeddings of a packed row | a kernel that also cuts it apart (`mmcore.models.turn`) | mcore's | mcore's |
| those of others | its kernel, which never asks the GPU for the segments' lengths | mcore's | mcore's |
| weight gradients | added to DDP's buffers by the matrix product (`accumulate_in_place`) | apart | apart |

Alike everywhere: the residual is one addition, since neither dropout nor a bias is left for mcore's fused one; and
mcore's own cross entropy, for Transformer Engine's fused one makes the host wait for the GPU, and mcore's fused one is
compiled anew for each number of positions. In chunks (`mmcore.models.chunks`) it takes less than a hundredth of a step.
"""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu
from megatron.core.transformer.enums import AttnBackend
from torch import Tensor, nn

from mmcore import host
from mmcore.config import ModelConfig

Backend = Literal["local", "transformer_engine"]

ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}

# Compute capability of the first GPUs with matrix products in FP8: L40S, RTX 4090 (Ada); Hopper is 9.0.
FP8_CAPABILITY = (8, 9)
# Of the GPUs that FlashAttention 3 is for: Hopper.
FLASH_ATTENTION_3_CAPABILITY = (9, 0)


class WorkSpaces:
    """Memory for matrix products that are not done by the stream that computes.

    Transformer Engine gives all streams of a GPU one work space, which two at once would overwrite. A graph keeps the
    addresses that it was captured with, so it is enough to give others while it is captured.

    Source: transformer_engine/pytorch/cpp_extensions/gemm.py at 2.11.0, get_cublas_workspace.
    """

    def __init__(self) -> None:
        self._get: Callable[..., Any] | None = None

    @contextlib.contextmanager
    def own(self) -> Iterator[None]:
        """What is captured inside has these."""
        if not (host.has_cuda() and _has_transformer_engine()):
            yield
            return
        gemm: Any = importlib.import_module("transformer_engine.pytorch.cpp_extensions.gemm")
        shared = gemm.get_cublas_workspace
        self._get = self._get or functools.cache(shared.__wrapped__)
        gemm.get_cublas_workspace = self._get
        try:
            yield
        finally:
            gemm.get_cublas_workspace = shared


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a host has."""

    capability: tuple[int, int] | None = None
    """Of its GPU; None where there is none."""
    has_transformer_engine: bool = False
    has_flash_attention_3: bool = False

    @classmethod
    def here(cls) -> "Found":
        return cls(
            capability=host.compute_capability(),
            has_transformer_engine=host.has_cuda() and _has_transformer_engine(),
            has_flash_attention_3=importlib.util.find_spec("flash_attn_3") is not None,
        )


def _has_transformer_engine() -> bool:
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    return True


def resolve_backend(asked: str, found: Found | None = None) -> Backend:
    """What "auto" means on a host.

    Args:
        found: by default what this machine has.
    Raises:
        ValueError: Transformer Engine is asked for and is not there.
    """
    if asked == "local":
        return "local"
    found = found or Found.here()
    fits = found.has_transformer_engine and found.capability is not None
    if asked != "auto" and not fits:
        raise ValueError(
            f"--model.backend {asked} needs a GPU and the package transformer-engine "
            "(pip install 'mmcore[gpu]'); --model.backend local runs anywhere"
        )
    return "transformer_engine" if fits else "local"


def check_kernels(config: ModelConfig, found: Found | None = None) -> None:
    """Refuse kernels that a host does not have, before it is spoken to by others.

    Args:
        found: by default what this machine has.
    Raises:
        ValueError: what is missing, and the mend.
    """
    found = found or Found.here()
    backend = resolve_backend(config.backend, found)
    if config.fp8 == "none":
        return
    if backend == "local" or found.capability is None or found.capability < FP8_CAPABILITY:
        gpu = "no GPU" if found.capability is None else "a GPU of {}.{}".format(*found.capability)
        raise ValueError(
            f"--model.fp8 {config.fp8} needs Transformer Engine and a GPU of compute capability 8.9 or later, such as "
            f"an L40S or H100; here are the {backend} backend and {gpu}. Leave it out, or give none"
        )


def attention_backend(backend: Backend, found: Found | None = None) -> AttnBackend:
    """Which kernels of attention Transformer Engine is to take; also the tower's, for it knows one choice alone.

    FlashAttention 3 where it is: on packed rows on an H200 it took 5 ms less of 27 than cuDNN, which is Transformer
    Engine's own first choice.

    Args:
        found: by default what this machine has.
    """
    found = found or Found.here()
    is_there = found.has_flash_attention_3 and found.capability == FLASH_ATTENTION_3_CAPABILITY
    return AttnBackend.flash if backend != "local" and is_there else AttnBackend.auto


def language_fusions(backend: Backend, *, has_cuda: bool) -> dict[str, Any]:
    """Arguments of mcore's TransformerConfig for layers with SwiGLU and rotary embeddings.

    With `use_te_activation_func` mcore calls what `mmcore.models.specs.mlp_submodules` gives it.
    """
    has_engine = backend != "local"
    return {
        "use_te_activation_func": has_engine,
        # It is compiled as it is imported; on a CPU torch's own silu is faster.
        "bias_activation_fusion": has_cuda and not has_engine,
        "apply_rope_fusion": has_engine,
    }


def activation(name: str, backend: Backend) -> Callable[..., Any]:
    """Of the towers, whose MLPs have no gate: a key of `ACTIVATIONS`, by the fastest kernel that computes just that."""
    if backend == "local" or name not in ("quick_gelu", "gelu_tanh"):
        return ACTIVATIONS[name]
    return _engine_quick_gelu if name == "quick_gelu" else _engine_gelu_tanh


def swiglu(projected: Tensor) -> Tensor:
    """silu(gate) * up by Transformer Engine's kernel: [..., 2 f], the gate first -> [..., f]."""
    output: Tensor = _EngineActivation.apply(projected, "swiglu", None, None)
    return output


def swiglu_between(first: nn.Module, second: nn.Module) -> Callable[[Tensor], Tensor]:
    """The same between two of Transformer Engine's linear layers, in FP8 where they compute in it.

    Each layer would turn what it gets into FP8 by a kernel of its own: the second one the output, the first one the
    gradient of its input. The activation's kernels can write FP8 at once, by the scales that those layers keep.
    """

    def activation(projected: Tensor) -> Tensor:
        output: Tensor = _EngineActivation.apply(projected, "swiglu", *quantizers(first, second))
        return output

    return activation


def quantizers(first: Any, second: Any) -> tuple[Any, Any]:
    """What turns the second layer's input, and the gradient of the first's output, into FP8; None where nothing does.

    A layer has them once it has computed in FP8. These are copies, with the scale and the notes of its range, whose
    results may leave the layer. The kernels of activations write no transpose: a layer makes it where it needs one.
    """
    forward, backward = second.quantizers["scaling_fwd"], first.quantizers["scaling_bwd"]
    if not (_is_fp8() and forward and backward):
        return None, None
    # GEMM1_INPUT and GRAD_OUTPUT1 of Transformer Engine's enumerations.
    chosen = forward[0].copy(), backward[0].copy()
    for quantizer in chosen:
        quantizer.internal = False
        quantizer.set_usage(rowwise=True, columnwise=False)
    return chosen


def _is_fp8() -> bool:
    """Whether layers that are called now compute in FP8."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    return bool(FP8GlobalStateManager.is_fp8_enabled())


def _engine_quick_gelu(hidden: Tensor) -> Tensor:
    output: Tensor = _EngineActivation.apply(hidden, "qgelu", None, None)
    return output


def _engine_gelu_tanh(hidden: Tensor) -> Tensor:
    output: Tensor = _EngineActivation.apply(hidden, "gelu", None, None)
    return output


@functools.cache
def _engine() -> Any:
    """Transformer Engine's kernels themselves; its package has to be imported before."""
    return importlib.import_module("transformer_engine_torch")


class _EngineActivation(torch.autograd.Function):
    """One of Transformer Engine's kernels and the one of its gradient.

    Its module for the same (`transformer_engine.pytorch.ops`) looks for operations to fuse with at every call, which
    costs the host more than the kernel costs the GPU.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, name: str, forward: Any, backward: Any) -> Tensor:
        hidden = hidden.contiguous()
        ctx.save_for_backward(hidden)
        ctx.name, ctx.quantizer = name, backward
        output: Tensor = getattr(_engine(), name)(hidden, forward)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (hidden,) = ctx.saved_tensors
        gradient = getattr(_engine(), f"d{ctx.name}")(gradients[0].contiguous(), hidden, ctx.quantizer)
        return gradient, None, None, None


def with_bias_inside(linear: Any) -> Any:
    """A linear layer of mcore's for Transformer Engine that adds its bias itself, where it can in the matrix product.

    mcore asks such layers to hand their bias on, to be added by a kernel of its own.
    """

    class WithBias(linear):
        gemm_bias_unfused_add: bool

        def __init__(self, *args: Any, skip_bias_add: bool, **kwargs: Any) -> None:
            super().__init__(*args, skip_bias_add=False, **kwargs)
            # Of a layer whose inputs tensor ranks share, the engine adds it after their sum. One rank has the sum.
            self.gemm_bias_unfused_add = self.gemm_bias_unfused_add and self.tp_size > 1

    return WithBias


def accumulate_in_place(model: nn.Module) -> None:
    """Let Transformer Engine's layers add weight gradients to DDP's buffers, instead of handing them to be added.

    For a model that DDP wraps before it is trained. mcore's `gradient_accumulation_fusion` would ask the same of the
    output layer, which is local and needs a kernel of Apex for it.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            setattr(module, "fuse_wgrad_accumulation", True)  # noqa: B010


def without_random_states(attention: Any) -> Any:
    """A core attention of mcore's for Transformer Engine that does not change the generator's state around its kernel.

    It would for dropout, of which there is none here; and a CUDA graph may not.
    """

    class WithoutRandomStates(attention):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for module in (self.flash_attention, self.fused_attention, self.unfused_attention):
                module.attention_dropout_ctx = contextlib.nullcontext

    return WithoutRandomStates
