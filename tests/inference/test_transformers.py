"""The same tokens as transformers' `generate` with what export_hf.py writes: pictures, text alone, penalties."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from mmcore.checkpoint import load_checkpoint
from mmcore.config import ParallelConfig
from mmcore.inference.engine import Engine, Prompt, Request
from mmcore.inference.sampling import Sampling
from mmcore.models.architecture import load_architecture
from mmcore.models.llava import LlavaModel, base_config
from tests import ranks
from tests.tools.conftest import build_language, build_tower
from tests.tools.test_export_hf import COMPOSITIONS, exported, joined

NEW = 14
PENALTIES = (1.0, 1.3, 0.9)
# Pictures of each prompt, and words before and after them.
SHAPES = ((1, 1, 9), (0, 5, 0), (2, 3, 4), (1, 0, 1), (0, 12, 3))


def prompts(checkpoint: Path) -> list[Prompt]:
    architecture = load_architecture(checkpoint)
    assert architecture.vision is not None and architecture.image_token_id is not None
    random, found = torch.Generator().manual_seed(7), []
    for pictures, before, after in SHAPES:
        words = torch.randint(0, 150, (before + after,), generator=random).tolist()
        picture = [architecture.image_token_id] * architecture.vision.num_image_embeddings
        side = architecture.vision.image_size
        pixels = torch.randint(0, 256, (pictures, 3, side, side), generator=random, dtype=torch.uint8)
        found.append(Prompt(tokens=[*words[:before], *picture * pictures, *words[before:]], images=pixels))
    return found


def ours(checkpoint: Path, layout: ParallelConfig) -> list[list[int]]:
    model = LlavaModel(load_architecture(checkpoint), "local", **base_config(layout)).eval()
    load_checkpoint(checkpoint, model)
    engine = Engine(model, None, max_batch_size=4, max_length=64)
    if not engine.is_main:
        engine.follow()
        return []
    found: dict[int, list[int]] = {}
    for penalty in PENALTIES:
        for prompt in prompts(checkpoint):
            sampling = replace(Sampling(), repetition_penalty=penalty)
            found[engine.add(Request(prompt=prompt, sampling=sampling, max_new_tokens=NEW, end_ids=()))] = []
    while not engine.is_idle:
        for delta in engine.step():
            found[delta.id] += delta.tokens
    engine.close()
    return list(found.values())


@torch.no_grad()
def theirs(checkpoint: Path, folder: Path) -> list[list[int]]:
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    model.generation_config.eos_token_id = None
    image = json.loads((folder / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(image[key])[:, None, None] for key in ("image_mean", "image_std"))
    image_token_id = load_architecture(checkpoint).image_token_id
    found = []
    for penalty in PENALTIES:
        for prompt in prompts(checkpoint):
            ids = torch.tensor([prompt.tokens])
            ids[ids == image_token_id] = model.config.image_token_index
            options = {"max_new_tokens": NEW, "do_sample": False, "repetition_penalty": penalty}
            if len(prompt.images):
                options["pixel_values"] = (prompt.images / 255 - mean) / std
            answer = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            found.append(answer[0, ids.shape[1] :].tolist())
    return found


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_the_same_tokens(name: str, tmp_path: Path) -> None:
    tower, vision, language, text, options = COMPOSITIONS[name]
    checkpoint = joined(build_tower(tower, **vision), build_language(language, **text), tmp_path, **options)
    folder = exported(checkpoint)
    expected = ranks.run(theirs, ParallelConfig(), 1, checkpoint, folder)[0]
    assert len({tuple(answer) for answer in expected}) > 10, "answers are alike: the test would see nothing"
    assert ranks.run(ours, ParallelConfig(), 1, checkpoint, ParallelConfig())[0] == expected
    if name == "clip + mistral":  # whose window is shorter than its prompts
        layout = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
        assert ranks.run(ours, layout, 4, checkpoint, layout)[0] == expected
