"""A tiny model and batches for it: uneven heads, groups and lengths, padded vocabulary."""

import zlib
from collections.abc import Iterator, Sequence

import torch
from megatron.core import parallel_state

from mmcore.config import ParallelConfig
from mmcore.data.batch import Batch, EncodedSample, collate
from mmcore.models.architecture import Architecture, LanguageArch, ProjectorArch, VisionArch
from mmcore.models.interleaved import InterleavedModel, build_model
from mmcore.models.llava import LlavaModel, base_config
from mmcore.models.presets import compose

VISION = VisionArch(num_layers=3, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, image_size=16, patch_dim=8)
LANGUAGE = LanguageArch(
    num_layers=4,
    hidden_size=48,
    ffn_hidden_size=80,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=150,
    max_position_embeddings=128,
    rotary_base=1_000_000.0,
)


def architecture(**projector: object) -> Architecture:
    return compose(VISION, LANGUAGE, ProjectorArch(**{"ffn_hidden_size": 40, **projector}))


def build(
    parallel: ParallelConfig,
    seed: int = 5,
    arch: Architecture | None = None,
    dtype: torch.dtype = torch.float32,
    recompute: str = "none",
    layers: Sequence[int] = (),
) -> LlavaModel | InterleavedModel:
    """The same weights at every layout: each is drawn whole by its global name, then cut.

    Norms and biases are drawn as well: ones and zeros would hide mistakes.
    """
    model = build_model(arch or architecture(), "local", layers, **base_config(parallel, dtype, recompute))
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel.tensor_model_parallel_size
    for name, parameter in global_parameters(model):
        if getattr(parameter, "shared", False):  # the last stage's copy of the embedding
            name = "language_model.embedding.word_embeddings.weight"
        shape, cut = list(parameter.shape), getattr(parameter, "partition_dim", -1)
        cut = cut if getattr(parameter, "tensor_model_parallel", False) else -1
        if cut >= 0:
            shape[cut] *= size
        whole = 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + zlib.crc32(name.encode())))
        whole += 1.0 if "norm" in name and name.endswith("weight") else 0.0
        if cut >= 0:  # gate and up are cut one by one
            halves = whole.chunk(parameter.partition_stride, cut)
            whole = torch.cat([half.chunk(size, cut)[rank] for half in halves], cut)
        parameter.data.copy_(whole)
    return model


def global_parameters(model: LlavaModel | InterleavedModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters by the name that they have in the whole model, whatever the pipeline stage and chunk."""
    for chunk in model.chunks:
        first_layer = chunk.language_model.decoder.layers[0].layer_number - 1
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if name.startswith("language_model.decoder.layers."):
                parts[3] = str(int(parts[3]) + first_layer)
            yield ".".join(parts), parameter


def sample(seed: int, images: int = 1) -> EncodedSample:
    """Text around `images` pictures; trained on what follows them."""
    random = torch.Generator().manual_seed(seed)
    length = int(torch.randint(4, 12, (), generator=random))
    text = torch.randint(0, LANGUAGE.vocab_size, (length + 1,), generator=random)
    picture = torch.full((VISION.num_image_embeddings * images,), LANGUAGE.vocab_size)
    ids = torch.cat([text[:1], picture, text[1:]])
    mask = torch.zeros(len(ids) - 1)
    mask[len(picture) + 1 :] = 1
    labels = torch.where(mask > 0, ids[1:], 0)
    pixels = torch.randint(0, 256, (images, 3, 16, 16), generator=random, dtype=torch.uint8)
    return EncodedSample(key=f"s{seed}", tokens=ids[:-1], labels=labels, loss_mask=mask, images=pixels)


def batch(first: int, size: int, images: int = 1) -> Batch:
    """Samples `first` to `first + size` in one micro batch."""
    return collate([sample(seed, images) for seed in range(first, first + size)])
