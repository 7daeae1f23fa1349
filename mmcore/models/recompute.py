"""Activations that are computed again in the backward pass instead of kept."""

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

# Arguments of mcore's TransformerConfig, by --model.recompute. Attention is computed by kernels that keep no
# scores, so what fills the memory of a layer is its MLP: that alone is what "selective" computes again.
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def begin_graph(hidden: Tensor, config: TransformerConfig) -> Tensor:
    """What enters a stack of layers, with a gradient where layers that are computed again need one.

    Such a layer takes part in the backward pass only if its input does. The first layer's does not where
    everything below is frozen, and its weights would silently learn nothing.
    """
    if config.recompute_granularity is None or hidden.requires_grad or not torch.is_grad_enabled():
        return hidden
    return hidden.detach().requires_grad_()


class RecomputableMLP(MLP):
    """mcore's MLP, whose bias may leave a function that is computed again.

    mcore returns the bias parameter itself, to be added later. As an output of such a function it would become the
    function's result instead of a parameter, and the backward pass would never end.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As mcore's."""
        output, bias = super().forward(*args, **kwargs)
        return output, bias if bias is None or self.config.recompute_granularity is None else bias.clone()
