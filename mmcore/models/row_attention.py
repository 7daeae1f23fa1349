"""Attention over packed rows on a GPU, with one kernel from the mixed projection to what attends."""

from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def turns_by_position(config: TransformerConfig, packed: PackedSeqParams | None) -> bool:
    """Whether `RowAttention` expects the angles of every position of the row.

    Context ranks have two pieces of each segment, of which only mcore's kernel knows; and a tensor rank with a part of
    a query group alone has to gather it first.
    """
    assert config.num_query_groups is not None
    return (
        packed is not None
        and packed.qkv_format == "thd"  # a cache, which mcore carries as the same, turns by itself
        and config.context_parallel_size == 1
        and config.num_query_groups % config.tensor_model_parallel_size == 0
    )


class RowAttention(SelfAttention):
    """mcore's, whose `rotary_pos_emb` is what `row_angles` gives where `turns_by_position` says so."""

    _angles: Tensor | None = None

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """As mcore's."""
        by_position = turns_by_position(self.config, packed_seq_params)
        self._angles = rotary_pos_emb if by_position else None
        output, bias = super().forward(
            hidden_states,
            *args,
            rotary_pos_emb=None if by_position else rotary_pos_emb,
            packed_seq_params=packed_seq_params,
            **kwargs,
        )
        self._angles = None
        return output, bias

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Queries [t, 1, heads, channels], keys and values [t, 1, groups, channels]; turned, where angles are known."""
        if self._angles is None:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        from mmcore.models.turn import cut_and_turn

        mixed, _ = super().get_query_key_value_tensors(hidden_states, split_qkv=False)  # [t, 1, groups, ...]
        return tuple(part.unsqueeze(1) for part in cut_and_turn(mixed.squeeze(1), self._angles))
