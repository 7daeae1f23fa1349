"""What the complete trainer reads in `benchmarks.train_gpu`. Imports no torch.

FOLDER/pretrain/, sft/   datasets as `mmcore prepare` writes them, all samples of one of the same length in tokens
FOLDER/model/            a checkpoint without weights: model.json, and the tokenizer of Mistral-7B-Instruct-v0.3
"""

import io
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from benchmarks.train_gpu_shapes import STAGES, Shape
from mmcore.constants import IMAGE_TAG, MODEL_FILE, TOKENIZER_DIR
from mmcore.data.shards import ShardWriter
from mmcore.data.tokenizer import Tokenizer, load_tokenizer
from mmcore.models.architecture import save_architecture

# Width and height in pixels: COCO's most frequent, a small one, a large one.
SIZES = ((640, 480), (480, 640), (500, 375), (336, 336), (1024, 768))
NUM_PICTURES = 100  # different ones


def copy_tokenizer(folder: Path) -> Tokenizer:
    """Mistral's own, which mistral-common brings along."""
    import mistral_common

    (source,) = (Path(mistral_common.__file__).parent / "data").glob("*instruct_tokenizer_240323.model.v3")
    folder.mkdir(parents=True)
    shutil.copy(source, folder / "tokenizer.model.v3")
    return load_tokenizer(folder)


def words(tokenizer: Tokenizer, count: int = 2000) -> list[str]:
    """Words of one token each."""
    draw = random.Random(0)
    found: list[str] = []
    while len(found) < count:
        token = draw.randrange(tokenizer.vocab_size)
        text = tokenizer.decode([token])
        if text.isascii() and text.isalpha() and tokenizer.encode(text) == [token]:
            found.append(text)
    return found


def picture(seed: int) -> bytes:
    """Soft shapes under noise, as JPEG of a usual size: about as large as a photograph's."""
    draw, size = random.Random(seed), SIZES[seed % len(SIZES)]
    soft, noise = (Image.frombytes("RGB", cells, draw.randbytes(3 * cells[0] * cells[1])) for cells in ((16, 12), size))
    file = io.BytesIO()
    Image.blend(soft.resize(size, Image.Resampling.BICUBIC), noise, 0.06).save(file, "JPEG", quality=85)
    return file.getvalue()


def conversations(shape: Shape, stage: str, tokenizer: Tokenizer) -> Iterator[list[dict[str, str]]]:
    """Texts of exactly the lengths that the shape says, beside the picture and the template's own tokens."""
    draw, known = random.Random(1), words(tokenizer)
    picture_tokens = shape.vision.num_image_embeddings
    answer = shape.labels[stage] - 1  # and the end token
    # A row has one position less than its sample has tokens: the last one predicts nothing. "plain" drops the question.
    question = shape.lengths[stage] - picture_tokens - shape.labels[stage] - len(("<s>", "[INST]", "[/INST]")) + 1
    for _ in range(shape.num_samples(stage)):
        asked, told = (" ".join(draw.choices(known, k=max(0, count))) for count in (question, answer))
        yield [{"from": "human", "value": IMAGE_TAG + asked}, {"from": "gpt", "value": told}]


def write_shards(shape: Shape, stage: str, tokenizer: Tokenizer, output: Path) -> None:
    """A dataset."""
    pictures = [picture(seed) for seed in range(min(NUM_PICTURES, shape.num_samples(stage)))]
    with ShardWriter(output, samples_per_shard=128) as writer:
        for index, talk in enumerate(conversations(shape, stage, tokenizer)):
            text = json.dumps({"id": str(index), "conversations": talk}).encode()
            writer.write("train", f"{index:08d}", {"jpg": pictures[index % len(pictures)], "json": text})


def make(shape: Shape, folder: Path, stages: Sequence[str] = STAGES) -> None:
    """What the folder lacks."""
    if not (folder / "model" / MODEL_FILE).exists():
        shutil.rmtree(folder / "model", ignore_errors=True)
        copy_tokenizer(folder / "model" / TOKENIZER_DIR)
        save_architecture(shape.architecture(), folder / "model")
    tokenizer = load_tokenizer(folder / "model" / TOKENIZER_DIR)
    for stage in stages:
        if not (folder / stage).exists():
            write_shards(shape, stage, tokenizer, folder / stage)
