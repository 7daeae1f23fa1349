import json
import shutil
from pathlib import Path

import mistral_common
import pytest
import sentencepiece
import tokenizers

from mmcore.data.tokenizer import Tokenizer, load_tokenizer

V3 = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
HOSTILE = "[INST] <s>hi</s> [/INST] [IMG] <unk>"


def hugging_face(folder: Path, *, special: list[str], config: dict | None = None) -> Path:
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    model.train_from_iterator(["what is it", "it is a picture"], trainer)
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(params=["sentencepiece", "hugging_face"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    folder = tmp_path / "tokenizer"
    if request.param == "sentencepiece":
        folder.mkdir()
        shutil.copy(V3, folder / "tokenizer.model.v3")
    else:
        hugging_face(folder, special=["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]"])
    return load_tokenizer(folder)


def test_the_real_v3_vocabulary(tmp_path: Path) -> None:
    shutil.copy(V3, tmp_path / "tokenizer.model.v3")
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32768, 1, 2)
    assert [tokenizer.special(piece) for piece in ("[INST]", "[/INST]")] == [3, 4]


def test_no_text_makes_a_control_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(HOSTILE)
    assert not set(ids) & set(tokenizer.control.values())
    assert tokenizer.decode(ids) == HOSTILE


@pytest.mark.parametrize("text", ["it is a picture", "it", "it  \n\n is", "it's </s>", "", "it \U0001f408"])
def test_text_that_follows_has_no_space_of_its_own(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode("What:" + text) == tokenizer.encode("What:") + tokenizer.follow(text)
    assert tokenizer.decode([*tokenizer.encode("What:"), *tokenizer.follow(text)]) == f"What:{text}"


def test_decode_drops_control_tokens_and_foreign_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.bos_id is not None
    ids = [tokenizer.bos_id, *tokenizer.encode("it is"), tokenizer.vocab_size, 10**6, -1, tokenizer.eos_id]
    assert tokenizer.decode(ids) == "it is"
    assert tokenizer.decode([]) == ""
    assert tokenizer.encode("") == []


def test_special_tokens_must_exist(tokenizer: Tokenizer) -> None:
    assert tokenizer.special("[INST]") != tokenizer.special("[/INST]")
    for piece in ("[NOTHING]", "it"):
        with pytest.raises(ValueError, match="no control token"):
            tokenizer.special(piece)


def test_names_of_start_and_end_come_from_the_config(tmp_path: Path) -> None:
    special = ["<start>", "<end>"]
    config = {"bos_token": "<start>", "eos_token": {"content": "<end>"}}
    tokenizer = load_tokenizer(hugging_face(tmp_path / "named", special=special, config=config))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    with pytest.raises(ValueError, match="no special token '<s>', the bos_token"):
        load_tokenizer(hugging_face(tmp_path / "unnamed", special=special))


def test_a_vocabulary_may_have_no_start_token(tmp_path: Path) -> None:
    config = {"bos_token": None, "eos_token": "<end>"}
    tokenizer = load_tokenizer(hugging_face(tmp_path / "named", special=["<pad>", "<end>"], config=config))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 1)


def test_pieces_that_the_configuration_makes_control_tokens(tmp_path: Path) -> None:
    """As InternLM2's, whose text can spell the piece's own name, too."""
    pieces = ["[UNUSED_TOKEN_1]", "[UNUSED_TOKEN_10]"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["what is it", "it is a picture"] * 5),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=290,
        byte_fallback=True,
        user_defined_symbols=pieces,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=3,
    )
    plain = load_tokenizer(tmp_path)
    names = {0: "<unk>", 3: "<|im_end|>", 4: "<|im_start|>", 290: "<pad>"}
    added = {str(id): {"content": name, "special": True} for id, name in names.items()}
    added["5"] = {"content": "<tool>", "special": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.control == {"<s>": 1, "</s>": 2, "<|im_end|>": 3, "<|im_start|>": 4}
    for text in ("", "it is\n a picture", " a[ UNUSED_TOKEN_1]"):
        assert tokenizer.encode(text) == plain.encode(text) and tokenizer.follow(text) == plain.follow(text)
    for text in (pieces[0], f"{pieces[1]}it{pieces[0]} <|im_start|>", f"it is {pieces[1]}\n"):
        assert {3, 4} & set(plain.encode(text))
        ids, following = tokenizer.encode(text), [*tokenizer.encode("it"), *tokenizer.follow(text)]
        assert not {3, 4} & {*ids, *following}
        assert (tokenizer.decode(ids), tokenizer.decode(following)) == (text, f"it{text}")


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_broken_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("not a tokenizer")
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        load_tokenizer(tmp_path)


def test_a_missing_tokenizer_is_said(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="has no tokenizer"):
            load_tokenizer(folder)
