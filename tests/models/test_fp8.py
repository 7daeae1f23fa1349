"""What FP8 asks of lengths and of frozen weights, where all else is computed as without it.

mcore enters FP8 only where Transformer Engine is: here a model that is built for it pads and marks as on a GPU, and its
matrix products stay what they are.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from mmcore.config import ParallelConfig
from mmcore.models.llava import LlavaModel, base_config
from mmcore.training import freezing
from mmcore.training.step import forward_step
from tests import ranks, tiny

LAYOUTS = {
    "one": (ParallelConfig(), 1),
    "tp2sp": (ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True), 2),
    "cp2": (ParallelConfig(context_parallel_size=2), 2),
}


def build(layout: ParallelConfig, fp8: str) -> LlavaModel:
    base = base_config(layout, fp8=fp8)
    model = LlavaModel(tiny.architecture(), "local", fp8_vision=fp8 != "none", **base)
    model.load_state_dict(tiny.build(layout).state_dict())
    return model


def step(layout: ParallelConfig, fp8: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], set[int]]:
    """Losses, gradients, and how many tokens the layers' matrix products had."""
    model = build(layout, fp8)
    tokens = set()
    for name, module in model.named_modules():
        if name.endswith((".linear_fc1", ".linear_qkv")) and "projection" not in name:
            module.register_forward_pre_hook(lambda _, args: tokens.add(args[0].shape[0] * args[0].shape[1]))
    losses, to_loss = forward_step(iter([tiny.batch(0, 3)]), model)
    to_loss(losses)[0].backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad
            if getattr(parameter, "sequence_parallel", False):  # of this rank's positions, which padding moves
                dist.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())
    return losses.detach(), found, tokens


def both(layout: ParallelConfig) -> None:
    losses, gradients, tokens = step(layout, "none")
    assert any(count % 16 for count in tokens)
    padded, found, tokens = step(layout, "delayed")
    assert not any(count % 16 for count in tokens)
    torch.testing.assert_close(padded, losses, rtol=1e-5, atol=1e-6)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        rounding = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=rounding, msg=name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_padding_changes_nothing(name: str) -> None:
    layout, world_size = LAYOUTS[name]
    ranks.run(both, layout, world_size, layout)


def configs() -> list[tuple[Any, ...]]:
    found = []
    for fp8 in ("none", "delayed", "tensorwise"):
        model = build(ParallelConfig(), fp8)
        parts = (model.language_model, model.vision_model, model.vision_projection)
        found.append(tuple(part.config.fp8 and (part.config.fp8, part.config.fp8_recipe) for part in parts))
    return found


def test_recipes() -> None:
    """The tower is frozen in most runs, where delayed scaling would learn nothing; the projector stays out of it."""
    tower = ("hybrid", "tensorwise")
    assert ranks.run(configs, ParallelConfig(), 1) == [
        [(None, None, None), (("hybrid", "delayed"), tower, None), (tower, tower, None)]
    ]


def marked(model: LlavaModel) -> set[str]:
    """What turns its weight into FP8 in this step; a forward pass takes the mark away."""
    model.set_is_first_microbatch()
    found = set()
    for name, module in model.named_modules():
        if getattr(module, "is_first_microbatch", False):
            module.is_first_microbatch = False
            found.add(name.split(".")[0])
    return found


def quantizations() -> list[set[str]]:
    model = build(ParallelConfig(), "delayed")
    for module in model.modules():  # as Transformer Engine's layers have it
        if isinstance(module, ColumnParallelLinear):
            module.is_first_microbatch = True
    for parameter in model.vision_model.parameters():
        parameter.requires_grad_(False)
    freezing.freeze(model, ("language_model",))
    steps = [marked(model) for _ in range(3)]
    model.load_state_dict(model.state_dict())
    with torch.no_grad():
        steps.append(marked(model))  # a validation, by which no range is learned
    steps += [marked(model) for _ in range(3)]
    model.language_model.requires_grad_(True)
    steps += [marked(model) for _ in range(2)]
    freezing.freeze(model, ("language_model",))
    return steps + [marked(model) for _ in range(3)]


def test_frozen_weights_are_quantized_when_they_change() -> None:
    """Twice, since delayed scaling knows their range the second time only; again when loaded, thawed, frozen."""
    projector = {"vision_projection"}
    everything = projector | {"vision_model", "language_model"}
    trained = projector | {"language_model"}
    assert ranks.run(quantizations, ParallelConfig(), 1)[0] == [
        *(everything, everything, projector),  # at first
        *(everything, everything, everything, projector),  # loaded
        *(trained, trained),  # thawed
        *(trained, trained, projector),  # frozen
    ]


def answers(fp8: str) -> Any:
    """Of a prompt whose length no multiple is, and whether FP8 is there again after it."""
    from mmcore.inference.generator import Prompt, generate

    model = build(ParallelConfig(), fp8)
    lengths = set()
    model.language_model.decoder.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.add((kwargs["hidden_states"].shape[0], model.config.fp8)), with_kwargs=True
    )
    sample = tiny.sample(1)
    prompt = Prompt(tokens=sample.tokens.tolist(), images=sample.images)
    answer = generate(model, [prompt], max_new_tokens=4, batch_size=1)
    return answer, lengths, model.config.fp8


def test_answers_are_in_high_precision() -> None:
    expected, lengths, _ = ranks.run(answers, ParallelConfig(), 1, "none")[0]
    found, same_lengths, after = ranks.run(answers, ParallelConfig(), 1, "delayed")[0]
    assert (found, same_lengths, after) == (expected, lengths, "hybrid")
    assert {length for length, _ in lengths} == {1, len(tiny.sample(1).tokens)}
