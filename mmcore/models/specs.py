"""What a transformer layer is made of: Transformer Engine's modules on a GPU, local ones elsewhere.

Checkpoints are interchangeable: the local layers store their norms under the names that
Transformer Engine's fused layers have.
"""

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import nn

from mmcore.models.attention import CoreAttention
from mmcore.models.cache import with_cache
from mmcore.models.fp8 import FP8
from mmcore.models.kernels import Backend, swiglu, swiglu_between, with_bias_inside, without_random_states
from mmcore.models.recompute import RecomputableMLP
from mmcore.models.row_attention import RowAttention

# How the local layers' norms are stored, so that either backend loads the other's checkpoints.
_STORED_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


class LocalNorm:
    """torch's layer norm or RMS norm, as the config says, with mcore's mark of sequence parallelism.

    With it a tensor rank sees a part of the sequence only: mcore sums the gradients of what is so marked over
    the tensor ranks. Its own wrapper of torch's norms refuses such a config.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> Any:
        """A torch module over [..., hidden_size]."""
        kind = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}[config.normalization]
        module = kind(hidden_size, eps=eps)
        for parameter in module.parameters():
            vars(parameter)["sequence_parallel"] = config.sequence_parallel
        return module


class FusedMLP(RecomputableMLP):
    """Whose SwiGLU gives FP8, where the scales are known beforehand and all is computed once."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        is_delayed = config.fp8 and config.fp8_recipe == "delayed" and config.use_te_activation_func
        if is_delayed and config.recompute_granularity is None:
            self.activation_func = swiglu_between(self.linear_fc1, self.linear_fc2)


def norm(backend: Backend) -> Any:
    """The layer norm (or RMS norm, as the config says) that stands on its own."""
    if backend == "local":
        return LocalNorm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def mlp_submodules(backend: Backend, *, fused_norm: bool) -> MLPSubmodules:
    """Linear layers of an MLP.

    Args:
        fused_norm: whether the norm before the MLP is part of its first layer; only Transformer
            Engine's layers can be.
    """
    if backend == "local":
        return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    from megatron.core.extensions import transformer_engine as te

    first = te.TELayerNormColumnParallelLinear if fused_norm else te.TEColumnParallelLinear
    return MLPSubmodules(
        linear_fc1=with_bias_inside(first),
        activation_func=swiglu,  # where `use_te_activation_func` is set
        linear_fc2=with_bias_inside(te.TERowParallelLinear),
    )


def layer_spec(
    backend: Backend, attn_mask_type: AttnMaskType, layer: type = TransformerLayer, **params: Any
) -> ModuleSpec:
    """One transformer layer.

    Args:
        attn_mask_type: causal for language, no_mask for vision.
        layer: class of the layer, built with `params` beside mcore's own arguments.
    """
    if backend == "local":
        linear_qkv, core_attention, linear_proj = ColumnParallelLinear, CoreAttention, RowParallelLinear
        layer_norm = LocalNorm
    else:
        from megatron.core.extensions import transformer_engine as te

        linear_qkv = te.TELayerNormColumnParallelLinear
        core_attention = without_random_states(te.TEDotProductAttention)
        linear_proj, layer_norm = with_bias_inside(te.TERowParallelLinear), IdentityOp
    return ModuleSpec(
        module=layer,
        params=params,
        submodules=TransformerLayerSubmodules(
            input_layernorm=layer_norm,
            self_attention=ModuleSpec(
                module=SelfAttention if backend == "local" else RowAttention,
                params={"attn_mask_type": attn_mask_type},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linear_qkv, core_attention=with_cache(core_attention), linear_proj=linear_proj
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=layer_norm,
            mlp=ModuleSpec(
                module=RecomputableMLP if backend == "local" else FusedMLP,
                submodules=mlp_submodules(backend, fused_norm=True),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_STORED_NAMES if backend == "local" else {},
        ),
    )


def block_spec(
    backend: Backend,
    attn_mask_type: AttnMaskType,
    config: TransformerConfig,
    vp_stage: int | None = None,
    last: type = TransformerLayer,
) -> TransformerBlockSubmodules:
    """Layers of this pipeline stage, or of a chunk of it, and the norm after the model's last.

    Given a layer alone, mcore takes a norm of its own.

    Args:
        last: class of the last of them.
    """
    layers = [layer_spec(backend, attn_mask_type) for _ in range(get_num_layers_to_build(config, vp_stage))]
    layers[-1:] = [layer_spec(backend, attn_mask_type, last) for _ in layers[-1:]]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm(backend))


def whole(base: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the config of a part that lives whole on the first stage: nothing that cuts the language model.

    Its sequences, of one picture each, are not shared by tensor ranks either: they are short and of odd lengths. Nor
    does FP8 reach it by itself: the projector has too little to compute, and the tower has a choice of its own.
    """
    return {
        **base,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "pipeline_dtype": None,
        "context_parallel_size": 1,
        "sequence_parallel": False,
        **FP8["none"],
    }
