"""A SentencePiece model as the tokenizers library keeps it: the same ids for the same texts.

One exception: text that follows a user-defined symbol, of which language models have few or none, gets
a leading space that SentencePiece does not give it.
"""

from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

SPACE = "\u2581"  # what SentencePiece writes for a space

# sentencepiece_model.proto: TrainerSpec.ModelType and SentencePiece.Type.
_BPE = 2
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def convert_sentencepiece(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """Build the tokenizer.

    It begins a sequence by the start token, and every stretch of text between control tokens as
    SentencePiece begins a text: with a space.

    Returns:
        The tokenizer, and its special tokens by the names that tokenizer_config.json has for them.
    Raises:
        ValueError: not a SentencePiece model, or not of byte-pair encoding.
    """
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # of protobuf's, whose module is no dependency of ours
        raise ValueError(f"{path} cannot be read as a SentencePiece model ({error}): copy it again") from None
    if model.trainer_spec.model_type != _BPE or model.trainer_spec.treat_whitespace_as_suffix:
        raise ValueError(
            f"{path} is a SentencePiece model of another kind than byte-pair encoding with leading spaces, which is "
            "all that is converted here: put the tokenizer.json of the same model beside it"
        )
    trainer = model.trainer_spec
    tokenizer = Tokenizer(
        BPE(
            vocab={piece.piece: id for id, piece in enumerate(model.pieces)},
            merges=_merges(model.pieces),
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    )
    tokenizer.normalizer = _normalizer(model.normalizer_spec)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", left=1, right=0)] if model.normalizer_spec.add_dummy_prefix else []),
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
            for piece in model.pieces
            if piece.type in (_CONTROL, _USER_DEFINED)
        ]
    )
    known = {"bos": trainer.bos_id, "eos": trainer.eos_id, "unk": trainer.unk_id, "pad": trainer.pad_id}
    special = {f"{name}_token": model.pieces[id].piece for name, id in known.items() if id >= 0}
    if start := special.get("bos_token"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[start, "$A"], pair=[start, "$A", start, "$B"], special_tokens=[(start, trainer.bos_id)]
        )
    return tokenizer, special


def _merges(pieces: Any) -> list[tuple[str, str]]:
    """Pairs that become a piece, in the order in which SentencePiece prefers them: by the piece's score.

    Runs of spaces all have the same score in models such as Mistral's, and SentencePiece then goes on
    where it began, at the left: a longer left part comes first.
    """
    scores = {piece.piece: piece.score for piece in pieces if piece.type == _NORMAL}
    pairs = [
        (text[:cut], text[cut:])
        for text in scores
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    return sorted(pairs, key=lambda pair: (-scores[pair[0] + pair[1]], -len(pair[0])))


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)
