"""Tokenizers of a few hundred pieces, built as the families of language models build theirs."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

LINES = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "You are a helpful assistant. system user assistant USER: ASSISTANT: What is it?\n\nA cat.\n",
    "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is in the picture? [/INST] A cat. ",
] * 3

# What Qwen2.5 and LLaMA 3 cut a text at before they merge bytes; LLaMA 3 takes up to three digits at once.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(folder: Path, special: list[str], **config: Any) -> Path:
    """As Qwen2.5's and LLaMA 3's."""
    model = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    return _saved(folder, json.loads(model.to_str()), config)


def spaced(folder: Path, special: list[str], *, begins_with_space: bool = True, **config: Any) -> Path:
    """As LLaMA 2's, which SentencePiece made: every stretch of text begins with a space.

    InternLM2's does not: in its prompts a line break is one token, behind a word and behind `<|im_end|>`.
    """
    model = Tokenizer(models.BPE(unk_token=special[0]))
    prepend = [normalizers.Prepend("\u2581")] if begins_with_space else []
    model.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "\u2581")])
    model.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")  # only while it is trained
    model.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special)
    model.train_from_iterator([line.replace("\n", " ") for line in LINES], trainer)
    content = json.loads(model.to_str())
    vocab = content["model"]["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    content["model"] |= {"byte_fallback": True, "fuse_unk": True}
    content["pre_tokenizer"] = None
    return _saved(folder, content, config)


def _saved(folder: Path, content: dict[str, Any], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
