"""The models that `benchmarks.train_gpu_peers` measures beside this project's: random weights, the same shapes."""

from typing import Any

from mmcore import host

host.use_host()

import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.train_gpu_shapes import FP8_RECIPE  # noqa: E402
from mmcore.models.architecture import Architecture  # noqa: E402
from mmcore.models.fp8 import FP8  # noqa: E402
from mmcore.models.specs import layer_spec, mlp_submodules  # noqa: E402

THEIR_IMAGE_TOKEN = 0  # which has to be a row of the vocabulary, and no text is drawn with it


def megatron_core_model(arch: Architecture, dtype: torch.dtype, *, is_fp8: bool) -> Any:
    """megatron-core's LLaVAModel: Transformer Engine's layers on a GPU, ones that run anywhere elsewhere.

    Args:
        is_fp8: whether the language model's layers compute in FP8.
    """
    from megatron.core.activations import quick_gelu
    from megatron.core.models.multimodal.llava_model import LLaVAModel
    from megatron.core.models.vision import clip_vit_model
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    vision, between, text = arch.vision, arch.vision_projection, arch.language
    assert vision is not None and between is not None and text is not None
    base: dict[str, Any] = {
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "gradient_accumulation_fusion": False,
        "use_cpu_initialization": not host.has_cuda(),
    }
    language_config = TransformerConfig(
        num_layers=text.num_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.ffn_hidden_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_query_groups,
        kv_channels=text.kv_channels,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        bias_activation_fusion=host.has_cuda(),
        apply_rope_fusion=host.has_cuda(),
        **FP8[FP8_RECIPE if is_fp8 else "none"],
        **base,
    )
    vision_config = TransformerConfig(
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        activation_func=quick_gelu,
        **base,
    )
    projector_config = TransformerConfig(
        num_layers=1,
        hidden_size=text.hidden_size,
        ffn_hidden_size=between.ffn_hidden_size,
        num_attention_heads=text.num_attention_heads,
        activation_func=nn.functional.gelu,
        add_bias_linear=between.add_bias_linear,
        **base,
    )
    # What LLaVAModel asks its configurations for beside what they have.
    vars(language_config)["language_model_type"], vars(vision_config)["vision_model_type"] = "mistral_7b", "clip"
    if not host.has_cuda():  # it names a norm that needs Transformer Engine
        defaults = clip_vit_model.CLIPViTModel.__init__.__defaults__ or ()
        replaced = tuple(WrappedTorchNorm if default is nn.LayerNorm else default for default in defaults)
        clip_vit_model.CLIPViTModel.__init__.__defaults__ = replaced
    language_layer, vision_layer, projector = _plain_layers()
    return LLaVAModel(
        language_config,
        language_layer,
        text.padded_vocab_size,
        text.max_position_embeddings,
        vision_config,
        vision_layer,
        True,  # drop the class token
        projector_config,
        projector,
        language_position_embedding_type="rope",
        language_rotary_base=int(text.rotary_base),
        img_h=vision.image_size,
        img_w=vision.image_size,
        patch_dim=vision.patch_dim,
    )


def _plain_layers() -> tuple[Any, Any, Any]:
    """Of the language model, of the tower, and of the projector."""
    from megatron.core.transformer.enums import AttnMaskType

    if not host.has_cuda():
        layers = (layer_spec("local", mask) for mask in (AttnMaskType.causal, AttnMaskType.no_mask))
        return (*layers, mlp_submodules("local", fused_norm=False))
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_transformer_engine_spec
    from megatron.core.transformer.mlp import MLPSubmodules

    projector = MLPSubmodules(linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear)
    return get_gpt_layer_with_transformer_engine_spec(), get_vit_layer_with_transformer_engine_spec(), projector


def transformers_model(arch: Architecture, dtype: torch.dtype) -> Any:
    """transformers' LLaVA with torch's attention kernels, on this process's device; the projector as wide as ours."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

    vision, between, text = arch.vision, arch.vision_projection, arch.language
    assert vision is not None and between is not None and text is not None and between.ffn_hidden_size
    vision_config = CLIPVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.ffn_hidden_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_attention_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_dim,
    )
    text_config = MistralConfig(
        vocab_size=text.padded_vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.ffn_hidden_size,
        num_hidden_layers=text.num_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_query_groups,
        head_dim=text.kv_channels,
        max_position_embeddings=text.max_position_embeddings,
        sliding_window=None,
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=THEIR_IMAGE_TOKEN,
        vision_feature_layer=vision.feature_layer,
        multimodal_projector_bias=between.add_bias_linear,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(host.device()):
        model = LlavaForConditionalGeneration(config)
        projector, bias = model.model.multi_modal_projector, between.add_bias_linear
        projector.linear_1 = nn.Linear(vision.hidden_size, between.ffn_hidden_size, bias=bias)
        projector.linear_2 = nn.Linear(between.ffn_hidden_size, text.hidden_size, bias=bias)
    torch.set_default_dtype(before)
    assert model.config._attn_implementation == "sdpa", model.config._attn_implementation
    return model.train()
