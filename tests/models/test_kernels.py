"""What is fused on which host, and who computes in FP8: decisions, made here for hosts that are not here."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.enums import AttnBackend
from torch import nn

from mmcore.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from mmcore.models import kernels
from mmcore.models.kernels import (
    Found,
    activation,
    attention_backend,
    check_kernels,
    language_fusions,
    resolve_backend,
)
from mmcore.training import loop
from tests import ranks, tiny

CPU = Found()
H200 = Found(capability=(9, 0), has_transformer_engine=True)
A100 = replace(H200, capability=(8, 0))
BARE_H200 = replace(H200, has_transformer_engine=False)


@pytest.mark.parametrize(
    ("found", "backend"),
    [(CPU, "local"), (BARE_H200, "local"), (A100, "transformer_engine"), (H200, "transformer_engine")],
)
def test_auto_takes_what_is_there(found: Found, backend: str) -> None:
    assert resolve_backend("auto", found) == backend
    assert resolve_backend("local", found) == "local"
    if backend == "local":
        with pytest.raises(ValueError, match=r"--model.backend transformer_engine needs a GPU and the package"):
            resolve_backend("transformer_engine", found)
        with pytest.raises(ValueError, match=r"needs a GPU and the package"):
            check_kernels(ModelConfig(backend="transformer_engine"), found)


def test_flash_attention_3_is_taken_where_it_is() -> None:
    installed = replace(H200, has_flash_attention_3=True)
    assert attention_backend("transformer_engine", installed) == AttnBackend.flash
    for backend, found in (
        ("local", installed),
        ("transformer_engine", H200),
        ("transformer_engine", replace(A100, has_flash_attention_3=True)),
    ):
        assert attention_backend(backend, found) == AttnBackend.auto


def test_language_fusions() -> None:
    """At most one of mcore's two ways to a fused activation, which it refuses together."""
    engine = language_fusions("transformer_engine", has_cuda=True)
    assert engine == {"use_te_activation_func": True, "bias_activation_fusion": False, "apply_rope_fusion": True}
    assert {name for name, is_on in language_fusions("local", has_cuda=True).items() if is_on} == {
        "bias_activation_fusion"
    }
    assert not any(language_fusions("local", has_cuda=False).values())


class Engine:
    """Stands in for Transformer Engine's kernels, by what they are documented to compute; notes what is called."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., torch.Tensor]:
        formulas: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "swiglu": lambda x: nn.functional.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
            "qgelu": lambda x: x * torch.sigmoid(1.702 * x),
            "gelu": lambda x: nn.functional.gelu(x, approximate="tanh"),
        }

        def forward(hidden: torch.Tensor, quantizer: None) -> torch.Tensor:
            self.called.append(name)
            return formulas[name](hidden)

        def backward(gradient: torch.Tensor, hidden: torch.Tensor, quantizer: None) -> torch.Tensor:
            assert gradient.is_contiguous() and hidden.is_contiguous()
            self.called.append(name)
            return torch.func.vjp(formulas[name[1:]], hidden)[1](gradient)[0]

        return forward if name in formulas else backward


def activations() -> None:
    engine = Engine()
    kernels._engine = lambda: engine
    for name, called in {"quick_gelu": ["qgelu", "dqgelu"], "gelu_tanh": ["gelu", "dgelu"], "gelu": []}.items():
        results = []
        for backend in ("local", "transformer_engine"):
            hidden = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
            output = activation(name, backend)(hidden.transpose(0, 1))
            output.transpose(0, 1)[..., 1:].square().sum().backward()
            results.append((output, hidden.grad))
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
        assert engine.called == called
        engine.called.clear()
    hidden = torch.randn(5, 8, requires_grad=True)
    kernels.swiglu(hidden).sum().backward()
    gate = hidden.detach()[:, :4].sigmoid()
    torch.testing.assert_close(hidden.grad[:, 4:], gate * hidden.detach()[:, :4])  # of what the gate lets pass
    assert engine.called == ["swiglu", "dswiglu"]


def test_activations() -> None:
    """The engine's kernels in our hands: gradients, strides, and never its tanh for the exact gelu."""
    ranks.run(activations, ParallelConfig(), 1)


class Quantizer:
    """Stands in for Transformer Engine's: a copy shares its scale and has uses of its own."""

    def __init__(self, scale: object) -> None:
        self.scale, self.internal, self.usage = scale, True, (True, True)

    def copy(self) -> "Quantizer":
        return Quantizer(self.scale)

    def set_usage(self, *, rowwise: bool, columnwise: bool) -> None:
        self.usage = rowwise, columnwise


def test_swiglu_writes_fp8_by_the_scales_of_the_layers_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second layer's for its input, the first one's for its gradient, each once it has one."""
    first, second = nn.Linear(4, 8), nn.Linear(4, 4)
    vars(first)["quantizers"] = {"scaling_fwd": {}, "scaling_bwd": {}}
    vars(second)["quantizers"] = {"scaling_fwd": {}, "scaling_bwd": {}}
    asked: list[tuple[str, Any]] = []
    engine: Any = type("", (), {})()
    engine.swiglu = lambda x, quantizer: asked.append(("forward", quantizer)) or x[..., :4] * 1
    engine.dswiglu = lambda g, x, quantizer: asked.append(("backward", quantizer)) or torch.zeros_like(x)
    monkeypatch.setattr(kernels, "_engine", lambda: engine)
    monkeypatch.setattr(kernels, "_is_fp8", lambda: True)
    activation = kernels.swiglu_between(first, second)
    activation(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert asked == [("forward", None), ("backward", None)], "before the layers have any"
    forward, backward = Quantizer("input of the second"), Quantizer("gradient of the first")
    first.quantizers["scaling_bwd"], second.quantizers["scaling_fwd"] = [backward, None], [forward, None, None]
    asked.clear()
    activation(torch.randn(2, 8, requires_grad=True)).sum().backward()
    (_, given), (_, back) = asked
    assert (given.scale, given.internal, given.usage) == (forward.scale, False, (True, False))
    assert (back.scale, back.internal, back.usage) == (backward.scale, False, (True, False))
    assert forward.internal and backward.internal, "the layers' own are as they were"
    monkeypatch.setattr(kernels, "_is_fp8", lambda: False)
    assert kernels.quantizers(first, second) == (None, None)


@pytest.mark.parametrize("ranks_sharing", [1, 2])
def test_bias_inside(ranks_sharing: int) -> None:
    class Linear:  # as Transformer Engine's row-parallel layer sets itself up
        def __init__(self, size: int, *, skip_bias_add: bool) -> None:
            self.te_return_bias, self.tp_size, self.gemm_bias_unfused_add = skip_bias_add, ranks_sharing, True

    layer: Any = kernels.with_bias_inside(Linear)(3, skip_bias_add=True)
    assert not layer.te_return_bias
    assert layer.gemm_bias_unfused_add == (ranks_sharing > 1)


def test_gradients_are_accumulated_by_layers_that_can() -> None:
    one, other = nn.Linear(1, 1), nn.Linear(1, 1)
    one.fuse_wgrad_accumulation = False
    kernels.accumulate_in_place(nn.Sequential(one, other))
    assert one.fuse_wgrad_accumulation is True
    assert not hasattr(other, "fuse_wgrad_accumulation")


@pytest.mark.parametrize("found", [CPU, A100, BARE_H200])
def test_fp8_wants_its_gpu(found: Found) -> None:
    config = ModelConfig(fp8="delayed")
    check_kernels(ModelConfig(), found)
    check_kernels(config, H200)
    check_kernels(config, replace(H200, capability=(8, 9)))
    with pytest.raises(ValueError, match=r"--model.fp8 delayed needs Transformer Engine and a GPU"):
        check_kernels(config, found)


def test_fp8_that_does_not_fit() -> None:
    RunConfig(model=ModelConfig(fp8="tensorwise", fp8_vision=True)).check()
    with pytest.raises(ValueError, match=r"--model.fp8-vision without --model.fp8"):
        RunConfig(model=ModelConfig(fp8_vision=True)).check()
    with pytest.raises(ValueError, match=r"--model.fp8 delayed is for --train.precision bf16"):
        RunConfig(model=ModelConfig(fp8="delayed"), train=TrainConfig(precision="fp32")).check()
    with pytest.raises(ValueError, match=r"and --model.backend local: give bf16 and auto"):
        RunConfig(model=ModelConfig(fp8="delayed", backend="local")).check()


def test_training_asks_before_ranks_meet() -> None:
    config = RunConfig(model=ModelConfig(fp8="tensorwise", checkpoint="x"))
    with pytest.raises(ValueError, match=r"tensorwise needs .* here are the local backend and no GPU"):
        loop.train(config, tiny.architecture())
    assert not dist.is_initialized()
