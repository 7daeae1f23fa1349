"""Other ways to read the benchmark's pictures and conversations: each yields the samples of one batch after the other.

All tokenize alike and see the same pictures; how they read, decode, resize and batch is their own.
"""

import json
import multiprocessing
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, RandomSampler

from mmcore.constants import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD
from mmcore.data.image import preprocess
from mmcore.data.pixels import decode_pixels

IMAGE_SIZE = 336
NUM_IMAGE_EMBEDDINGS = 576
SEQ_LENGTH = 4096
BATCH_SIZE = 16
IGNORED = -100


def files(folder: Path) -> list[Path]:
    return sorted((folder / "files").glob("*.jpg"))


def torch_square(data: bytes) -> Tensor:
    """Decode and resize by torchvision, as this project's loader does: uint8 [3, h, w]."""
    return preprocess(decode_pixels(data), IMAGE_SIZE).contiguous()


def pillow_square(path: Path) -> Tensor:
    """As LLaVA's dataset with CLIP's processor (llava/train/train.py at 0034661): float32 [3, h, w], normalised."""
    image = Image.open(path).convert("RGB")
    scale = IMAGE_SIZE / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - IMAGE_SIZE) // 2, (image.height - IMAGE_SIZE) // 2
    image = image.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE))
    pixels = np.asarray(image).astype(np.float32) / 255
    pixels = (pixels - np.float32(CLIP_IMAGE_MEAN)) / np.float32(CLIP_IMAGE_STD)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


class Text:
    """Conversations to tokens and labels."""

    def __init__(self, folder: Path) -> None:
        model = str(folder / "tokenizer" / "tokenizer.model")
        self.processor = sentencepiece.SentencePieceProcessor(model_file=model)

    def __call__(self, turns: list[dict[str, str]]) -> tuple[Tensor, Tensor]:
        tokens, labels = [self.processor.bos_id()], [IGNORED]
        for turn in turns:
            ids = self.processor.encode(turn["value"])
            tokens += ids
            labels += ids if turn["from"] == "gpt" else [IGNORED] * len(ids)
        return torch.tensor(tokens), torch.tensor(labels)


def padded(samples: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    """A batch as LLaVA's collator makes it."""
    images, tokens, labels = zip(*samples, strict=True)
    ids = pad_sequence(list(tokens), batch_first=True)
    return {
        "images": torch.stack(images),
        "input_ids": ids,
        "labels": pad_sequence(list(labels), batch_first=True, padding_value=IGNORED),
        "attention_mask": ids.ne(0),
    }


class LooseFiles(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """A list of annotations in memory, and a picture file for each."""

    def __init__(self, folder: Path, square: Callable[[Path], Tensor]) -> None:
        self.paths = files(folder)
        self.annotations = json.loads((folder / "annotations.json").read_text())
        self.square, self.text = square, Text(folder)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.square(self.paths[index]), *self.text(self.annotations[index]["conversations"])


def _loose_files(folder: Path, workers: int, square: Callable[[Path], Tensor]) -> Generator[int, None, None]:
    dataset = LooseFiles(folder, square)
    sampler = RandomSampler(dataset, replacement=True, num_samples=1 << 40)
    for batch in DataLoader(dataset, BATCH_SIZE, sampler=sampler, num_workers=workers, collate_fn=padded):
        yield len(batch["images"])


def pillow_files(folder: Path, workers: int) -> Generator[int, None, None]:
    """What LLaVA ships."""
    yield from _loose_files(folder, workers, pillow_square)


def torchvision_files(folder: Path, workers: int) -> Generator[int, None, None]:
    """The same with torchvision."""
    yield from _loose_files(folder, workers, lambda path: torch_square(path.read_bytes()))


def webdataset_shards(folder: Path, workers: int) -> Generator[int, None, None]:
    """Plain webdataset over the prepared shards."""
    import webdataset

    text = Text(folder)

    def encode(sample: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        return torch_square(sample["jpg"]), *text(json.loads(sample["json"])["conversations"])

    shards = sorted(str(path) for path in (folder / "shards").glob("train_*.tar"))
    dataset = webdataset.WebDataset(shards, resampled=True).shuffle(100).map(encode)
    for batch in webdataset.WebLoader(dataset.batched(BATCH_SIZE, padded), batch_size=None, num_workers=workers):
        yield len(batch["images"])


def documented_energon(folder: Path, workers: int) -> Generator[int, None, None]:
    """energon's pages "Task Encoder", "Crude data" and "Packing", put together.

    Its stock decoder, a torchvision transform, everything in encode_sample with restore_seeds, which its page
    on packing asks for, and buffers of 100 as in its examples. Source: Megatron-Energon docs/source/basic and
    docs/source/advanced/packing.md at 080611a.
    """
    from megatron import energon
    from torchvision.transforms import v2

    transform = v2.Compose([v2.Resize(IMAGE_SIZE, v2.InterpolationMode.BICUBIC), v2.CenterCrop(IMAGE_SIZE)])
    text = Text(folder)

    @energon.edataclass
    class Chat(energon.Sample):
        image: Tensor
        conversations: list[dict[str, str]]

    @energon.edataclass
    class Encoded(energon.Sample):
        image: Tensor
        tokens: Tensor
        labels: Tensor

    @energon.edataclass
    class Row(energon.Sample):
        images: list[Tensor]
        tokens: Tensor
        labels: Tensor

    @energon.stateless
    def cook(sample: dict[str, Any]) -> Chat:
        turns = sample["json"]["conversations"]
        return Chat(**energon.basic_sample_keys(sample), image=sample["jpg"], conversations=turns)

    class Encoder(energon.DefaultTaskEncoder):
        decoder = energon.SampleDecoder(image_decode="torchrgb")
        cookers = (energon.Cooker(cook),)

        @energon.stateless(restore_seeds=True)
        def encode_sample(self, sample: Chat) -> Encoded:
            tokens, labels = text(sample.conversations)
            return Encoded.derive_from(sample, image=transform(sample.image), tokens=tokens, labels=labels)

        def select_samples_to_pack(self, samples: list[Encoded]) -> list[list[Encoded]]:
            samples.sort(key=lambda sample: len(sample.tokens))
            rows: list[list[Encoded]] = [[]]
            length = 0
            for sample in samples:
                size = NUM_IMAGE_EMBEDDINGS + len(sample.tokens)
                if length + size > SEQ_LENGTH:
                    rows.append([])
                    length = 0
                rows[-1].append(sample)
                length += size
            return rows

        @energon.stateless
        def pack_selected_samples(self, samples: list[Encoded]) -> Row:
            return Row.derive_from(
                samples[0],
                images=[sample.image for sample in samples],
                tokens=torch.cat([sample.tokens for sample in samples]),
                labels=torch.cat([sample.labels for sample in samples]),
            )

        @energon.stateless
        def batch(self, samples: list[Row]) -> Tensor:
            return torch.stack([image for sample in samples for image in sample.images])

    dataset = energon.get_train_dataset(
        str(folder / "shards"),
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=workers),
        batch_size=1,
        shuffle_buffer_size=100,
        max_samples_per_sequence=100,
        packing_buffer_size=100,
        task_encoder=Encoder(),
    )
    for images in energon.get_savable_loader(dataset):
        yield len(images)


def bare_loop(folder: Path, workers: int, count: int) -> tuple[float, float]:
    """Decoding and resizing alone, in as many processes, from bytes in memory.

    Returns:
        Samples a second, and milliseconds of all processors that a sample takes.
    """
    pictures = [path.read_bytes() for path in files(folder)]
    if not workers:
        seconds, worked = _decode_all(pictures, count)
        return count / seconds, worked / count * 1e3
    context = multiprocessing.get_context("fork")
    barrier, taken = context.Barrier(workers), context.SimpleQueue()

    def work() -> None:
        torch.set_num_threads(1)
        torch_square(pictures[0])
        barrier.wait()
        taken.put(_decode_all(pictures, count // workers))

    processes = [context.Process(target=work) for _ in range(workers)]
    for process in processes:
        process.start()
    seconds, worked = zip(*(taken.get() for _ in processes), strict=True)
    for process in processes:
        process.join()
    done = count // workers * workers
    return done / max(seconds), sum(worked) / done * 1e3


def _decode_all(pictures: list[bytes], count: int) -> tuple[float, float]:
    """Seconds by the clock, and of the processor."""
    torch_square(pictures[0])
    start, worked = time.perf_counter(), time.process_time()
    for index in range(count):
        torch_square(pictures[index % len(pictures)])
    return time.perf_counter() - start, time.process_time() - worked
