"""A rank's part of the model under interleaved pipeline parallelism, and what builds it under any other.

Each stage has several chunks of layers: with p stages, chunk c of stage r is number c * p + r from the bottom. A micro
batch passes every stage once for each chunk, and the stages idle the less while the pipeline fills and empties.

Source: Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM",
arXiv:2104.04473, section 2.2.
"""

from collections.abc import Sequence
from typing import Any

from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from mmcore.models.architecture import Architecture
from mmcore.models.llava import LlavaModel


class InterleavedModel(MegatronModule):
    """All chunks of a rank as one: to gradient buffers, optimizer and checkpoint it is what one `LlavaModel` is.

    mcore's schedule runs the chunks themselves.
    """

    def __init__(self, chunks: Sequence[LlavaModel]) -> None:
        """
        Args:
            chunks: from the bottom up.
        """
        first, last = chunks[0], chunks[-1]
        super().__init__(config=first.config)
        self.chunks = nn.ModuleList(chunks)
        self.architecture, self.num_image_embeddings = first.architecture, first.num_image_embeddings
        self.pre_process, self.post_process = first.pre_process, last.post_process
        self.share_embeddings_and_output_weights = first.share_embeddings_and_output_weights

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """As `LlavaModel.shared_embedding_or_output_weight`, of the chunk that has it."""
        holder: Any = self.chunks[0 if self.pre_process else -1]
        return holder.shared_embedding_or_output_weight()

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What is stored goes by names in the whole model, so that any other layout loads it."""
        state: dict[str, Any] = {}
        chunk: Any
        for index, chunk in enumerate(self.chunks):
            parts = chunk.sharded_state_dict(*args, **kwargs)
            state |= {f"chunks.{index}.{name}": part for name, part in parts.items()}
        return state


def build_model(
    architecture: Architecture,
    backend: str = "auto",
    layers: Sequence[int] = (),
    *,
    fp8_vision: bool = False,
    language_graphs: bool = False,
    **base: Any,
) -> LlavaModel | InterleavedModel:
    """This rank's part of the model at any layout.

    Args:
        architecture, backend, fp8_vision, language_graphs, base: as `LlavaModel` takes them.
        layers: of the language model in each chunk from the bottom up, as `plan_layers` gives; dealt out evenly if
            empty.
    """
    chunks = base["virtual_pipeline_model_parallel_size"]
    indices = [None] if chunks is None else range(chunks)
    options = {"fp8_vision": fp8_vision, "language_graphs": language_graphs}
    parts = [LlavaModel(architecture, backend, layers, index, **options, **base) for index in indices]
    return parts[0] if chunks is None else InterleavedModel(parts)
