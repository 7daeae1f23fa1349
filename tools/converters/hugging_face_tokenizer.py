"""The tokenizer of an export: the checkpoint's own files, and in them what pictures need."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chat_templates import GLUES, TEMPLATES, Glue
from sentencepiece import SentencePieceProcessor
from sentencepiece_tokenizer import convert_sentencepiece
from tokenizer_files import SENTENCEPIECE_FILES, TOKENIZER_FILES
from tokenizers import AddedToken, Tokenizer
from weight_files import read_json

from mmcore.constants import IMAGE_TAG

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
TEMPLATE_FILE, OLD_TEMPLATE_FILE = "chat_template.jinja", "chat_template.json"  # engines look at one or the other

# Takes tokenizer.json as it stands. LlamaTokenizer, which most folders name, is made anew from the
# vocabulary by transformers 5, with other spaces after control tokens; what that class and its kin have
# by default is written out instead.
_CLASS = "PreTrainedTokenizerFast"
_DEFAULTS = {"clean_up_tokenization_spaces": False, "padding_side": "left"}

# What mmcore.data.tokenizer takes where no configuration names them.
_ENDS = {"bos_token": "<s>", "eos_token": "</s>"}

# With spaces and line breaks, where tokenizers differ.
_PROBES = ("What is it?", " It is\na  picture", "\n1. Gr\u00fc\u00dfe, \u732b!\n\n", "a")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportTokenizer:
    """A tokenizer and its files, to be written as they are."""

    files: dict[str, bytes]
    tokenizer: Tokenizer
    """Of tokenizer.json."""
    config: dict[str, Any]
    """Of tokenizer_config.json."""
    encode: Callable[[str], list[int]]
    """Ids of a text in training."""

    @property
    def special_ids(self) -> dict[str, int | None]:
        """`bos_token_id`, `eos_token_id` and `pad_token_id`, as configurations name them."""
        found: dict[str, int | None] = {}
        for name in ("bos_token", "eos_token", "pad_token"):
            token = self.config.get(name)
            text = token["content"] if isinstance(token, dict) else token
            found[f"{name}_id"] = None if text is None else self.tokenizer.token_to_id(text)
        return found


def read_tokenizer(folder: Path, model_max_length: int) -> ExportTokenizer | None:
    """Read a checkpoint's tokenizer; a tokenizer.json is made where there is only a SentencePiece model.

    Args:
        model_max_length: positions of the model, for the tokenizer_config.json beside it.
    Returns:
        None if the folder has no tokenizer.
    Raises:
        ValueError: its files cannot be read, or cannot be converted.
    """
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    config = read_json(folder / CONFIG_FILE) if CONFIG_FILE in files else {}
    config.pop("auto_map", None)  # code of a repository's own, which does not go along
    model = next((folder / name for name in SENTENCEPIECE_FILES if name in files), None)
    if TOKENIZER_FILE in files:
        tokenizer = _load(folder / TOKENIZER_FILE)
        ends = {name: text for name, text in _ENDS.items() if tokenizer.token_to_id(text) is not None}
        config = {**ends, **(config or _as_it_stands({}))}
    elif model:
        tokenizer, special = convert_sentencepiece(model)
        files[TOKENIZER_FILE] = tokenizer.to_str(pretty=True).encode()
        known = {"add_bos_token": "bos_token" in special, "model_max_length": model_max_length}
        config = _as_it_stands({**special, **known, **config})
    else:
        return None
    if CONFIG_FILE not in files or config != read_json(folder / CONFIG_FILE):
        files[CONFIG_FILE] = _bytes(config)
    if model and model.name != SENTENCEPIECE_FILES[0]:
        files[SENTENCEPIECE_FILES[0]] = files.pop(model.name)
    # As mmcore.data.tokenizer chooses.
    encode = SentencePieceProcessor(model_file=str(model)).encode if model else _encoder(tokenizer)
    return ExportTokenizer(files=files, tokenizer=tokenizer, config=config, encode=encode)


def with_image_token(known: ExportTokenizer) -> tuple[ExportTokenizer, int]:
    """Add <image> where it is not, at the next free id.

    Returns:
        The tokenizer, and the id.
    Raises:
        ValueError: there is no such id, for those in use have gaps.
    """
    added = {token.content: id for id, token in known.tokenizer.get_added_tokens_decoder().items()}
    if IMAGE_TAG in added:
        return known, added[IMAGE_TAG]
    used = {id for text, id in known.tokenizer.get_vocab(with_added_tokens=True).items() if text != IMAGE_TAG}
    tokenizer = Tokenizer.from_str(known.tokenizer.to_str())
    tokenizer.add_special_tokens([AddedToken(IMAGE_TAG, normalized=False)])
    id = tokenizer.token_to_id(IMAGE_TAG)
    assert id is not None
    if id in used:
        raise ValueError(f"{TOKENIZER_FILE}: its ids have gaps, and {IMAGE_TAG} would be {id}, which is in use")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    token = {"content": IMAGE_TAG, **flags}
    # By hand, so that all else stays as older tokenizers wrote and read it.
    content = json.loads(known.files[TOKENIZER_FILE])
    content["added_tokens"] = [*content.get("added_tokens", []), {"id": id, **token}]
    decoder = {**known.config.get("added_tokens_decoder", {}), str(id): token}
    config = _as_it_stands({**known.config, "added_tokens_decoder": decoder})
    files = known.files | {TOKENIZER_FILE: _bytes(content), CONFIG_FILE: _bytes(config)}
    return replace(known, files=files, tokenizer=tokenizer, config=config), id


def with_chat_template(known: ExportTokenizer, conversation: str) -> tuple[ExportTokenizer, str]:
    """Write the template that the model was tuned with, in the place of any other.

    Args:
        known: has <image>.
        conversation: of `Architecture`.
    Returns:
        The tokenizer, and a line for the report.
    """
    template = TEMPLATES.get(conversation)
    if template is None:
        return known, f"no chat template for pictures: none is known for conversations of {conversation!r}"
    if missing := [token for token in template.control if known.tokenizer.token_to_id(token) is None]:
        return known, f"no chat template for pictures: the tokenizer lacks {' and '.join(missing)} of {conversation}"
    glue = _glue(known)
    text = template.written(glue or GLUES[0])
    config = {key: value for key, value in known.config.items() if key != "chat_template"}
    files = known.files | {
        CONFIG_FILE: _bytes(config),
        TEMPLATE_FILE: text.encode(),
        OLD_TEMPLATE_FILE: _bytes({"chat_template": text}),
    }
    doubt = ", but some texts have other tokens than in training" if glue is None else ""
    return replace(known, files=files, config=config), f"chat template {conversation}{doubt}"


def has_chat_template(known: ExportTokenizer) -> bool:
    """Whether the files bring one."""
    return "chat_template" in known.config or bool({TEMPLATE_FILE, OLD_TEMPLATE_FILE} & known.files.keys())


def _glue(known: ExportTokenizer) -> Glue | None:
    """The glue with which texts after a control token have the ids of training, or None if none does it."""
    id = known.tokenizer.token_to_id(IMAGE_TAG)
    whole = _encoder(known.tokenizer)
    for glue in GLUES:
        if all(whole(IMAGE_TAG + glue.join(text)) == [id, *known.encode(text)] for text in _PROBES):
            return glue
    return None


def _encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _as_it_stands(config: dict[str, Any]) -> dict[str, Any]:
    return {**_DEFAULTS, **config, "tokenizer_class": _CLASS}


def _load(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{path} cannot be read as a tokenizer ({error}): copy it again") from None
    tokenizer.no_padding()  # which may be to any length
    tokenizer.no_truncation()
    return tokenizer


def _bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
