"""What of the model is trained, by name."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import nn


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by the name that they have in the whole model: layers count from its first, in any chunk."""
    numbers = {
        f"{name}.": f"{name.rpartition('.')[0]}.{module.layer_number - 1}."
        for name, module in model.named_modules()
        if name.rpartition(".")[2].isdigit() and hasattr(module, "layer_number")
    }
    for name, parameter in model.named_parameters():
        layer = re.match(r".*?\.layers\.\d+\.", name)
        whole = numbers.get(layer[0], layer[0]) + name[layer.end() :] if layer else name
        yield re.sub(r"^chunks\.\d+\.", "", whole), parameter


def is_named(name: str, pattern: str) -> bool:
    """Whether a pattern matches the name of a parameter, or of a module that holds it, from end to end."""
    return re.match(rf"(?:{pattern})(?:\.|$)", name) is not None


def trainable_names(model: nn.Module) -> list[str]:
    """Names of what the whole model can train, from all ranks, which all call it."""
    local = [name for name, parameter in named_parameters(model) if parameter.requires_grad]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, local)
    return list(dict.fromkeys(name for names in found for name in names))


def check_names(names: Sequence[str], option: str, patterns: Iterable[str]) -> None:
    """Refuse a pattern that names nothing in the model.

    Raises:
        ValueError: it says the pattern, and a name that there is.
    """
    for pattern in patterns:
        if not any(is_named(name, pattern) for name in names):
            raise ValueError(
                f"{option} {pattern!r} names nothing in the model: it has to match a module's or a parameter's name "
                f"from end to end, such as {names[-1]}"
            )


def check_stacks(names: Sequence[str], option: str, patterns: Sequence[str]) -> None:
    """Refuse to freeze some layers of a stack: a checkpoint keeps the state of all of them in one tensor.

    Raises:
        ValueError: it says a parameter that only some layers would train.
    """
    stacks: dict[str, set[bool]] = {}
    for name in names:
        kind = re.sub(r"\.layers\.\d+\.", ".layers.*.", name)
        stacks.setdefault(kind, set()).add(any(is_named(name, pattern) for pattern in patterns))
        if len(stacks[kind]) > 1:
            raise ValueError(
                f"{option} {' '.join(patterns)} freezes {kind} in some layers alone, which a checkpoint cannot hold: "
                "name it in all of them, as with layers\\.\\d+"
            )


def check_biases(names: Sequence[str], option: str, patterns: Sequence[str]) -> None:
    """Refuse to train the bias of a linear layer whose weight is frozen: kernels make no gradient of it then.

    Raises:
        ValueError: it says the bias.
    """
    frozen = {name for name in names if any(is_named(name, pattern) for pattern in patterns)}
    for name in names:
        layer, _, kind = name.rpartition(".")
        if kind == "bias" and name not in frozen and f"{layer}.weight" in frozen and "linear" in layer:
            raise ValueError(
                f"{option} {' '.join(patterns)} freezes {layer}.weight and not its bias, which then gets no gradient: "
                "name the layer to freeze both"
            )


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Train all parameters but those that a pattern names; what the model itself never trains stays as it is."""
    for name, parameter in named_parameters(model):
        if any(is_named(name, pattern) for pattern in patterns):
            if parameter.requires_grad:
                vars(parameter)["thaws"] = True
            parameter.requires_grad_(False)
        elif getattr(parameter, "thaws", False):
            parameter.requires_grad_(True)


def unwrap(ddp: DistributedDataParallel) -> None:
    """Let go of the model: of the wrapper's hooks and of its buffers."""
    if ddp.ddp_config.overlap_param_gather:
        ddp.disable_forward_pre_hook()  # and gather what the next forward pass would have
    ddp.grad_accs.clear()  # they alone keep the hooks of the backward pass alive, which would run beside the next ones
    for parameter in ddp.module.parameters():
        parameter.data = parameter.data.clone()  # it was a view of the buffer of all that were trained
        parameter.grad = None
        for name in ("main_grad", "grad_added_to_main_grad"):
            if hasattr(parameter, name):
                delattr(parameter, name)
    ddp.module.config.grad_scale_func = None  # the optimizer's
    ddp.module.config.no_sync_func = None  # the wrapper's
