"""The language model's last layer, whose MLP sees only what is read: positions with a label.

What other positions get from it reaches no loss. Of the tokens of a picture and of a question that is all of them.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


@dataclass
class ReadRow(PackedSeqParams):
    """A packed row of which only some positions are read.

    With the row's boundaries, since these are what mcore hands to layers, also to ones that are computed again.
    """

    read: Tensor | None = None
    """int64 [t], positions in the row."""


def read_row(packed: PackedSeqParams, positions: Tensor, multiple: int = 1) -> ReadRow:
    """Of a row the positions that are read; filled up to a multiple with the first, which nobody takes."""
    size = max(1, -(-len(positions) // multiple)) * multiple
    known = {field.name: getattr(packed, field.name) for field in fields(packed)}
    return ReadRow(**known, read=F.pad(positions, (0, size - len(positions))))


class LastLayer(TransformerLayer):
    """mcore's; of a `ReadRow` the output is [t, 1, h]."""

    _read: Tensor | None = None

    def forward(self, *args: Any, packed_seq_params: PackedSeqParams | None = None, **kwargs: Any) -> Any:
        """As mcore's."""
        self._read = packed_seq_params.read if isinstance(packed_seq_params, ReadRow) else None
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)

    def _forward_mlp(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._read is not None:
            hidden_states = hidden_states[self._read]  # [t, 1, h]
        output: Tensor = super()._forward_mlp(hidden_states, *args, **kwargs)
        return output
