"""Matrix products in FP8: which recipe, what lengths it takes, and weights that are turned into it but once.

Transformer Engine keeps the FP8 copy of a weight for the micro batches of a step; mcore tells it at the first one that
weights have changed. Those of a frozen layer have not. The engine itself leaves out the transpose of such a layer's
input, which only the gradient of the weight needs (2.11: `backward_needs_input` in module/linear.py). The copy of the
weight has a transpose, kept with it, for the gradient of the input.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

# Tokens of a matrix product must be a multiple of this, on each rank: its weight gradient sums over them.
FP8_MULTIPLE = 16

# Arguments of mcore's TransformerConfig, by --model.fp8. Forward in E4M3, gradients in E5M2. The history is that of
# Transformer Engine's own introduction (docs/examples/fp8_primer.ipynb): the longer one of its default, 1024 passes,
# would take that many after each start.
FP8: dict[str, dict[str, Any]] = {
    "none": {"fp8": None},
    "delayed": {
        "fp8": "hybrid",
        "fp8_recipe": "delayed",
        "fp8_amax_history_len": 16,
        "fp8_amax_compute_algo": "max",
    },
    "tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
}

# Delayed scaling knows a weight's range only after it has seen it once: at first it takes it for 448.
_TIMES = 2


def token_multiple(config: TransformerConfig) -> int:
    """What the tokens of a rank's matrix products must be a multiple of."""
    return FP8_MULTIPLE if config.fp8 else 1


@contextmanager
def in_high_precision(config: TransformerConfig) -> Iterator[None]:
    """Without FP8, for what has any number of tokens, such as one."""
    before = config.fp8
    config.fp8 = None
    try:
        yield
    finally:
        config.fp8 = before


def keep_quantized(model: nn.Module) -> None:
    """After mcore has told all layers that their weights changed: take it back where they did not.

    Call it once a step.
    """
    for module in _layers(model):
        if module.weight.requires_grad:
            module.quantizations = 0
        elif module.quantizations < _TIMES:
            module.quantizations += torch.is_grad_enabled()  # elsewhere delayed scaling learns no range
        else:
            module.is_first_microbatch = False


def forget_quantized(model: nn.Module) -> None:
    """Frozen weights changed after all: others were loaded."""
    for module in _layers(model):
        module.quantizations = 0


def _layers(model: nn.Module) -> Iterator[Any]:
    """What has an FP8 copy of a weight."""
    module: Any
    for module in model.modules():
        if hasattr(module, "is_first_microbatch"):
            vars(module).setdefault("quantizations", 0)
            yield module
