"""Pictures, annotations, tokenizers and loaders of a few kilobytes."""

import io
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import sentencepiece
from PIL import Image

from mmcore.config import DataConfig
from mmcore.data.loader import Loader, build_loader
from mmcore.data.pictures import Pictures
from mmcore.data.shards import ShardWriter
from mmcore.data.tokenizer import Tokenizer, load_tokenizer

NUM_IMAGE_EMBEDDINGS = 4


def picture(seed: int, size: tuple[int, int] = (20, 16), kind: str = "PNG", mode: str = "RGB") -> bytes:
    """A picture of noise, encoded."""
    image = Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1])).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def conversation(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def write_tokenizer(folder: Path) -> Path:
    """A SentencePiece model of 300 pieces with Mistral's control tokens."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["what is number one two three in the picture", "it is a picture of number"] * 5),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        control_symbols=["[INST]", "[/INST]"],
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def write_shards(output: Path, count: int, *, broken: frozenset[int] = frozenset(), split: str = "train") -> Path:
    """Samples 0 to `count`; the pictures of `broken` ones are cut short."""
    with ShardWriter(output, samples_per_shard=20) as writer:
        for index in range(count):
            data = picture(index)
            talk = conversation(f"<image>\nwhat is number {index}", f"it is number {index} " + "one " * (index % 5))
            text = json.dumps({"id": str(index), "conversations": talk}).encode()
            writer.write(split, f"{index:08d}", {"png": data[:400] if index in broken else data, "json": text})
    return output


def pictures(image_token_id: int, **changes: Any) -> Pictures:
    """Of a model that sees squares of 16 pixels in 4 patches."""
    arguments = {"image_size": 16, "num_square_embeddings": NUM_IMAGE_EMBEDDINGS, "background": (1, 2, 3)}
    return Pictures(image_token_id=image_token_id, **{**arguments, **changes})


def loader(path: Path | str, tokenizer: Tokenizer, *, data: dict[str, Any] | None = None, **changes: Any) -> Loader:
    """A loader of one rank without workers, unless told otherwise."""
    config = DataConfig(path=str(path), seq_length=64, num_workers=0, shuffle_buffer_size=16, packing_buffer_size=0)
    arguments = {
        "conversation": "mistral_instruct",
        "pictures": pictures(tokenizer.vocab_size),
        "micro_batch_size": 4,
        "data_parallel_rank": 0,
        "data_parallel_size": 1,
        "seed": 7,
    }
    return build_loader(replace(config, **data or {}), tokenizer=tokenizer, **{**arguments, **changes})


def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(write_tokenizer(folder))
