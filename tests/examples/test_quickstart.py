"""The quickstart's data and towers: what they promise, and that their scripts run."""

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
SMALL = {"--captions": 90, "--conversations": 60, "--held-out": 12, "--documents": 2000}


def script(name: str, *options: object) -> str:
    """Run one of the scripts; its output."""
    command = [sys.executable, str(QUICKSTART / name), *map(str, options)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def load(name: str) -> ModuleType:
    sys.path.insert(0, str(QUICKSTART))  # as python does for a script's own neighbours
    spec = importlib.util.spec_from_file_location(name, QUICKSTART / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(QUICKSTART))
    return module


make_data = load("make_data")
train_mistral = load("train_mistral")


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "raw"
    script("make_data.py", "--output", folder, *(item for pair in SMALL.items() for item in pair))
    return folder


@pytest.fixture(scope="module")
def mistral(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers") / "mistral"
    script("train_mistral.py", "--data", data, "--output", folder, "--steps", 22)
    return folder


def read(path: Path) -> list:
    return json.loads(path.read_text())


class TestData:
    def test_same_seed_writes_the_same_bytes(self, data: Path, tmp_path: Path) -> None:
        options = [item for pair in SMALL.items() for item in pair]
        script("make_data.py", "--output", tmp_path / "again", *options)
        assert hashes(tmp_path / "again") == hashes(data)
        script("make_data.py", "--output", tmp_path / "other", *options, "--seed", 2)
        assert hashes(tmp_path / "other").keys() == hashes(data).keys()
        assert hashes(tmp_path / "other") != hashes(data)

    def test_no_scan_is_in_both_parts(self) -> None:
        _, labels = make_data.load_scans()
        train, val = (np.concatenate(part) for part in make_data.split_scans(labels, seed=1))
        assert (len(train), len(val)) == (1500, 297)
        assert sorted([*train, *val]) == list(range(1797))

    def test_held_out_pictures_show_held_out_scans(self, data: Path) -> None:
        scans, labels = make_data.load_scans()
        _, val = make_data.split_scans(labels, seed=1)
        allowed = {scans[index].tobytes() for index in np.concatenate(val)}
        blank = np.full((16, 16), 255, np.uint8).tobytes()
        paths = sorted((data / "images" / "val").iterdir())
        pictures = [np.asarray(Image.open(path)).reshape(4, 16, 4, 16).swapaxes(1, 2) for path in paths]
        shown = {cell.tobytes() for picture in pictures for row in picture for cell in row} - {blank}
        assert len(paths) == 12 and shown and shown <= allowed

    def test_captions_and_answers_are_true(self) -> None:
        rng = np.random.default_rng(0)
        for index in range(2000):
            layout = make_data.draw_layout(rng, 1 + index % 3)
            rows, columns = zip(*(divmod(cell, 4) for cell in layout.cells), strict=True)
            assert len(set(rows)) == 1 or len(set(columns)) == 1
            assert [int(digit) for digit in re.findall(r"\d", make_data.map_text(layout))] == list(layout.digits)
            text = make_data.caption(layout)
            digit = r"a handwritten \d"
            if index % 3:
                assert re.fullmatch(rf"{digit}( to the left of {digit})+|{digit}( above {digit})+", text)
                assert ("above" in text) == (len(set(columns)) == 1)
            else:
                assert re.fullmatch(rf"{digit} in the (upper|lower) (left|right) corner", text)
                assert ("upper" in text, "left" in text) == (rows[0] < 2, columns[0] < 2)
            question, answer = make_data.question(rng, layout)
            if asked := re.fullmatch(r"Is the digit (\d) in the picture\?", question):
                assert answer == ("yes" if int(asked[1]) in layout.digits else "no")
            elif "How many" in question:
                assert answer == ["one", "two", "three"][index % 3]
            elif "on the left" in question or "at the top" in question:
                assert answer == str(layout.digits[0])
            elif "on the right" in question or "at the bottom" in question:
                assert answer == str(layout.digits[-1])

    def test_files_are_in_the_formats_users_bring(self, data: Path) -> None:
        captions, instruct = read(data / "captions_train.json"), read(data / "instruct_train.json")
        assert (len(captions), len(instruct)) == (90, 60)
        for row in captions + instruct:
            assert (data / "images" / row["image"]).is_file()
            assert [turn["from"] for turn in row["conversations"][:2]] == ["human", "gpt"]
            assert [turn["value"].count("<image>") for turn in row["conversations"]][:1] == [1]
            assert sum("a handwritten" in turn["value"] for turn in row["conversations"]) == 1
        assert {row["image"] for row in captions}.isdisjoint(row["image"] for row in instruct)
        coco = read(data / "captions_val.json")
        assert [image["id"] for image in coco["images"]] == [row["image_id"] for row in coco["annotations"]]
        number = [row["caption"].count("handwritten") for row in coco["annotations"]]
        assert [number.count(count) for count in (1, 2, 3)] == [4, 4, 4]
        assert [row["image"] for row in read(data / "questions_val.json")] == [x["file_name"] for x in coco["images"]]


class TestTowers:
    def test_tokenizer_is_in_mistral_form(self, mistral: Path) -> None:
        import sentencepiece

        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(mistral / "tokenizer.model"))
        assert tokenizer.vocab_size() == 384
        assert [tokenizer.id_to_piece(i) for i in range(5)] == ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
        assert all(tokenizer.is_control(i) for i in (1, 2, 3, 4))
        for cell in make_data.BLANK + "0123456789":
            assert tokenizer.id_to_piece(tokenizer.piece_to_id(cell)) == cell
        assert 1 not in tokenizer.encode("<s>[INST]") and 3 not in tokenizer.encode("<s>[INST]")
        text = "a handwritten 7 above a handwritten 42; even this: \u00e9"
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_documents_are_laid_out_like_conversations_about_a_picture(self, data: Path, mistral: Path) -> None:
        from mmcore.data.conversation import encode_conversation, read_turns
        from mmcore.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(mistral)
        pieces = train_mistral.sentencepiece.SentencePieceProcessor(model_file=str(mistral / "tokenizer.model"))
        lines = (data / "text_train.jsonl").read_text().splitlines()
        for document in map(json.loads, lines[:50]):
            tokens, labels = train_mistral.encode(document, pieces)
            turns = document.get("turns") or [("?", document["caption"])]
            template = "mistral_instruct" if "turns" in document else "plain"
            encoded = encode_conversation(
                read_turns(make_data.conversation(turns)),
                tokenizer,
                template,
                pictures=[[384] * 16],
                image_token_id=384,
            )
            first = encoded.tokens.index(384)
            assert encoded.tokens[first : first + 16] == [384] * 16
            cells = [pieces.piece_to_id(cell) for cell in document["map"]]
            assert [*encoded.tokens[:first], *cells, *encoded.tokens[first + 16 :]] == tokens[:-1]
            assert [mask > 0 for mask in encoded.loss_mask] == [label >= 0 for label in labels[1:]]

    def test_mistral_folder_opens_with_transformers(self, mistral: Path) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(mistral)
        assert (config.model_type, config.vocab_size, config.sliding_window) == ("mistral", 384, None)
        model = AutoModelForCausalLM.from_pretrained(mistral)
        assert torch.isfinite(model(torch.tensor([[1, 3, 9, 4]])).logits).all()

    def test_clip_file_opens_with_open_clip(self, data: Path, tmp_path: Path) -> None:
        printed = script("train_clip.py", "--data", data, "--output", tmp_path / "clip.pt", "--steps", 52)
        assert re.search(r"finds the caption of a held-out picture among \d+ in \d+\.\d% of cases", printed)
        content = torch.load(tmp_path / "clip.pt", weights_only=True)
        clip = load("train_clip")
        model = clip.open_clip.CLIP(64, clip.VISION, clip.TEXT, quick_gelu=True)
        model.load_state_dict(content["state_dict"])


def test_launcher_is_sound_bash() -> None:
    subprocess.run(["bash", "-n", str(QUICKSTART / "run.sh")], check=True)
