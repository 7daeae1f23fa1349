"""The vision tower: mcore's `CLIPViTModel`, stopped at the layer whose features are wanted."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from mmcore.models.architecture import VisionArch
from mmcore.models.fp8 import FP8, token_multiple
from mmcore.models.graphs import Graphs, graph_size
from mmcore.models.kernels import Backend, activation
from mmcore.models.recompute import begin_graph
from mmcore.models.specs import layer_spec, norm, whole


class VisionLayer(TransformerLayer):
    """A layer that passes its input on when it lies above the feature layer.

    The weights above it are kept, so that a tower leaves as whole as it came.
    """

    def __init__(self, *args: Any, num_layers_run: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_run = self.layer_number <= num_layers_run
        if not self.is_run:
            self.requires_grad_(False)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return super().forward(hidden_states, **kwargs) if self.is_run else (hidden_states, None)


class VisionModel(CLIPViTModel):
    """Pixels to features: [n, 3, h, w] -> [n, i, h], i = `VisionArch.num_image_embeddings`."""

    def __init__(self, arch: VisionArch, config: TransformerConfig, backend: Backend) -> None:
        super().__init__(
            config,
            layer_spec(backend, AttnMaskType.no_mask, VisionLayer, num_layers_run=arch.num_layers_run),
            ln_pre_impl=norm(backend),
            ln_post_impl=norm(backend),
            add_class_token=arch.has_class_token,
            class_token_len=int(arch.has_class_token),
            patch_dim=arch.patch_dim,
            # Pixels that fill no patch are never seen; mcore asserts that there are none.
            img_h=arch.image_size // arch.patch_dim * arch.patch_dim,
            img_w=arch.image_size // arch.patch_dim * arch.patch_dim,
            model_subtype=arch.model_subtype,
        )
        self.arch = arch
        # Features are taken before the norm after the last layer, as LLaVA takes them. Kept like the
        # layers above them, so that a tower leaves as whole as it came.
        self.ln_post = norm(backend)(config, arch.hidden_size, arch.layernorm_epsilon).requires_grad_(False)
        self.graphs = Graphs(self.features)

    def forward(self, images: Tensor) -> Tensor:
        """See.

        Args:
            images: uint8 [n, 3, h, w], or floats that are normalised already.
        Returns:
            Features of `feature_layer` [n, i, h], the class token dropped if the architecture says so.
        """
        # Frozen, the tower needs no graph of gradients; mcore's block would otherwise start one at its input.
        is_learning = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        with torch.set_grad_enabled(is_learning):
            if self.training and not is_learning and (features := self.graphs.take(images)) is not None:
                return features
            if images.is_cuda and self.training and not is_learning and not self.config.fp8 and graph_size(len(images)):
                return self.graphs(images, self.parameters())
            return self.features(images)

    def see_ahead(self, images: Tensor) -> None:
        """Begin with pictures that `forward` will be given, beside what computes; not where the tower is trained.

        Args:
            images: as of `forward`, the very tensor.
        """
        if graph_size(len(images)) and not any(parameter.requires_grad for parameter in self.parameters()):
            with torch.no_grad():
                self.graphs.begin(images, self.parameters())

    def features(self, images: Tensor) -> Tensor:
        """The same, kernel by kernel."""
        number = len(images)
        if blanks := -number % self.image_multiple:
            images = F.pad(images, (0, 0) * 3 + (0, blanks))
        embedded = begin_graph(self.embedded(images), self.config)
        features = self.decoder(embedded, None).transpose(0, 1)[:number]  # [n, class token and patches, h]
        return features[:, 1:] if self.arch.has_class_token and self.arch.drop_class_token else features

    @property
    def image_multiple(self) -> int:
        """Blank images fill the others up to a multiple of this, for FP8."""
        return token_multiple(self.config) // math.gcd(token_multiple(self.config), self.arch.num_positions)

    def embedded(self, images: Tensor) -> Tensor:
        """What the first layer sees, sequence first: [class token and patches, n, h]."""
        patches = self.conv1(self.normalized(images)).flatten(2).transpose(1, 2)  # [n, patches, h]
        if self.arch.has_class_token:
            patches = torch.cat([self.class_token.expand(len(patches), -1, -1), patches], dim=1)
        # Called, not read: overlapped with the forward pass, weights are gathered as their module is called.
        embedded = patches + self.position_embeddings(self.position_ids)
        if self.ln_pre is not None:
            embedded = self.ln_pre(embedded)
        return embedded.transpose(0, 1).contiguous()

    def normalized(self, images: Tensor) -> Tensor:
        """Pixels in the tower's dtype; bytes are scaled to 0..1, then by the tower's mean and deviation."""
        dtype = self.conv1.weight.dtype
        if images.dtype != torch.uint8:
            return images.to(dtype)
        mean, std = (_per_channel(values, images.device) for values in (self.arch.image_mean, self.arch.image_std))
        return ((images.float() / 255 - mean) / std).to(dtype)


def _per_channel(values: Sequence[float], device: torch.device) -> Tensor:
    """[3, 1, 1], filled on the device: numbers that are brought there make the host wait."""
    return torch.stack([torch.full((1, 1), value, device=device) for value in values])


def vision_config(
    arch: VisionArch, backend: Backend = "local", *, in_fp8: bool = False, **base: Any
) -> TransformerConfig:
    """mcore's configuration of the tower.

    It lives whole on the first pipeline stage: nothing of the language model's layer split may reach
    it, or mcore silently builds fewer layers than the tower has (see `whole`).
    """
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        layernorm_epsilon=arch.layernorm_epsilon,
        activation_func=activation(arch.activation, backend),
        bias_activation_fusion=False,
        # Frozen, it keeps no gradients and so no history of ranges, which delayed scaling would need.
        **whole(base) | FP8["tensorwise" if in_fp8 else "none"],
    )
