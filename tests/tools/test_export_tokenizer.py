"""What an engine makes of a conversation and its pictures: the ids and pixels of training."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import clip
import combine
import export_hf
import mistral
import mistral_common
import pytest
import sentencepiece
import torch
from chat_templates import GLUES, TEMPLATES
from hugging_face_config import processor
from hugging_face_tokenizer import read_tokenizer, with_chat_template, with_image_token
from jinja2.sandbox import ImmutableSandboxedEnvironment
from picture_processors import image_processor
from PIL import Image
from sentencepiece_tokenizer import convert_sentencepiece
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, CLIPVisionModel, MistralForCausalLM
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmcore.data import templates
from mmcore.data.conversation import encode_conversation, encode_prompt
from mmcore.data.image import preprocess
from mmcore.data.templates import Turn
from mmcore.data.tokenizer import Tokenizer, load_tokenizer
from mmcore.models.architecture import Architecture, load_architecture, save_architecture
from mmcore.models.presets import default_pictures
from tests.data.fabricated import write_tokenizer
from tests.data.vocabularies import byte_level, spaced
from tests.tools.conftest import build_language, build_tower

DATA = Path(mistral_common.__file__).parent / "data"
V3 = DATA / "mistral_instruct_tokenizer_240323.model.v3"
IMAGE = 32768


def checkpoint(folder: Path, files: dict[str, Path | bytes], vocab_size: int = IMAGE) -> Path:
    """A whole model with such a tokenizer, pictures of 28 pixels in patches of 14."""
    tower = build_tower(CLIPVisionModel, image_size=28, patch_size=14, num_hidden_layers=2)
    tower.save_pretrained(folder / "tower")
    language = build_language(MistralForCausalLM, vocab_size=vocab_size, num_hidden_layers=1).bfloat16()
    language.save_pretrained(folder / "language_hf")
    for name, content in files.items():
        if isinstance(content, Path):
            shutil.copy(content, folder / "language_hf" / name)
        else:
            (folder / "language_hf" / name).write_bytes(content)
    clip.convert(clip.ClipConfig(input=folder / "tower", output=folder / "vision"))
    mistral.convert(mistral.MistralConfig(input=folder / "language_hf", output=folder / "language"))
    combine.convert(
        combine.CombineConfig(vision=folder / "vision", language=folder / "language", output=folder / "model")
    )
    return folder / "model"


def converted(**changes: Any) -> bytes:
    """The tokenizer.json of Mistral's v3, changed."""
    content = json.loads(convert_sentencepiece(V3)[0].to_str())
    return json.dumps(content | changes).encode()


METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
CONFIG = json.dumps({"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "legacy": False})
# How Mistral's tokenizer comes along: alone; with a tokenizer.json that begins every stretch of text with a
# space, or only the first; without the model that they were made from.
TOKENIZERS: dict[str, dict[str, Path | bytes]] = {
    "v3": {"tokenizer.model.v3": V3},
    "every stretch": {"tokenizer.model": V3, "tokenizer.json": converted(), "tokenizer_config.json": CONFIG.encode()},
    "first stretch": {
        "tokenizer.model": V3,
        "tokenizer.json": converted(normalizer=None, pre_tokenizer=METASPACE),
        "tokenizer_config.json": CONFIG.encode(),
    },
    "no model": {
        "tokenizer.json": converted(normalizer=None, pre_tokenizer=METASPACE),
        "tokenizer_config.json": CONFIG.encode(),
    },
    "no configuration": {"tokenizer.json": converted()},
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """Training's tokenizer, and the processor of the export."""
    folder = tmp_path_factory.mktemp("served")
    model = checkpoint(folder, TOKENIZERS[request.param])
    export_hf.convert(export_hf.ExportConfig(input=model, output=folder / "out"))
    return load_tokenizer(model / "tokenizer"), AutoProcessor.from_pretrained(folder / "out")


def picture(size: tuple[int, int] = (40, 31)) -> Image.Image:
    return Image.frombytes("RGB", size, random.Random(sum(size)).randbytes(3 * size[0] * size[1]))


def messages(turns: list[Turn], as_list: bool) -> list[dict[str, Any]]:
    """Of an engine: texts with tags, or lists of texts and pictures."""
    found = []
    for role, text in turns:
        if not as_list:
            found.append({"role": role, "content": text})
            continue
        first, *rest = text.split("<image>")
        items = [{"type": "text", "text": first}] if first else []
        for part in rest:
            items += [{"type": "image", "image": picture()}, *([{"type": "text", "text": part}] if part else [])]
        found.append({"role": role, "content": items})
    return found


def served_ids(processor: Any, turns: list[Turn], as_list: bool, **options: Any) -> list[int]:
    talk = messages(turns, as_list)
    if as_list:
        encoded = processor.apply_chat_template(talk, tokenize=True, return_dict=True, **options)
    else:
        pictures = [picture()] * sum(turn.text.count("<image>") for turn in turns)
        text = processor.apply_chat_template(talk, **options)
        encoded = processor(text=text, images=pictures or None, add_special_tokens=False)
    return encoded["input_ids"][0]


TALKS = {
    "one question": ["What is it?", "A cat."],
    "a picture": ["<image>\nWhat is it?", "A cat."],
    "a picture last": ["What is it?\n<image>", "A cat."],
    "a picture alone": ["<image>", "A cat."],
    "pictures between": ["This\n<image>\nand <image>\n\n\nor\n\n<image>\n<image>is?", "  A cat. "],
    "several turns": ["<image>\nHi", "Hello  ", "  And now?\n", "Nothing.", "Why <image>", "\nBecause\n\n"],
    "other letters": ["Gru\u0308\u00dfe \U0001f408 \u732b\t", "\u2581 \u200b done " + " " * 40 + "x"],
}


def sizes(image_token_id: int, num_images: int, places: int = 4) -> dict[str, Any]:
    """What training lays out of so many pictures."""
    return {"pictures": [[image_token_id] * places] * num_images, "image_token_id": image_token_id}


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("system", ["", "Be brief.\n<image> "])
@pytest.mark.parametrize("name", TALKS)
def test_conversations_have_the_ids_of_training(served: Any, name: str, system: str, as_list: bool) -> None:
    tokenizer, processor = served
    turns = [Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(TALKS[name])]
    if system:
        turns = [Turn("system", system.replace("<image>", "")), *turns]
    num_images = sum(turn.text.count("<image>") for turn in turns)
    encoded = encode_conversation(turns, tokenizer, "mistral_instruct", **sizes(processor.image_token_id, num_images))
    assert served_ids(processor, turns, as_list) == [*encoded.tokens, encoded.labels[-1]]


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("question", ["<image>\nWhat is it?", "What is\n<image>", "What is it?"])
def test_prompts_have_the_ids_of_training(served: Any, question: str, as_list: bool) -> None:
    tokenizer, processor = served
    places = sizes(processor.image_token_id, question.count("<image>"))
    wanted = encode_prompt(question, tokenizer, "mistral_instruct", **places)
    assert served_ids(processor, [Turn("user", question)], as_list, add_generation_prompt=True) == wanted


def test_plain_has_the_ids_of_training(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, TOKENIZERS["first stretch"])
    save_architecture(replace(load_architecture(model), conversation="plain"), model)
    export_hf.convert(export_hf.ExportConfig(input=model, output=tmp_path / "out"))
    tokenizer, processor = load_tokenizer(model / "tokenizer"), AutoProcessor.from_pretrained(tmp_path / "out")
    places = sizes(processor.image_token_id, 1)
    turns = [Turn("user", "<image>\nDescribe it."), Turn("assistant", "A cat.")]
    encoded = encode_conversation(turns, tokenizer, "plain", **places)
    for as_list in (False, True):
        assert served_ids(processor, turns, as_list) == [*encoded.tokens, encoded.labels[-1]]
        prompt = served_ids(processor, turns[:1], as_list, add_generation_prompt=True)
        assert prompt == encode_prompt("<image>", tokenizer, "plain", **places)


V1 = DATA / "tokenizer.model.v1"
IM = ["<|im_start|>", "<|im_end|>"]
HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def llama2(folder: Path) -> None:
    """Mistral's v1 has the pieces that SentencePiece gave LLaMA 2's, and the same control tokens."""
    shutil.copy(V1, folder / "tokenizer.model")


FAMILIES: dict[str, Callable[[Path], object]] = {
    "mistral_instruct_v1": llama2,
    "vicuna_v1": llama2,
    "llama2_chat": llama2,
    "llama2_chat_tagged": llama2,
    "llama3": lambda folder: byte_level(folder, ["<s>", "</s>", *HEADERS]),
    "chatml": lambda folder: byte_level(folder, ["<|endoftext|>", *IM], bos_token=None, eos_token="<|endoftext|>"),
    "internlm2": lambda folder: spaced(folder, ["<unk>", "<s>", "</s>", *IM]),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tokenizer, Any]:
    """Template, training's tokenizer, and the export's; a picture has one place."""
    folder = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param](folder)
    tokenizer = load_tokenizer(folder)
    given = read_tokenizer(folder, 4096)
    assert given is not None
    written, note = with_chat_template(with_image_token(given)[0], request.param)
    assert note == f"chat template {request.param}"
    for name, content in written.files.items():
        (folder / name).write_bytes(content)
    return request.param, tokenizer, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("system", ["", "Be brief.\n"])
@pytest.mark.parametrize("name", TALKS)
def test_every_family_has_the_ids_of_training(family: Any, name: str, system: str) -> None:
    template, tokenizer, served = family
    texts = [text.lstrip("\n") if index % 2 else text for index, text in enumerate(TALKS[name])]
    turns = [Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(texts)]
    image_token_id = served.convert_tokens_to_ids("<image>")
    first, whole = texts[0].count("<image>"), sum(text.count("<image>") for text in texts)

    def ids(turns: list[Turn], **options: Any) -> list[int]:
        return served.apply_chat_template(messages(turns, False), tokenize=True, return_dict=False, **options)

    prompt = encode_prompt(texts[0], tokenizer, template, **sizes(image_token_id, first, places=1))
    assert ids(turns[:1], add_generation_prompt=True) == prompt
    talk = [Turn("system", system), *turns] if system else turns
    encoded = encode_conversation(talk, tokenizer, template, **sizes(image_token_id, whole, places=1))
    after = tokenizer.encode("\n") if template in ("chatml", "internlm2") else []  # behind the last turn
    assert ids(talk) == [*encoded.tokens, encoded.labels[-1], *after]


SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]}
TALK = [QUESTION, {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Why?"}]
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
# As the sources that chat_templates.py names lay them out.
RENDERED = {
    ("vicuna_v1", False): f"<s>{VICUNA} USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Why? ASSISTANT:",
    ("vicuna_v1", True): "<s>Be brief. USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Why? ASSISTANT:",
    ("llama2_chat", False): "<s>[INST] <image>\nWhat? [/INST] A cat. </s><s>[INST] Why? [/INST]",
    (
        "llama2_chat",
        True,
    ): "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWhat? [/INST] A cat. </s><s>[INST] Why? [/INST]",
    ("llama3", True): (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    ("chatml", True): (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    ),
    ("mistral_instruct", True): "<s>[INST]What?<image>[/INST]A cat.</s>[INST]Be brief.\n\nWhy?[/INST]",
    ("plain", False): "<s><image>A cat.</s>",
}


@pytest.mark.parametrize(("name", "has_system"), RENDERED)
def test_templates_as_text(name: str, has_system: bool) -> None:
    template = ImmutableSandboxedEnvironment().from_string(TEMPLATES[name].written(GLUES[0]))
    talk = [SYSTEM, *TALK] if has_system else TALK
    text = template.render(messages=talk, bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
    assert text == RENDERED[name, has_system]
    with_tag = [{"role": "user", "content": "<image>\nWhat?"}, *TALK[1:]]
    if name not in ("mistral_instruct", "plain"):  # there the line break goes with the tag, and places count
        talk = [SYSTEM, *with_tag] if has_system else with_tag
        assert template.render(messages=talk, bos_token="<s>", eos_token="</s>", add_generation_prompt=True) == text


def test_every_template_of_training_is_there() -> None:
    assert templates.TEMPLATES.keys() == TEMPLATES.keys()


PICTURES = [(28, 28), (40, 28), (29, 28), (30, 28), (100, 36), (36, 101), (500, 333), (21, 16), (16, 21), (640, 420)]


def normalized(image: Image.Image, size: int, mean: list[float], std: list[float]) -> torch.Tensor:
    mean_, std_ = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (preprocess(image, size).float() / 255 - mean_) / std_


@pytest.mark.parametrize("size", PICTURES)
def test_pixels_are_those_of_training(exported: Path, size: tuple[int, int]) -> None:
    """Pillow's to the rounding of float32; torchvision's, which is rougher, on average to half a level of 255.

    Measured on such noise, where it is largest: 0.39 levels.
    """
    architecture = load_architecture(exported.with_name("model"))
    assert architecture.vision is not None
    mean, std = architecture.vision.image_mean, architecture.vision.image_std
    assert mean == (0.1, 0.2, 0.3)
    wanted = normalized(picture(size), 28, mean, std)
    pil = CLIPImageProcessorPil.from_pretrained(exported)(picture(size), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pil, wanted, rtol=0, atol=2e-6)
    fast = AutoImageProcessor.from_pretrained(exported)(picture(size), return_tensors="pt")["pixel_values"][0]
    assert (fast - wanted).abs().mean() < 0.5 / 255 / min(std)


def test_a_crop_may_begin_one_pixel_beside(exported: Path) -> None:
    """Where three pixels are cut off, transformers begins at the first, training (as open_clip) at the second."""
    image = picture((31, 28))
    pil = CLIPImageProcessorPil.from_pretrained(exported)(image, return_tensors="pt")["pixel_values"][0]
    wanted = normalized(image, 28, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    torch.testing.assert_close(pil[:, :, 1:], wanted[:, :, :-1], rtol=0, atol=2e-6)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model with pixel statistics of its own, a small SentencePiece model, and what else a folder may bring."""
    folder = tmp_path_factory.mktemp("exported")
    tokenizer = write_tokenizer(folder / "tokenizer") / "tokenizer.model"
    own = {
        "model_max_length": 77,
        "pad_token": {"__type": "AddedToken", "content": "[INST]"},
        "tokenizer_class": "LlamaTokenizer",
        "x": [1],
    }
    files: dict[str, Path | bytes] = {
        "tokenizer.model": tokenizer,
        "tokenizer_config.json": json.dumps(own | {"chat_template": "text only"}).encode(),
    }
    model = checkpoint(folder, files, vocab_size=310)
    found = load_architecture(model)
    assert found.vision is not None
    vision = replace(found.vision, image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6))
    save_architecture(replace(found, vision=vision), model)
    export_hf.convert(export_hf.ExportConfig(input=model, output=folder / "out"))
    return folder / "out"


def test_places_of_a_picture(exported: Path) -> None:
    processor = AutoProcessor.from_pretrained(exported)
    encoded = processor(text="<image>a<image>", images=[picture(), picture((9, 70))], return_tensors="pt")
    assert (encoded["input_ids"] == processor.image_token_id).sum() == 2 * 4
    assert encoded["pixel_values"].shape == (2, 3, 28, 28)


@pytest.mark.parametrize(
    "vision",
    [
        {},
        {"drop_class_token": False},
        {"model_subtype": "siglip", "image_size": 30},
    ],
)
def test_places_of_a_picture_of_every_tower(exported: Path, tmp_path: Path, vision: dict[str, Any]) -> None:
    found = load_architecture(exported.with_name("model")).vision
    assert found is not None
    arch = replace(found, **vision)
    shutil.copytree(exported, tmp_path / "out")
    whole = Architecture(vision=arch, pictures=default_pictures(arch))
    contents = {"preprocessor": image_processor(arch, whole.pictures), "processor": processor(whole)}
    for name, content in contents.items():
        (tmp_path / "out" / f"{name}_config.json").write_text(json.dumps(content))
    loaded = AutoProcessor.from_pretrained(tmp_path / "out")
    ids = loaded(text="<image>", images=[picture()], add_special_tokens=False)["input_ids"][0]
    assert ids == [loaded.image_token_id] * arch.num_image_embeddings


def test_fields_of_the_tokenizer_are_kept(exported: Path) -> None:
    config = json.loads((exported / "tokenizer_config.json").read_text())
    assert (config["model_max_length"], config["x"], config["bos_token"]) == (77, [1], "<s>")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "chat_template" not in config
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)
    generation = json.loads((exported / "generation_config.json").read_text())
    assert {key: generation[f"{key}_token_id"] for key in ("bos", "eos", "pad")} == {"bos": 1, "eos": 2, "pad": 3}
    text = json.loads((exported / "config.json").read_text())["text_config"]
    assert (text["bos_token_id"], text["eos_token_id"], text["pad_token_id"]) == (1, 2, 3)
    # The next free id has a row already: nothing is added to the tables.
    assert tokenizer.convert_tokens_to_ids("<image>") == 300 and text["vocab_size"] == 310
    assert tokenizer.decode([1, *tokenizer.encode("it is", add_special_tokens=False), 300, 2], True) == "it is"
    assert tokenizer.encode("it is")[0] == 1
    assert json.loads((exported / "chat_template.json").read_text()) == {
        "chat_template": (exported / "chat_template.jinja").read_text()
    }


TEXTS = [
    *("", " ", "What is it?", "  two  spaces ", "\n\ta\r\n", "<0x0A> <unk> \u2581\u2581 x", "\x00\x7f"),
    *("Gru\u0308\u00dfe \U0001f408 \u732b \u200b", *(f"{' ' * count}x" for count in range(60))),
    *(
        "".join(chr(random.Random(seed).randint(1, 0x2FFF)) for seed in range(40 * part, 40 * part + 40))
        for part in range(30)
    ),
]


@pytest.mark.parametrize("name", ["tokenizer.model.v1", V3.name, "mistral_instruct_tokenizer_241114.model.v7"])
def test_sentencepiece_ids(name: str) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(DATA / name))
    tokenizer, special = convert_sentencepiece(DATA / name)
    texts = [*TEXTS, *(Path(random.__file__).read_text()[place : place + 200] for place in range(0, 10000, 200))]
    for text in texts:
        ids = model.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, repr(text)
        assert tokenizer.decode(ids) == model.decode(ids), repr(text)
    assert tokenizer.encode("a").ids == [1, *model.encode("a")]
    assert special == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    control = {model.id_to_piece(id): id for id in range(model.vocab_size()) if model.is_control(id)}
    added = {token.content: id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    assert added == control


def test_a_sentencepiece_model_that_normalises(tmp_path: Path) -> None:
    """With the defaults of its trainer: compatible letters made one, spaces at the ends and doubled ones gone."""
    train(tmp_path, model_type="bpe", byte_fallback=True)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer, _ = convert_sentencepiece(tmp_path / "tokenizer.model")
    for text in ("  it  is \uff21\u2460 ", "\ufb01ne", "", "   ", "a picture"):
        assert tokenizer.encode(text, add_special_tokens=False).ids == model.encode(text), repr(text)


def test_sentencepiece_models_that_are_not_converted(tmp_path: Path) -> None:
    train(tmp_path, model_type="unigram")
    with pytest.raises(ValueError, match=r"another kind than byte-pair encoding.*tokenizer.json of the same model"):
        read_tokenizer(tmp_path, 8)
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xff nonsense")
    with pytest.raises(ValueError, match="cannot be read as a SentencePiece model"):
        read_tokenizer(tmp_path, 8)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        read_tokenizer(tmp_path, 8)
    assert read_tokenizer(tmp_path / "none", 8) is None


def train(folder: Path, **options: Any) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["what is number one two three in the picture", "it is a picture of a number"] * 5),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=310 if "byte_fallback" in options else 40,
        hard_vocab_limit=False,
        minloglevel=3,
        **options,
    )


def given(folder: Path, config: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A folder with tokenizer.json of the v3, changed."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes(converted(**changes))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    found = read_tokenizer(folder, 8)
    assert found is not None
    return found


def test_a_folder_that_knows_pictures_stays_as_it_is(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "first", TOKENIZERS["first stretch"])
    export_hf.convert(export_hf.ExportConfig(input=model, output=tmp_path / "out"))
    own = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name.startswith("tokenizer")}
    own |= {"chat_template.json": b'{"chat_template": "{{ messages }}"}'}
    second = checkpoint(tmp_path / "second", own, vocab_size=IMAGE + 64)
    report = export_hf.convert(export_hf.ExportConfig(input=second, output=tmp_path / "again"))
    assert any("chat template of the tokenizer" in line for line in report)
    assert any("<image> is token 32768; the vocabulary has 32832 rows, 0 of them new" in line for line in report)
    assert {name: (tmp_path / "again" / name).read_bytes() for name in own} == own
    assert not (tmp_path / "again" / "chat_template.jinja").exists()


def test_the_next_free_id(tmp_path: Path) -> None:
    found, id = with_image_token(given(tmp_path / "a"))
    assert id == IMAGE and with_image_token(found) == (found, id)
    content = json.loads(converted())
    vocab = {**content["model"]["vocab"], "beyond": IMAGE + 1}
    gaps = given(tmp_path / "b", model=content["model"] | {"vocab": vocab})
    with pytest.raises(ValueError, match=f"its ids have gaps, and <image> would be {IMAGE + 1}, which is in use"):
        with_image_token(gaps)


def test_templates_that_cannot_be_written(tmp_path: Path) -> None:
    known, _ = with_image_token(given(tmp_path / "a", {"chat_template": "text only"}))
    for name, told in (
        ("alpaca", "none is known for conversations of 'alpaca'"),
        ("chatml", r"the tokenizer lacks <|im_start|> and <|im_end|> of chatml"),
    ):
        same, note = with_chat_template(known, name)
        assert same == known and told in note
    # A tokenizer of its own mind: no glue makes it what training does.
    lowered = {
        "type": "Sequence",
        "normalizers": [{"type": "Lowercase"}, *json.loads(converted())["normalizer"]["normalizers"]],
    }
    (tmp_path / "b").mkdir()
    shutil.copy(V3, tmp_path / "b" / "tokenizer.model")
    other, _ = with_image_token(given(tmp_path / "b", normalizer=lowered))
    _, note = with_chat_template(other, "mistral_instruct")
    assert note.endswith("but some texts have other tokens than in training")
