"""Export a checkpoint as a Hugging Face folder: a LLaVA, or its language model or vision tower alone.

`python tools/converters/export_hf.py --input run --output llava-hf`

Takes what a converter, combine.py or mmcore train wrote, trained at any layout.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Literal

import hugging_face
import hugging_face_config
import torch
from checkpoint_folder import new_folder, stored_tensors
from command_line import run
from conversion import progress_bar, verify
from hugging_face_tokenizer import (
    ExportTokenizer,
    has_chat_template,
    read_tokenizer,
    with_chat_template,
    with_image_token,
)
from parity.memory import check_memory
from picture_processors import check_pictures, image_processor
from safetensors_folder import Shard, split, total_bytes, write_folder
from torch import Tensor
from weight_map import DifferencesError, Dtype, Parts, export

from mmcore.constants import IMAGE_TAG, TOKENIZER_DIR
from mmcore.models.architecture import Architecture, PictureArch, load_architecture, newest

# Tables with a row for each token; those that have to grow do so to a multiple, as llava-hf's own did.
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
ROWS_DIVISOR = 64

GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """Export a checkpoint as a Hugging Face folder: a LLaVA, or its language model or vision tower alone."""

    input: Path
    """Checkpoint, or a run, whose newest checkpoint is taken."""
    output: Path
    """Folder to write."""
    part: Literal["auto", "llava", "language", "vision"] = "auto"
    """What to export; auto is all that the checkpoint has."""
    dtype: Dtype = "keep"
    """What to store the weights as; "keep" is as they are."""
    max_shard_size_gb: float = 5.0
    """Weights are dealt out to files that are no larger (in 10^9 bytes)."""
    verify: bool = False
    """Compare the folder with the checkpoint in fp32, at tensor parallel sizes 1, 2, 4 and pipeline sizes 1, 2."""
    dry_run: bool = False
    """Check everything and print the plan, tensor by tensor; write nothing."""
    overwrite: bool = False
    """Replace an export that is at the output."""

    def __post_init__(self) -> None:
        if self.max_shard_size_gb <= 0:
            raise ValueError(f"--max-shard-size-gb must be above 0, not {self.max_shard_size_gb}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """A plan: all is checked, nothing is written."""

    checkpoint: Path
    parts: list[Parts]
    shards: list[Shard]
    files: dict[str, bytes]
    """All but the weights, by name."""
    notes: tuple[str, ...]
    """Lines of the report."""


def plan(config: ExportConfig) -> Export:
    """Plan the export; reads no weights.

    Raises:
        ValueError: the checkpoint has no such part, or Hugging Face has no model of that kind.
    """
    checkpoint = newest(config.input)
    whole = load_architecture(checkpoint)
    architecture = _selected(whole, config.part, checkpoint)
    if config.verify and whole.vision_projection is not None and architecture.vision_projection is None:
        raise ValueError(f"--verify compares all of a checkpoint: leave it out with --part {config.part}")
    hugging_face_config.check_projector(architecture)
    if architecture.vision_projection is not None:
        check_pictures(architecture.pictures)
    parts = _tensors(architecture, checkpoint, config.dtype)
    tokenizer, notes = None, []
    if architecture.language is not None:
        limit = architecture.language.max_position_embeddings
        tokenizer = read_tokenizer(checkpoint / TOKENIZER_DIR, limit)
        if tokenizer is None:
            notes.append("no tokenizer in the checkpoint: none is written, and no processor or chat template")
    if architecture.vision_projection is not None:
        architecture, tokenizer, told = _with_pictures(architecture, tokenizer)
        assert architecture.language is not None
        parts = [_extended(part, architecture.language.vocab_size) for part in parts]
        notes += told
    dtypes = {part.dtype for part in parts}
    dtype = reduce(torch.promote_types, dtypes)
    if len(dtypes) > 1:
        notes.append(f"weights of several dtypes are loaded as {_name(dtype)}, which holds them all; --dtype makes one")
    return Export(
        checkpoint=checkpoint,
        parts=parts,
        shards=split(parts, int(config.max_shard_size_gb * 1e9)),
        files=_files(architecture, tokenizer, dtype, checkpoint),
        notes=tuple(notes),
    )


def _selected(whole: Architecture, part: str, checkpoint: Path) -> Architecture:
    """The architecture of what is exported, and no more."""
    if part == "auto":
        part = "llava" if whole.vision_projection else "language" if whole.language else "vision"
    found = {"llava": whole.vision_projection, "language": whole.language, "vision": whole.vision}
    if found[part] is None:
        has = " and ".join(name for name, arch in found.items() if arch is not None)
        raise ValueError(f"--part {part}: {checkpoint} has none, only {has}")
    if part == "llava":
        return whole
    return Architecture(
        vision=whole.vision if part == "vision" else None,
        language=whole.language if part == "language" else None,
        pictures=whole.pictures if whole.pictures.tiling == "none" or part != "vision" else PictureArch(mode="squash"),
        conversation=whole.conversation,
    )


def _tensors(architecture: Architecture, checkpoint: Path, dtype: Dtype) -> list[Parts]:
    """What to write, by Hugging Face's names."""
    found: list[Parts] = []
    problems: list[str] = []
    for part in hugging_face.parts(architecture):
        try:
            tensors = export(part.rows, part.num_layers, stored_tensors(checkpoint, part.module), dtype)
        except DifferencesError as error:
            problems += error.problems
            continue
        for each in tensors:
            found.append(replace(each, shapes={part.full_name(name): shape for name, shape in each.shapes.items()}))
    if problems:
        raise DifferencesError(problems, str(checkpoint))
    return found


def _with_pictures(
    architecture: Architecture, tokenizer: ExportTokenizer | None
) -> tuple[Architecture, ExportTokenizer | None, list[str]]:
    """Make <image> a token of the tokenizer, with a row, which engines look up before the picture takes its place.

    Ours has no need of one, and may lie beyond the tables.
    """
    language, id, notes = architecture.language, architecture.image_token_id, []
    assert language is not None and id is not None
    if tokenizer is not None:
        given = tokenizer
        tokenizer, id = with_image_token(given)
        if tokenizer is given and has_chat_template(given):
            notes.append("chat template of the tokenizer, which knows pictures")
        else:
            tokenizer, note = with_chat_template(tokenizer, architecture.conversation)
            notes.append(note)
    rows = language.vocab_size
    if id >= rows:
        rows = -(-(id + 1) // ROWS_DIVISOR) * ROWS_DIVISOR
    notes.append(f"{IMAGE_TAG} is token {id}; the vocabulary has {rows} rows, {rows - language.vocab_size} of them new")
    return replace(architecture, image_token_id=id, language=replace(language, vocab_size=rows)), tokenizer, notes


def _extended(parts: Parts, rows: int) -> Parts:
    """The same, with rows added to what has one for each token."""
    if not next(iter(parts.shapes)).endswith(TABLES):
        return parts
    ((name, (held, width)),) = parts.shapes.items()
    if held == rows:
        return parts
    new = rows - held
    return replace(
        parts,
        shapes={name: (rows, width)},
        read=partial(_read_extended, parts.read, new),
        origin=f"{parts.origin}, and {new} rows of their mean",
    )


def _read_extended(read: Callable[[], tuple[Tensor, ...]], num_rows: int) -> tuple[Tensor, ...]:
    """A table [v, h], and `num_rows` more rows that are the mean of its own.

    The logit of such a row is the mean of the others' logits, and so never the largest: nothing that is
    generated greedily changes.
    """
    (table,) = read()
    mean = sum(block.float().sum(0) for block in table.split(4096)) / len(table)  # [h]
    return table, mean.to(table.dtype).expand(num_rows, -1)


def _files(
    architecture: Architecture, tokenizer: ExportTokenizer | None, dtype: torch.dtype, checkpoint: Path
) -> dict[str, bytes]:
    special_ids: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    files: dict[str, bytes] = {}
    if tokenizer is not None:
        special_ids = tokenizer.special_ids
        files |= tokenizer.files
    content = {"config.json": hugging_face_config.config(architecture, _name(dtype), special_ids, checkpoint)}
    if architecture.language is not None:
        content[GENERATION_FILE] = hugging_face_config.generation_config(special_ids)
    if architecture.vision is not None:
        content["preprocessor_config.json"] = image_processor(architecture.vision, architecture.pictures)
        if architecture.language is not None and tokenizer is not None:
            content["processor_config.json"] = hugging_face_config.processor(architecture)
    files |= {name: (json.dumps(value, indent=2) + "\n").encode() for name, value in content.items()}
    own = checkpoint / TOKENIZER_DIR / GENERATION_FILE  # as llava.py brings it along: it may end at more tokens
    return files | ({GENERATION_FILE: own.read_bytes()} if own.is_file() else {})


def convert(config: ExportConfig) -> list[str]:
    """Write the folder, or print what would be written.

    Returns:
        Lines that tell what was done.
    Raises:
        ValueError: the input or the output does not fit.
        VerificationError: transformers computes something else from the folder. Nothing is left of it.
    """
    found = plan(config)
    total = total_bytes(found.shards)
    size = f"{sum(len(shard.tensors) for shard in found.shards)} tensors, {total / 1e6:.1f} MB"
    notes = [f"  {note}" for note in found.notes]
    if config.dry_run:
        return [*_lines(found), *notes, f"nothing was written (--dry-run); {size}"]
    if config.verify:
        check_memory(sum(math.prod(header.shape) for shard in found.shards for header in shard.tensors.values()))
    inputs = (config.input, found.checkpoint)
    with new_folder(config.output, config.overwrite, *inputs, what="an export", is_one=is_export) as folder:
        for name, content in found.files.items():
            (folder / name).write_bytes(content)
        with progress_bar("writing", total) as on_bytes:
            write_folder(folder, found.parts, found.shards, on_bytes)
        proof = verify(found.checkpoint, folder) if config.verify else []
    return [f"wrote {config.output}: {size}", *notes, *(f"  {line}" for line in proof)]


def is_export(folder: Path) -> bool:
    """Whether a folder holds what `convert` writes."""
    weights = (folder / "model.safetensors", folder / "model.safetensors.index.json")
    return (folder / "config.json").is_file() and any(path.is_file() for path in weights)


def _lines(found: Export) -> Iterator[str]:
    """What --dry-run prints: every file, and every tensor of it."""
    yield from sorted(found.files)
    origins = {name: part.origin for part in found.parts for name in part.shapes}
    for shard in found.shards:
        for name, header in shard.tensors.items():
            yield f"{shard.name}: {name} {list(header.shape)} {_name(header.dtype)} <- {origins[name]}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(run(ExportConfig, convert))
