"""The whole model: vision tower, projector and language model, on one pipeline stage or many."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from mmcore import host
from mmcore.config import ParallelConfig
from mmcore.models.architecture import Architecture
from mmcore.models.fp8 import FP8, forget_quantized, in_high_precision, keep_quantized
from mmcore.models.kernels import resolve_backend
from mmcore.models.language import LanguageModel, language_config
from mmcore.models.projector import build_projector
from mmcore.models.recompute import RECOMPUTE
from mmcore.models.sequence_parallel import pad_rows, pad_segments
from mmcore.models.splice import arrange, splice
from mmcore.models.vision import VisionModel, vision_config

# What builds a vision tower, by its architecture's model_subtype.
TOWERS = {"clip": VisionModel, "siglip": VisionModel}


class LlavaModel(MegatronModule):
    """Vision features, projected and spliced into the language model's embeddings.

    The vision tower and the projector live on the first pipeline stage. Forward:
    1. the vision tower turns pixels into features, 2. the projector brings them to the language
    model's width, 3. they replace the placeholders among the text embeddings, 4. the language model
    runs over all of it.
    """

    def __init__(
        self,
        architecture: Architecture,
        backend: str = "auto",
        layers: Sequence[int] = (),
        vp_stage: int | None = None,
        *,
        fp8_vision: bool = False,
        language_graphs: bool = False,
        **base: Any,
    ) -> None:
        """Build this rank's part.

        Args:
            architecture: all three parts.
            backend: "auto", "local" or "transformer_engine".
            layers: of the language model on each pipeline stage, as `plan_layers` gives; dealt out evenly if empty.
            vp_stage: which of this rank's chunks, where it has several (see `mmcore.models.interleaved`).
            fp8_vision: whether the vision tower's layers compute in FP8, where the language model's do.
            language_graphs: whether passes of the language model are CUDA graphs, as `RowGraphs` says.
            base: arguments of mcore's TransformerConfig that all parts share, as `base_config` gives.
        """
        assert architecture.vision is not None and architecture.language is not None
        assert architecture.image_token_id is not None
        kernels = resolve_backend(backend)
        config = language_config(architecture.language, layers, kernels, **base)
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder  # mcore's schedules ask for it
        self.architecture, self.image_token_id = architecture, architecture.image_token_id
        self.num_image_embeddings = architecture.vision.num_image_embeddings
        self.vp_stage = vp_stage  # mcore's schedules compare it with the chunk that they run
        self.pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        self.post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        if self.pre_process:
            tower = TOWERS[architecture.vision.model_subtype]
            vision = vision_config(architecture.vision, kernels, in_fp8=fp8_vision, **base)
            self.vision_model = tower(architecture.vision, vision, kernels)
            self.vision_projection = build_projector(architecture, kernels, **base)
        self.language_model = LanguageModel(
            architecture.language,
            config,
            kernels,
            pre_process=self.pre_process,
            post_process=self.post_process,
            vp_stage=vp_stage,
            in_graphs=language_graphs,
        )
        self.share_embeddings_and_output_weights = architecture.language.share_embeddings_and_output_weights
        self.register_load_state_dict_post_hook(lambda *_: forget_quantized(self))

    @property
    def chunks(self) -> list["LlavaModel"]:
        """What mcore's schedules run: see `mmcore.models.interleaved`."""
        return [self]

    def set_is_first_microbatch(self) -> None:
        """Turn weights that a step may have changed into FP8 anew (mcore's schedules call it before each)."""
        super().set_is_first_microbatch()
        if self.config.fp8:
            keep_quantized(self)

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Take the output of the pipeline stage before this one (mcore's schedules call it)."""
        if not self.pre_process:
            self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied embedding, whose gradients mcore sums over the first and last stage."""
        return self.language_model.shared_embedding_or_output_weight()

    def forward(
        self,
        tokens: Tensor,
        images: Tensor | None = None,
        *,
        image_sources: Tensor | None = None,
        image_positions: Tensor | None = None,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Run this stage.

        Args:
            tokens: int64 [b, s]; `image_token_id` once for every image embedding. Under context parallelism this
                rank's part of them (see `mmcore.data.context`), as are labels and positions.
            images: uint8 [n, 3, h, w] in the order of their places, or None where there are none.
            image_sources: int64 [e], which of all images' features each place takes, -1 the newline; every
                feature in order if None.
            image_positions: int64 [e], the placeholders in the flattened [b * s]. If None they are looked for, and
                the host waits for the device to have found them.
            labels, positions, attention_mask, inference_context: as `LanguageModel.forward`.
        Returns:
            As `LanguageModel.forward`.
        Raises:
            ValueError: placeholders and image embeddings differ in number.
        """
        padding = self._padding(tokens) if inference_context is None else 0
        if padding:
            assert positions is not None and len(tokens) == 1, "what is padded are packed rows, for training"
        if packed_seq_params is not None:
            packed_seq_params = pad_segments(packed_seq_params, padding * self.config.context_parallel_size)
        decoder_input = None
        if self.pre_process:
            is_image = tokens.eq(self.image_token_id)  # bool [b, s]
            # The placeholder lies outside the vocabulary: any row does for the lookup.
            decoder_input = self.language_model.embedding(
                input_ids=tokens.masked_fill(is_image, 0), position_ids=None
            )  # [s, b, h]
            embeddings = self.embedded(images, image_sources)
            if embeddings is not None:
                if image_positions is None:
                    image_positions = is_image.flatten().nonzero().squeeze(-1)
                decoder_input = splice(decoder_input, embeddings, image_positions)
            decoder_input = pad_rows(decoder_input, padding)
        with nullcontext() if inference_context is None else in_high_precision(self.config):
            return self.language_model(
                decoder_input,
                labels=labels,
                positions=positions,
                attention_mask=attention_mask,
                inference_context=inference_context,
                packed_seq_params=packed_seq_params,
            )

    def _padding(self, tokens: Tensor) -> int:
        """Positions that a row [1, s] lacks for tensor ranks to share it, for FP8, and for graphs."""
        sharers = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        return -tokens.shape[1] % (sharers * self.language_model.token_multiple)

    def see_ahead(self, images: Tensor) -> None:
        """Let a frozen tower begin with the pictures of a batch to come; in the order in which `forward` gets them.

        Args:
            images: as of `forward`, the very tensor.
        """
        if self.pre_process:
            self.vision_model.see_ahead(images)

    def embedded(self, images: Tensor | None, image_sources: Tensor | None) -> Tensor | None:
        """Embeddings [e, h] of images in the order of their places; arguments as `forward`.

        Where there are none, e is 0, but what is trained takes part all the same, by way of a blank
        picture. DDP reduces a bucket of gradients once the last of them is there, and all replicas must
        reduce the same ones in the same order: that of the one graph.
        """
        is_blank = images is None or not len(images)
        features = self._blank_features() if is_blank else self.vision_model(images)
        if features is None:
            return None
        features = self.vision_projection(features)  # [n, i, h]
        if image_sources is not None:
            return arrange(features, getattr(self.vision_projection, "image_newline", None), image_sources)
        return features.flatten(0, 1)[: 0 if is_blank else None]

    def _blank_features(self) -> Tensor | None:
        """Of one blank picture [1, i, vision hidden]; None where nothing waits for their gradients."""
        vision, weight = self.vision_model.arch, next(self.vision_model.parameters())
        if torch.is_grad_enabled() and is_trained(self.vision_model):
            side = vision.image_size
            return self.vision_model(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=weight.device))
        if torch.is_grad_enabled() and is_trained(self.vision_projection):
            return weight.new_zeros(1, vision.num_image_embeddings, vision.hidden_size)
        return None


def is_trained(module: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def base_config(
    parallel: ParallelConfig, dtype: torch.dtype = torch.float32, recompute: str = "none", fp8: str = "none"
) -> dict[str, Any]:
    """Arguments of mcore's TransformerConfig that all parts of a model share.

    Args:
        recompute: a key of `RECOMPUTE`.
        fp8: a key of `FP8`.
    """
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        **_interleaved(parallel.virtual_pipeline_model_parallel_size),
        "context_parallel_size": parallel.context_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "pipeline_dtype": dtype,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        # Initialised on the host, a weight is one tensor that every layout cuts: the same model at any size.
        "use_cpu_initialization": not host.has_cuda(),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "gradient_accumulation_fusion": False,  # see accumulate_in_place
        # The mean of a step is over all its tokens, however they fall to micro batches and ranks.
        "calculate_per_token_loss": True,
        # Micro batches are as long as their longest sample.
        "variable_seq_lengths": True,
        # There are no experts, but mcore refuses the line above with its default dispatcher of them.
        "moe_token_dispatcher_type": "alltoall",
        **RECOMPUTE[recompute],
        **FP8[fp8],
    }


def _interleaved(chunks: int) -> dict[str, Any]:
    """Arguments for so many chunks on each stage.

    Sent both ways in one batch, the messages of two stages would be taken for each other.
    """
    if chunks == 1:
        return {"virtual_pipeline_model_parallel_size": None}
    return {"virtual_pipeline_model_parallel_size": chunks, "overlap_p2p_comm": True, "batch_p2p_comm": False}
