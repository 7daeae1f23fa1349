"""Text to token ids and back. Control tokens are placed by templates; no text can make one."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcore.foreign import parse_json

# SentencePiece is preferred: a Hugging Face folder's tokenizer.json is converted from it.
SENTENCEPIECE_FILES = ("tokenizer.model", "tokenizer.model.v3")
HUGGING_FACE_FILE = "tokenizer.json"
HUGGING_FACE_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A vocabulary, its control tokens apart."""

    path: Path
    """File that it was read from."""
    vocab_size: int
    """Ids it can produce; the embedding has at least as many rows."""
    bos_id: int | None
    """None where a text begins with no token, as Qwen's do."""
    eos_id: int
    control: dict[str, int]
    """Tokens that only templates write: `<s>`, `</s>`, `[INST]`, ..."""
    encode: Callable[[str], list[int]]
    """Ids of a text, never a control token: a text that spells one is spelled out."""
    follow: Callable[[str], list[int]]
    """The same of a text that goes on after other text: without the space that SentencePiece begins a text with."""
    decode_text: Callable[[list[int]], str]
    """Text of ids that are all in the vocabulary and no control tokens."""

    def special(self, piece: str) -> int:
        """Id of a control token.

        Raises:
            ValueError: the vocabulary has no such control token.
        """
        if piece not in self.control:
            raise ValueError(
                f"{self.path} has no control token {piece!r}: take a conversation template that does without it, or "
                "the tokenizer of a model that was tuned with it"
            )
        return self.control[piece]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; control tokens and ids outside the vocabulary (an image's) leave nothing."""
        drop = set(self.control.values())
        return self.decode_text([id for id in ids if 0 <= id < self.vocab_size and id not in drop])


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer of a checkpoint folder's `tokenizer/`.

    Raises:
        ValueError: there is none, it cannot be read, or it has no start or end token.
    """
    for name in SENTENCEPIECE_FILES:
        if (folder / name).is_file():
            return _sentencepiece(folder / name)
    if (folder / HUGGING_FACE_FILE).is_file():
        return _hugging_face(folder / HUGGING_FACE_FILE)
    raise ValueError(
        f"{folder} has no tokenizer ({', '.join((*SENTENCEPIECE_FILES, HUGGING_FACE_FILE))}): "
        "copy the language model's own there"
    )


def _sentencepiece(path: Path) -> Tokenizer:
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read as a SentencePiece model ({error}): copy it again") from None
    if model.bos_id() < 0 or model.eos_id() < 0:
        raise ValueError(f"{path} has no start or no end token: it is not a language model's tokenizer")
    control = {model.id_to_piece(id): id for id in range(model.vocab_size()) if model.is_control(id)}
    renamed = _renamed(_read_config(path.with_name(HUGGING_FACE_CONFIG)), model)
    encode = _spelling_out([model.id_to_piece(id) for id in renamed.values()], model.encode)
    return Tokenizer(
        path=path,
        vocab_size=model.vocab_size(),
        bos_id=model.bos_id(),
        eos_id=model.eos_id(),
        control=control | renamed,
        encode=encode,
        follow=_following(encode),
        decode_text=model.decode,
    )


def _renamed(config: dict[str, Any], model: Any) -> dict[str, int]:
    """Pieces that Hugging Face's configuration makes control tokens, by the name that it gives them.

    InternLM2's `<|im_start|>` is the piece `[UNUSED_TOKEN_146]` of its SentencePiece model.
    """
    added = config.get("added_tokens_decoder") or {}
    tokens = {int(id): token["content"] for id, token in added.items() if token.get("special")}
    return {
        name: id
        for id, name in tokens.items()
        if id < model.vocab_size() and not model.is_control(id) and not model.is_unknown(id)
    }


def _spelling_out(pieces: list[str], encode: Callable[[str], list[int]]) -> Callable[[str], list[int]]:
    """Encode without these pieces: a text is cut behind the first character of each."""
    if not pieces:
        return encode
    inside = re.compile("|".join(f"(?<={re.escape(piece[0])})(?={re.escape(piece[1:])})" for piece in pieces))
    follow = _following(encode)

    def encode_parts(text: str) -> list[int]:
        first, *rest = inside.split(text)
        return [*encode(first), *(id for part in rest for id in follow(part))]

    return encode_parts


def _hugging_face(path: Path) -> Tokenizer:
    import tokenizers

    try:
        model = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{path} cannot be read as a tokenizer ({error}): copy it again") from None
    model.encode_special_tokens = True  # a special token's name in a text is text
    model.no_padding()  # which may be to any length
    model.no_truncation()
    control = {token.content: id for id, token in model.get_added_tokens_decoder().items() if token.special}
    config = _read_config(path.with_name(HUGGING_FACE_CONFIG))
    names = {key: _content(config.get(key), default) for key, default in (("bos_token", "<s>"), ("eos_token", "</s>"))}
    if "bos_token" in config and config["bos_token"] is None:
        del names["bos_token"]
    for key, name in names.items():
        if name not in control:
            raise ValueError(
                f"{path} has no special token {name!r}, the {key}: name the right one in {HUGGING_FACE_CONFIG}"
            )

    def encode(text: str) -> list[int]:
        return model.encode(text, add_special_tokens=False).ids

    return Tokenizer(
        path=path,
        vocab_size=1 + max(model.get_vocab(with_added_tokens=True).values()),
        bos_id=control.get(names.get("bos_token", "")),
        eos_id=control[names["eos_token"]],
        control=control,
        encode=encode,
        follow=_following(encode),
        decode_text=model.decode,
    )


def _following(encode: Callable[[str], list[int]]) -> Callable[[str], list[int]]:
    """`Tokenizer.follow`: encode behind a character that merges with nothing, where that makes a difference."""
    mark = "\x01"

    def follow(text: str) -> list[int]:
        return encode(mark + text)[len(encode(mark)) :]

    return encode if follow("a") == encode("a") else follow


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}): copy it again, or remove it") from None
    return content if isinstance(content, dict) else {}


def _content(token: Any, default: str) -> str:
    """A token's text: Hugging Face writes it bare or as {"content": text, ...}."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else default
