"""The projector: mcore's `MultimodalProjector`, from vision width to language width."""

from typing import Any

import torch
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.transformer.transformer_config import TransformerConfig

from mmcore.models.architecture import Architecture
from mmcore.models.kernels import Backend, activation
from mmcore.models.specs import mlp_submodules, whole


def build_projector(architecture: Architecture, backend: Backend, **base: Any) -> MultimodalProjector:
    """Features [n, i, vision hidden] -> embeddings [n, i, language hidden]; with anyres also `image_newline` [h]."""
    arch, vision, language = architecture.vision_projection, architecture.vision, architecture.language
    assert arch is not None and vision is not None and language is not None
    config = TransformerConfig(
        num_layers=1,
        hidden_size=language.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size or language.hidden_size,
        num_attention_heads=language.num_attention_heads,
        activation_func=activation(arch.activation, backend),
        bias_activation_fusion=False,
        add_bias_linear=arch.add_bias_linear,
        **whole(base),
    )
    # Transformer Engine's layers cannot gather what tensor ranks computed, which one layer alone has to.
    is_affine = arch.projector_type == "affine"
    linears = mlp_submodules("local" if is_affine else backend, fused_norm=False)
    projector = MultimodalProjector(config, linears, arch.projector_type, vision.hidden_size)
    if is_affine:
        projector.encoder.skip_bias_add = False  # mcore would add a rank's share of the bias to the whole
    if architecture.pictures.has_newline:
        # As LLaVA begins it; a part of the projector, with which it is trained, frozen and stored.
        newline = torch.randn(language.hidden_size, dtype=config.params_dtype) / language.hidden_size**0.5  # [h]
        projector.image_newline = torch.nn.Parameter(newline)
    return projector
