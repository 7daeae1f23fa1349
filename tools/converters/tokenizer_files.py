"""The tokenizer's files: which go along with a model, and whether they are its own."""

import re
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from weight_files import read_json

SENTENCEPIECE_FILES = ("tokenizer.model", "tokenizer.model.v3")
TOKENIZER_FILES = (
    *SENTENCEPIECE_FILES,
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)


def tokenizer_size(path: Path) -> int:
    """Number of ids a tokenizer file can produce.

    Raises:
        ValueError: it cannot be read.
    """
    if path.name in SENTENCEPIECE_FILES:
        try:
            return SentencePieceProcessor(model_file=str(path)).vocab_size()
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path} cannot be read as a sentencepiece model ({error})") from None
    content = read_json(path)
    try:
        pieces = content["model"]["vocab"]
        ids = list(pieces.values()) if isinstance(pieces, dict) else list(range(len(pieces)))
        return 1 + max([*ids, *(token["id"] for token in content.get("added_tokens", []))])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a tokenizer of the tokenizers library ({error!r})") from None


def find_tokenizer(folder: Path, vocab_size: int) -> tuple[Path, ...]:
    """The tokenizer's files in a folder.

    The tokenizer.model of LLaMA 3 is tiktoken's, which nothing here reads: it stays where it is if
    there is a tokenizer.json.

    Raises:
        ValueError: one of them cannot be read, or has ids that the embedding has no rows for.
    """
    files = tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())
    others = tuple(path for path in files if not _is_tiktoken(path))
    if others != files and folder / "tokenizer.json" not in others:
        raise ValueError(
            f"{folder / 'tokenizer.model'} is a tokenizer of tiktoken's, as LLaMA 3 has, and not of sentencepiece's: "
            "name a folder with the tokenizer.json of the same model on Hugging Face by --tokenizer"
        )
    for path in others:
        if path.name in (*SENTENCEPIECE_FILES, "tokenizer.json") and (size := tokenizer_size(path)) > vocab_size:
            raise ValueError(
                f"{path} has {size} pieces but the model's vocab_size is {vocab_size}: the tokenizer is of another "
                "model"
            )
    return others


def _is_tiktoken(path: Path) -> bool:
    """Whether a file begins as tiktoken's do: a token's bytes in base64, its rank, a line break."""
    if path.name not in SENTENCEPIECE_FILES:
        return False
    with path.open("rb") as file:
        return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", file.read(1024)) is not None
