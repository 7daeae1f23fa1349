"""The language model: mcore's `GPTModel`, with logits only where they are wanted."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, finfo

from mmcore import host
from mmcore.models.architecture import LanguageArch
from mmcore.models.cache import KeyValueCache
from mmcore.models.chunks import chunk_rows, in_chunks
from mmcore.models.fp8 import token_multiple
from mmcore.models.graphs import ROW_MULTIPLE, SEGMENT_MULTIPLE, Row, RowGraphs, can_be_graphs
from mmcore.models.kernels import Backend, attention_backend, language_fusions
from mmcore.models.last_layer import LastLayer, ReadRow, read_row
from mmcore.models.pipeline import split_layers
from mmcore.models.recompute import begin_graph
from mmcore.models.rotary import ScaledRotaryEmbedding
from mmcore.models.row_attention import turns_by_position
from mmcore.models.sequence_parallel import packed_segments
from mmcore.models.specs import block_spec


class LanguageModel(GPTModel):
    """Embeddings to logits or losses; one pipeline stage of it."""

    def __init__(
        self,
        arch: LanguageArch,
        config: TransformerConfig,
        backend: Backend,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
        in_graphs: bool = False,
    ) -> None:
        """
        Args:
            in_graphs: whether passes of training are CUDA graphs, where `can_be_graphs` lets them.
        """
        super().__init__(
            config,
            block_spec(backend, AttnMaskType.causal, config, vp_stage, LastLayer if post_process else TransformerLayer),
            vocab_size=arch.padded_vocab_size,
            max_sequence_length=arch.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=arch.share_embeddings_and_output_weights,
            position_embedding_type="rope",
            scatter_embedding_sequence_parallel=False,
            vp_stage=vp_stage,
        )
        self.arch, self.backend = arch, backend
        if post_process:
            # It would gather the whole sequence; what has no label is left out before.
            self.output_layer.sequence_parallel = False
        self.rotary_pos_emb = ScaledRotaryEmbedding(arch, config.use_cpu_initialization)
        self.graphs = RowGraphs(self._decode, self.decoder) if in_graphs and can_be_graphs(config) else None

    def forward(
        self,
        decoder_input: Tensor | None,
        *,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inference_context: KeyValueCache | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Run this stage.

        Args:
            decoder_input: [s, b, h] on the first stage; later stages take the one before's output. Under
                sequence parallelism tensor ranks divide s.
            labels: int64 [b, s]; with them the losses come back.
            positions: int64 [t], positions in the flattened [b * s] whose logits are wanted; all if None.
            attention_mask: bool [b, 1, s, s], True where a key must not be seen; None is causal.
            inference_context: keys and values so far, for a row [1, s] as `KeyValueCache.begin` lays it out.
        Returns:
            Hidden states [s, b, h] on all stages but the last, of this rank's part of s under sequence
            parallelism; there losses float32 [t], or logits
            [t, vocabulary] of all tensor ranks, without the padding of the vocabulary.
        """
        if decoder_input is not None and self.config.sequence_parallel:
            decoder_input = scatter_to_sequence_parallel_region(decoder_input)  # [s / tp, b, h]
        if decoder_input is not None:
            decoder_input = begin_graph(decoder_input, self.config)
        if positions is not None and packed_seq_params is not None and self._reads_alone:
            packed_seq_params = read_row(packed_seq_params, positions, self.token_multiple)
        if self.graphs and torch.is_grad_enabled() and isinstance(packed_seq_params, ReadRow):
            hidden = self.graphs(self._row(decoder_input, packed_seq_params))  # [t, 1, h]
        else:
            hidden = self.decoder(
                hidden_states=decoder_input,
                attention_mask=attention_mask,
                rotary_pos_emb=self._rotary(decoder_input, inference_context, packed_seq_params),
                packed_seq_params=inference_context or packed_seq_params,
            )  # [s, b, h]
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            # The output layer gives all ranks the same whole gradient, of which each takes its part.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        hidden = hidden.transpose(0, 1).flatten(0, 1)  # [b * s, h]
        if positions is not None:
            hidden = hidden[: len(positions)] if isinstance(packed_seq_params, ReadRow) else hidden[positions]  # [t, h]
        if labels is None:
            return gather_from_tensor_model_parallel_region(self._logits(hidden))[:, 0, : self.arch.vocab_size]
        labels = labels.flatten() if positions is None else labels.flatten()[positions]
        width = self.output_layer.output_size_per_partition
        return in_chunks(self._losses, chunk_rows(width), hidden, labels)  # [t]

    @property
    def _reads_alone(self) -> bool:
        """Whether the last layer's MLP sees only what is read: here, and of whole rows, not tensor ranks' parts."""
        return self.post_process and not self.config.sequence_parallel

    @property
    def token_multiple(self) -> int:
        """What the tokens of a row of training are padded to a multiple of, on each tensor rank."""
        return ROW_MULTIPLE if self.graphs and torch.is_grad_enabled() else token_multiple(self.config)

    def _row(self, hidden: Tensor | None, packed: ReadRow) -> Row:
        """The row in a shape that comes again."""
        assert hidden is not None and packed.cu_seqlens_q is not None and packed.read is not None
        if not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()  # the backward pass goes through all layers at once
        longest = packed.max_seqlen_q + -packed.max_seqlen_q % ROW_MULTIPLE
        segments = len(packed.cu_seqlens_q) - 1
        ends = packed.cu_seqlens_q[-1:].expand(-segments % SEGMENT_MULTIPLE)
        cu_seqlens = torch.cat([packed.cu_seqlens_q, ends])
        angles = self._rotary(hidden, None, read_row(packed_segments(cu_seqlens, longest), packed.read))
        return Row(hidden=hidden, angles=angles, cu_seqlens=cu_seqlens, read=packed.read, longest=longest)

    def _decode(self, row: Row) -> Tensor:
        """[s, 1, h] -> [t, 1, h]."""
        packed = read_row(packed_segments(row.cu_seqlens, row.longest), row.read)
        hidden: Tensor = self.decoder(
            hidden_states=row.hidden, attention_mask=None, rotary_pos_emb=row.angles, packed_seq_params=packed
        )
        return hidden

    def _rotary(
        self, decoder_input: Tensor | None, cache: KeyValueCache | None, packed_seq_params: PackedSeqParams | None
    ) -> Any:
        if cache is not None:
            return cache.rotary(self.rotary_pos_emb)
        length = self.rotary_pos_emb.get_rotary_seq_len(
            None, self.decoder, decoder_input, self.config, packed_seq_params
        )
        angles = self.rotary_pos_emb(length, packed_seq=packed_seq_params is not None)
        if self.backend == "transformer_engine" and turns_by_position(self.config, packed_seq_params):
            from mmcore.models.turn import row_angles  # Triton's, which is for GPUs

            assert packed_seq_params is not None and packed_seq_params.cu_seqlens_q is not None
            return row_angles(angles, packed_seq_params.cu_seqlens_q, self._row_length(decoder_input))
        return angles

    def _row_length(self, decoder_input: Tensor | None) -> int:
        """Positions of the row that this stage's layers see, of all tensor ranks."""
        hidden = self.decoder.input_tensor if decoder_input is None else decoder_input  # [s, b, h]
        sharers = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        return len(hidden) * sharers

    def _logits(self, hidden: Tensor) -> Tensor:
        """[t, h] -> [t, 1, vocabulary / tp]."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits: Tensor = self.output_layer(hidden.unsqueeze(1), weight=weight)[0]
        return logits

    def _losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """[t, h] and int64 [t] -> float32 [t]."""
        logits = self._logits(hidden)
        self._hide_padding(logits)
        return self.compute_language_model_loss(labels.unsqueeze(0), logits).flatten()

    def _hide_padding(self, logits: Tensor) -> None:
        """Take the vocabulary's padding out of the softmax: it is no token, whatever its rows hold."""
        width = logits.shape[-1]
        first = self.pg_collection.tp.rank() * width
        if first + width > self.arch.vocab_size:
            logits[..., max(0, self.arch.vocab_size - first) :] = finfo(logits.dtype).min


def language_config(
    arch: LanguageArch, layers: Sequence[int] = (), backend: Backend = "local", **base: Any
) -> TransformerConfig:
    """mcore's configuration of a LLaMA-shaped decoder.

    Args:
        layers: of each pipeline stage, or of each chunk where stages have several; dealt out evenly if empty.
        base: arguments of mcore's TransformerConfig.
    """
    chunks = base["pipeline_model_parallel_size"] * (base["virtual_pipeline_model_parallel_size"] or 1)
    layers = layers or split_layers(arch.num_layers, [0.0] * chunks)
    if len(set(layers)) > 1:  # in mcore's notation: embedding, transformer layers, loss
        base["pipeline_model_parallel_layout"] = f"E{'|'.join('t' * number for number in layers)}L"
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.kv_channels,
        layernorm_epsilon=arch.layernorm_epsilon,
        normalization="RMSNorm",
        add_bias_linear=False,
        add_qkv_bias=arch.add_qkv_bias,
        # mcore counts the tokens before a token, Hugging Face the token itself as well.
        window_size=None if arch.sliding_window is None else (arch.sliding_window - 1, 0),
        gated_linear_unit=True,
        activation_func=F.silu,
        attention_backend=attention_backend(backend),
        **language_fusions(backend, has_cuda=host.has_cuda()),
        **base,
    )
