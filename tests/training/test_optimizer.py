"""Which parameters decay, at which rate each learns, and what may be asked for."""

from typing import Any

import pytest
import torch

from mmcore.config import ModelConfig, OptimizerConfig, ParallelConfig
from mmcore.training.freezing import check_biases, check_names, check_stacks, named_parameters
from mmcore.training.optimizer import build_optimizer, build_scheduler, wrap
from tests import ranks, tiny

LR, DECAY = 1e-2, 0.5


def updated(layout: ParallelConfig, module_lr: tuple[str, ...], *, gradient: float) -> dict[str, tuple[Any, Any]]:
    """Every parameter of this rank before and after one unclipped update with the same gradient everywhere."""
    model = tiny.build(layout)
    ddp = wrap(model)
    config = OptimizerConfig(lr=LR, weight_decay=DECAY, module_lr=module_lr, lr_decay_style="constant", clip_grad=0)
    optimizer = build_optimizer(config, ddp)
    build_scheduler(config, optimizer, 10)
    before = {name: parameter.detach().clone() for name, parameter in named_parameters(model)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.main_grad.fill_(gradient)
    optimizer.step()
    after = {name: parameter.detach().clone() for name, parameter in named_parameters(model) if parameter.requires_grad}
    return {name: (before[name], value) for name, value in after.items()}


def test_norms_and_biases_do_not_decay() -> None:
    (result,) = ranks.run(lambda: updated(ParallelConfig(), (), gradient=0.0), ParallelConfig(), 1)
    kept = {name for name, (before, after) in result.items() if torch.equal(before, after)}
    assert kept == {name for name, (before, _) in result.items() if before.dim() == 1}
    assert {name for name in result if name.endswith("bias") or "norm" in name or "ln_" in name} <= kept
    for name in result.keys() - kept:
        torch.testing.assert_close(result[name][1], result[name][0] * (1 - LR * DECAY))


@pytest.mark.parametrize("layout", [ParallelConfig(), ParallelConfig(pipeline_model_parallel_size=2)])
def test_modules_learn_at_their_own_rate(layout: ParallelConfig) -> None:
    """Adam's first update is the rate itself; layers are counted from the model's first on every stage."""
    rates = ("vision_model=2e-4", r"language_model\.decoder=4e-3", r"language_model\.decoder\.layers\.3=1e-3")
    results = ranks.run(lambda: updated(layout, rates, gradient=1.0), layout, layout.pipeline_model_parallel_size)
    seen = set()
    for name, (before, after) in (item for result in results for item in result.items()):
        rate = LR
        for prefix, other in (("vision_model.", 2e-4), ("language_model.decoder.", 4e-3)):
            rate = other if name.startswith(prefix) else rate
        rate = 1e-3 if name.startswith("language_model.decoder.layers.3.") else rate
        decayed = before * (1 - (rate * DECAY if before.dim() > 1 else 0))
        torch.testing.assert_close(after, decayed - rate, rtol=1e-5, atol=2e-7, msg=name)
        seen.add(rate)
    assert seen == {LR, 2e-4, 4e-3, 1e-3}


def test_rates_follow_one_schedule() -> None:
    def rates() -> list[list[float]]:
        config = OptimizerConfig(lr=1e-3, min_lr=1e-4, lr_warmup_steps=2, module_lr=("vision_model=1e-5",))
        optimizer = build_optimizer(config, wrap(tiny.build(ParallelConfig())))
        scheduler = build_scheduler(config, optimizer, 10)
        found = []
        for _ in range(11):
            found.append(sorted({group["lr"] for group in optimizer.param_groups}))
            scheduler.step(increment=1)
        return found

    (found,) = ranks.run(rates, ParallelConfig(), 1)
    assert found[0] == [0.0] and found[2] == pytest.approx([1e-5, 1e-3]) and found[10] == pytest.approx([1e-6, 1e-4])
    for tower, rest in found[1:]:
        assert tower == pytest.approx(rest / 100)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("vision_model", "not NAME=RATE with a rate above 0"),
        ("vision_model=0", "goes to --model.freeze"),
        ("=1e-3", "not NAME=RATE"),
        ("vison_model=1", "did you mean 'vision_model'"),
    ],
)
def test_rates_that_are_none(entry: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(module_lr=(entry,))


def test_names_that_are_none() -> None:
    for pattern, message in (
        ("vison_model", "did you mean"),
        (r"languagemodel\.x", "parts are"),
        ("(", "not a regular"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelConfig(freeze=(pattern,))
    names = ["vision_model.decoder.layers.0.mlp.bias", "language_model.layers.10.bias", "language_model.layers.1.bias"]
    check_names(names, "--model.freeze", [r"vision.*mlp", r"language_model\.layers\.1", r".*\.bias"])
    for pattern in (r"language_model\.layers\.0", "vision", r"layers\.1"):
        with pytest.raises(ValueError, match=r"--model.freeze .* names nothing in the model"):
            check_names(names, "--model.freeze", [pattern])
    check_stacks(names, "", [r"language_model\.layers\.\d+", "vision_model"])
    with pytest.raises(ValueError, match=r"freezes language_model.layers.\*.bias in some layers alone"):
        check_stacks(names, "--model.freeze", [r"language_model\.layers\.1"])


def test_a_bias_is_not_trained_above_a_frozen_weight() -> None:
    names = [f"vision_model.decoder.layers.0.{name}" for name in ("linear_qkv.weight", "linear_qkv.bias", "norm.bias")]
    check_biases(names, "", [r".*\.linear_qkv"])
    check_biases(names, "", [r".*norm\..*"])
    with pytest.raises(ValueError, match=r"freezes vision_model.decoder.layers.0.linear_qkv.weight and not its bias"):
        check_biases(names, "--model.freeze", [r".*linear_qkv\.weight"])
