"""Megatron-LM's own checkpoints: a file for each tensor rank and pipeline stage, as its multimodal example loads them.

Folders, names and numbers are those of NVIDIA/Megatron-LM at core_v0.16.1 with Transformer Engine:
examples/multimodal/model_converter/clip_converter.py and siglip_converter.py for vision towers,
tools/checkpoint/saver_core.py for language models, examples/multimodal/combine_state_dicts.py for whole
models. The arguments in the files are not, where those are wrong: a rotary base of 10000 and a norm's
epsilon of 1e-5 for every language model.

torch lays the files out first, with room for their tensors. Then each tensor is read once, a layer at a
time, cut for all ranks and written into its places, so that memory never holds more than one.
"""

import os
import struct
import zipfile
import zlib
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from checkpoint_folder import StoredTensor
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmcore.constants import LANGUAGE_MODEL, MEGATRON_FILE, VISION_MODEL, VOCAB_DIVISOR
from mmcore.models.architecture import Architecture, LanguageArch, cut_widths

if TYPE_CHECKING:  # it imports this module
    from conversion import Conversion, OutputConfig

ITERATION = 1
_HEADER_SIZE = 30  # of a record in a zip archive, before its name (PKWARE APPNOTE, 4.3.7)
# Linear layers that tensor ranks share. Transformer Engine keeps what FP8 needs beside their weights.
LINEAR_LAYERS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "encoder", "output_layer")

Cut = Callable[[Tensor, int], Iterable[Tensor]]
"""From a tensor and the number of ranks to each rank's part."""


def check(architecture: Architecture, config: "OutputConfig") -> None:
    """Refuse a layout that the architecture cannot take.

    Raises:
        ValueError: tensor ranks do not divide heads or widths, stages do not divide the language model's
            layers, or there is no language model to cut into stages.
    """
    size, stages = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    problems = []
    if bad := [f"the {name} ({width})" for name, width in cut_widths(architecture).items() if width % size]:
        problems.append(f"--tensor-model-parallel-size {size} does not divide {', '.join(bad)}")
    language = architecture.language
    if language is None and stages > 1:
        problems.append(
            f"--pipeline-model-parallel-size {stages} is for models with a language model: vision towers are on one "
            "stage, and combine.py takes a torch_dist checkpoint of one"
        )
    if language is not None and language.num_layers % stages:
        problems.append(
            f"--pipeline-model-parallel-size {stages} does not divide the {language.num_layers} layers of the language "
            "model"
        )
    if problems:
        raise ValueError(f"{'; '.join(problems)}: choose sizes that fit")
    if architecture.pictures.has_newline:
        raise ValueError("--format megatron: Megatron-LM has no anyres tiling: leave out --tiling anyres")


def adapted(conversion: "Conversion", config: "OutputConfig") -> "Conversion":
    """The plan with what Megatron-LM has another way: vision towers in float32, no ln_post where it has none."""
    architecture, dropped = conversion.architecture, Counter(conversion.dropped)
    is_clip = architecture.vision is not None and architecture.vision.model_subtype == "clip"
    tensors: dict[str, StoredTensor] = {}
    for key, tensor in conversion.tensors.items():
        if key.startswith(f"{VISION_MODEL}.ln_post.") and is_clip:
            dropped["Megatron-LM's CLIP has no norm after its last layer"] += 1
        elif key.startswith(f"{VISION_MODEL}.") and tensor.dtype == torch.float16:
            chunks = tuple(partial(_widened, chunk) for chunk in tensor.chunks)
            tensors[key] = replace(tensor, dtype=torch.float32, chunks=chunks)
        else:
            tensors[key] = tensor
    notes = (*conversion.notes, *_notes(architecture, config.tensor_model_parallel_size))
    return replace(conversion, tensors=tensors, dropped=dropped, notes=notes)


def _widened(read: Callable[[], Tensor]) -> Tensor:
    return read().float()


def _notes(architecture: Architecture, ranks: int) -> Iterable[str]:
    """Lines of the report: what is another way, and what the files cannot tell Megatron-LM."""
    vision, language = architecture.vision, architecture.language
    if vision is not None and vision.feature_layer != -1:
        yield f"Megatron-LM feeds its projector from layer -1, where mmcore does from layer {vision.feature_layer}"
    if language is None:
        return
    padding = _padded_vocab_size(language.vocab_size, ranks) - language.vocab_size
    if padding:
        yield f"in these files the vocabulary is padded by {padding} copies of its last row, as Megatron-LM pads"
    options, scaling = [], language.rotary_scaling
    if language.layernorm_epsilon != 1e-5:
        options.append(f"--norm-epsilon {language.layernorm_epsilon:g}")
    if language.sliding_window is not None:
        options.append(f"--window-size {language.sliding_window - 1},0")
    if scaling is not None and scaling.rope_type == "llama3":
        options.append(f"--use-rope-scaling --rope-scaling-factor {scaling.factor:g}")
    if scaling is not None and scaling.rope_type == "linear":
        options.append(f"--rotary-seq-len-interpolation-factor {scaling.factor:g}")
    if options:
        yield f"Megatron-LM does not read these from a checkpoint, so give it {' '.join(options)}"
    if scaling is not None and scaling.rope_type == "dynamic":
        yield f"Megatron-LM has no dynamic rotary scaling: it is right up to {language.max_position_embeddings} tokens"


def _arguments(architecture: Architecture, dtype: torch.dtype, ranks: int, stages: int) -> Namespace:
    """What --use-checkpoint-args reads, and beside it what describes the model, by Megatron-LM's names.

    Most of it beats the command line (megatron/training/checkpointing.py, load_args_from_checkpoint), so
    dropout, which is a run's choice and not the model's, is left out.
    """
    language, is_whole = architecture.language, architecture.vision_projection is not None
    assert language is not None
    base, scaling = language.rotary_base, language.rotary_scaling
    llama3 = scaling if scaling is not None and scaling.rope_type == "llama3" else None
    linear = scaling if scaling is not None and scaling.rope_type == "linear" else None
    return Namespace(
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        ffn_hidden_size=language.ffn_hidden_size,
        num_attention_heads=language.num_attention_heads,
        group_query_attention=language.num_query_groups != language.num_attention_heads,
        num_query_groups=language.num_query_groups,
        kv_channels=language.kv_channels,
        seq_length=min(4096, language.max_position_embeddings),  # saver_core's, where the command line has none
        max_position_embeddings=language.max_position_embeddings,
        position_embedding_type="rope",
        add_position_embedding=True,
        rotary_base=int(base) if base.is_integer() else base,
        rotary_percent=1.0,
        rotary_interleaved=False,
        use_rope_scaling=llama3 is not None,
        rope_scaling_factor=llama3.factor if llama3 else 8.0,
        rotary_seq_len_interpolation_factor=linear.factor if linear else None,
        window_size=None if language.sliding_window is None else (language.sliding_window - 1, 0),
        normalization="RMSNorm",
        layernorm_epsilon=language.layernorm_epsilon,
        apply_query_key_layer_scaling=False,
        swiglu=True,
        squared_relu=False,
        add_bias_linear=False,
        add_qkv_bias=language.add_qkv_bias,
        untie_embeddings_and_output_weights=not language.share_embeddings_and_output_weights,
        vocab_size=language.vocab_size,
        padded_vocab_size=_padded_vocab_size(language.vocab_size, ranks),
        make_vocab_size_divisible_by=VOCAB_DIVISOR,
        tokenizer_type="MultimodalTokenizer" if is_whole else "HuggingFaceTokenizer",
        tensor_model_parallel_size=ranks,
        pipeline_model_parallel_size=stages,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        ckpt_format="torch",
    )


def write(
    folder: Path,
    architecture: Architecture,
    tensors: dict[str, StoredTensor],
    config: "OutputConfig",
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Write the files of all ranks into an existing folder.

    A vision tower alone has no arguments in its files, as Megatron-LM's converters leave it. The others'
    hold an argparse.Namespace, which Megatron-LM allows torch.load by itself; anywhere else it takes
    `torch.serialization.safe_globals([argparse.Namespace])`.

    Args:
        tensors: of an architecture and a layout that passed `check`, as `adapted` leaves them.
        on_bytes: told the bytes of every tensor as it is written.
    Raises:
        Exception: whatever reading a tensor or writing a file raised.
    """
    ranks, stages = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    pieces = _pieces(architecture, tensors, stages)
    rest: dict[str, Any] = {}
    if architecture.language is not None:
        embedding = tensors[f"{LANGUAGE_MODEL}.embedding.word_embeddings.weight"]
        arguments = _arguments(architecture, embedding.dtype, ranks, stages)
        rest = {
            "args": arguments,
            "checkpoint_version": 3.0,  # of the order of query, key and value: by group
            "iteration": ITERATION,
            "num_floating_point_operations_so_far": 0,
        }
    with ExitStack() as stack:
        files: dict[tuple[int, int], _RankFile] = {}
        for stage in range(stages):
            for rank, room in enumerate(_rooms(pieces, stage, ranks)):
                name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if stages > 1 else "")
                path = folder / f"iter_{ITERATION:07d}" / name / "model_optim_rng.pt"
                path.parent.mkdir(parents=True)
                files[stage, rank] = stack.enter_context(closing(_RankFile(path, room, rest)))
        for piece in pieces:
            on_bytes(_fill(files, piece, ranks))
    (folder / MEGATRON_FILE).write_text(f"{ITERATION}\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """A tensor that is read at once: one layer's, or one outside the layers."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    cut: Cut
    places: tuple[tuple[int, str], ...]
    """Stages that have it, and its name there."""


def _pieces(architecture: Architecture, tensors: dict[str, StoredTensor], stages: int) -> list[_Piece]:
    """Layer by layer, as the source files are, which are so read from front to back."""
    numbered = [
        (layer, key, tensor, read) for key, tensor in tensors.items() for layer, read in enumerate(tensor.chunks)
    ]
    return [
        _Piece(
            shape=tensor.shape,
            dtype=tensor.dtype,
            read=read,
            cut=_cut(key, architecture.language),
            places=_places(key, layer, architecture, stages),
        )
        for layer, key, tensor, read in sorted(numbered, key=lambda item: item[0])
    ]


def _places(key: str, layer: int, architecture: Architecture, stages: int) -> tuple[tuple[int, str], ...]:
    """Where a tensor goes: a tower alone has no prefix, and a stage counts its layers from 0."""
    language, last = architecture.language, stages - 1
    name = key if architecture.vision_projection is not None else key.split(".", 1)[1]
    if language is None or not key.startswith(f"{LANGUAGE_MODEL}."):
        return ((0, name.replace(".layers.", f".layers.{layer}.")),)
    stage, number = divmod(layer, language.num_layers // stages)
    if ".layers." in name:
        return ((stage, name.replace(".layers.", f".layers.{number}.")),)
    if not name.endswith("embedding.word_embeddings.weight"):
        return ((last, name),)
    if language.share_embeddings_and_output_weights and last > 0:  # the last stage has a copy of its own
        return ((0, name), (last, name.replace("embedding.word_embeddings.", "output_layer.")))
    return ((0, name),)


def _cut(key: str, language: LanguageArch | None) -> Cut:
    module, kind = key.split(".")[-2:]
    if module in ("word_embeddings", "output_layer"):
        assert language is not None
        return partial(_vocabulary, language.vocab_size)
    if kind not in ("weight", "bias"):  # a norm's, that is fused with the layer after it
        return _copies
    if module == "linear_fc1" and key.startswith(f"{LANGUAGE_MODEL}."):
        return _gate_and_up
    if module in ("linear_qkv", "linear_fc1", "encoder"):
        return _rows
    if module in ("linear_proj", "linear_fc2") and kind == "weight":
        return _columns
    return _copies


def _copies(tensor: Tensor, ranks: int) -> Iterable[Tensor]:
    return [tensor] * ranks


def _rows(tensor: Tensor, ranks: int) -> Iterable[Tensor]:
    return tensor.chunk(ranks)


def _columns(tensor: Tensor, ranks: int) -> Iterable[Tensor]:
    return tensor.chunk(ranks, dim=1)


def _gate_and_up(tensor: Tensor, ranks: int) -> Iterable[Tensor]:
    """Each rank's rows of the gate above its rows of the other half."""
    gate, up = tensor.chunk(2)
    return map(torch.cat, zip(gate.chunk(ranks), up.chunk(ranks), strict=True))


def _vocabulary(vocab_size: int, table: Tensor, ranks: int) -> Iterable[Tensor]:
    """Padded as Megatron-LM does, with copies of the last row; the zeros that mmcore pads with are left out."""
    rows, known = _padded_vocab_size(vocab_size, ranks) // ranks, table[:vocab_size]
    for rank in range(ranks):
        part = known[rank * rows : (rank + 1) * rows]
        yield torch.cat([part, known[-1].expand(rows - len(part), -1)]) if len(part) < rows else part


def _padded_vocab_size(vocab_size: int, ranks: int) -> int:
    multiple = VOCAB_DIVISOR * ranks
    return -(-vocab_size // multiple) * multiple


def _rooms(pieces: list[_Piece], stage: int, ranks: int) -> list[dict[str, Tensor | None]]:
    """Each rank's state dict at one stage, of tensors without memory."""
    rooms: list[dict[str, Tensor | None]] = [{} for _ in range(ranks)]
    with FakeTensorMode():
        for piece in pieces:
            for name in (name for place, name in piece.places if place == stage):
                whole = torch.empty(piece.shape, dtype=piece.dtype)
                for room, part in zip(rooms, piece.cut(whole, ranks), strict=True):
                    room[name] = torch.empty(part.shape, dtype=part.dtype)  # a storage of its own
                    layer, _, kind = name.rpartition(".")
                    if kind == "weight" and layer.split(".")[-1] in LINEAR_LAYERS:
                        room[f"{layer}._extra_state"] = None
    return rooms


def _fill(files: dict[tuple[int, int], "_RankFile"], piece: _Piece, ranks: int) -> int:
    """Read a tensor, write it into its places and let it go; returns its bytes."""
    tensor = piece.read()
    for rank, part in enumerate(piece.cut(tensor, ranks)):
        for stage, name in piece.places:
            files[stage, rank].fill(name, part)
    return tensor.nbytes


class _RankFile:
    """A file of torch.save's whose tensors are filled in one by one."""

    def __init__(self, path: Path, room: dict[str, Tensor | None], rest: dict[str, Any]) -> None:
        """Lay the file out.

        Args:
            room: the state dict, of fake tensors with a storage each.
            rest: what else the file holds.
        """
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save({**rest, "model": room}, path)
        tensors = {name: tensor for name, tensor in room.items() if tensor is not None}
        with zipfile.ZipFile(path) as archive:  # torch numbers storages as it meets them
            records = [record for record in archive.infolist() if "/data/" in record.filename]
        assert [record.file_size for record in records] == [tensor.nbytes for tensor in tensors.values()]
        self.records = dict(zip(tensors, records, strict=True))
        self.checksums: dict[str, int] = {}
        self.file = path.open("r+b")

    def fill(self, name: str, tensor: Tensor) -> None:
        """Write a tensor into its room."""
        record, content = self.records[name], tensor.contiguous().flatten().view(torch.uint8).numpy().data
        assert len(content) == record.file_size, name
        checksum = self.checksums[record.filename] = zlib.crc32(content)
        self.file.seek(record.header_offset)
        header = self.file.read(_HEADER_SIZE)
        self.file.seek(sum(struct.unpack("<HH", header[-4:])), os.SEEK_CUR)  # lengths of its name and its padding
        self.file.write(content)
        self.file.seek(4, os.SEEK_CUR)  # the mark of what torch writes after a record
        self.file.write(struct.pack("<L", checksum))

    def close(self) -> None:
        """Put right the checksums in the archive's directory: torch does not look at them, other readers do."""
        self.file.close()
        with zipfile.ZipFile(self.file.name, "a") as archive:
            for record in archive.infolist():
                record.CRC = self.checksums.get(record.filename, record.CRC)
            archive.comment = b""  # set, it has the directory written anew
