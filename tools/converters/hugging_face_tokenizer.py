"""The tokenizer of an export: the checkpoint's own files, and in them what pictures need."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chat_templates import TEMPLATES
from sentencepiece import SentencePieceProcessor
from sentencepiece_tokenizer import convert_sentencepiece
from tokenizer_files import SENTENCEPIECE_FILES, TOKENIZER_FILES
from tokenizers import AddedToken, Tokenizer

from mmcore.constants import IMAGE_TAG

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
# The place for a template, and the one that older engines look at.
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")

# Reads tokenizer.json as it stands. LlamaTokenizer, which most folders name, is made anew from the
# vocabulary by transformers 5, and then has other spaces after control tokens.
_CLASS = "PreTrainedTokenizerFast"

# With spaces and line breaks, where tokenizers differ.
_PROBES = ("What is it?", " It is\na  picture", "\n1. Gr\u00fc\u00dfe, \u732b!\n\n", "a")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportTokenizer:
    """A tokenizer's files, ready to be written."""

    files: dict[str, bytes]
    """By name; tokenizer.json and tokenizer_config.json are always among them."""
    encode: Callable[[str], list[int]]
    """Ids of a text in training."""

    def json(self, name: str) -> dict[str, Any]:
        return json.loads(self.files[name])

    def with_files(self, **changes: dict[str, Any]) -> "ExportTokenizer":
        """The same with other contents of JSON files, whose names come without their ending."""
        return replace(self, files=self.files | {f"{name}.json": _bytes(content) for name, content in changes.items()})

    @property
    def special_ids(self) -> dict[str, int | None]:
        """`bos_token_id`, `eos_token_id` and `pad_token_id`."""
        tokenizer, config = _parsed(self.files[TOKENIZER_FILE]), self.json(CONFIG_FILE)
        names = {name: _text(config.get(f"{name}_token")) for name in ("bos", "eos", "pad")}
        return {f"{name}_token_id": None if text is None else tokenizer.token_to_id(text) for name, text in names.items()}


def read_tokenizer(folder: Path, model_max_length: int) -> ExportTokenizer | None:
    """Read a checkpoint's tokenizer, as it is where it has a tokenizer.json; else that is made.

    Args:
        model_max_length: positions of the model, for a tokenizer_config.json that has to be made.
    Returns:
        None if the folder has no tokenizer.
    Raises:
        ValueError: its files cannot be read, or not be converted.
    """
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    model = next((folder / name for name in SENTENCEPIECE_FILES if name in files), None)
    config = _object(folder / CONFIG_FILE, files.get(CONFIG_FILE, b"{}"))
    if TOKENIZER_FILE not in files:
        if model is None:
            return None
        made, special = convert_sentencepiece(model)
        files[TOKENIZER_FILE] = made.to_str(pretty=True).encode()
        config = {
            **special,
            "add_bos_token": "bos_token" in special,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": model_max_length,
            **config,
            "tokenizer_class": _CLASS,
        }
        files[CONFIG_FILE] = _bytes(config)
    files.setdefault(CONFIG_FILE, _bytes({"tokenizer_class": _CLASS}))
    tokenizer = _parsed(files[TOKENIZER_FILE], folder / TOKENIZER_FILE)
    # As training chooses (mmcore.data.tokenizer).
    if model:
        encode = SentencePieceProcessor(model_file=str(model)).encode
    else:
        encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    return ExportTokenizer(files=files, encode=encode)
