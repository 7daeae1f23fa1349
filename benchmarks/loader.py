"""How fast samples come out of the loader, beside other loaders over the same pictures and conversations.

`python -m benchmarks.loader --output loader.json`

Makes LLaVA-like conversations about 640x480 JPEGs of about 60 KB, as loose files and as the shards that
`mmcore prepare` writes, and then measures in one run, with and without workers, in interleaved rounds of
which the median counts, each time in a new process of its own and after a quarter as many samples that do not count:

- a bare loop that decodes and resizes the same pictures by the same functions and does nothing else,
- torch's DataLoader over loose files with Pillow, as LLaVA ships it, and with torchvision,
- plain webdataset over the shards,
- energon as its documentation shows it,
- this project's loader, with packing to rows of 4096 tokens.

Of ours also: the time from a saved state to the first batch in a new process (its imports told
apart), and the memory of each worker that it shares with no one.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

WORKERS = (0, 2)
BARE, LLAVA, TORCHVISION = "bare decode and resize", "DataLoader, Pillow", "DataLoader, torchvision"
WEBDATASET, ENERGON, OURS = "webdataset", "energon, documented", "mmcore"
NAMES = (BARE, LLAVA, TORCHVISION, WEBDATASET, ENERGON, OURS)
# Of ours to another's samples a second, at least.
BARS = {BARE: 0.9, LLAVA: 2.0, ENERGON: 3.0}
MAX_RESTORE, MAX_WORKER_MEMORY = 1.0, 300.0  # seconds, MB
NUM_PICTURES = 128  # different ones


def fabricate(folder: Path, count: int) -> None:
    """Write files, annotations, shards and a tokenizer."""
    from mmcore.data.shards import ShardWriter

    draw = random.Random(0)
    words = ["".join(draw.choice("bdfglmnprst") + draw.choice("aeiou") for _ in range(3)) for _ in range(2000)]
    pictures = [_photograph(number) for number in range(min(count, NUM_PICTURES))]
    annotations = [{"id": f"{index:08d}", "conversations": _conversation(draw, words)} for index in range(count)]
    (folder / "files").mkdir(parents=True)
    with ShardWriter(folder / "shards", samples_per_shard=500) as writer:
        for index, annotation in enumerate(annotations):
            picture = pictures[index % len(pictures)]
            (folder / "files" / f"{index:08d}.jpg").write_bytes(picture)
            writer.write("train", f"{index:08d}", {"jpg": picture, "json": json.dumps(annotation).encode()})
    (folder / "annotations.json").write_text(json.dumps(annotations))
    _write_tokenizer(folder / "tokenizer", words)


def _photograph(seed: int) -> bytes:
    """Soft shapes of several sizes under a little noise, as JPEG."""
    import io

    from PIL import Image

    draw = random.Random(seed)
    size = (640, 480)
    image = Image.new("RGB", size, (128, 128, 128))
    for cells, share in ((4, 0.6), (12, 0.4), (40, 0.3), (120, 0.2), (640, 0.06)):
        width, height = cells, cells * 3 // 4
        noise = Image.frombytes("RGB", (width, height), draw.randbytes(3 * width * height))
        image = Image.blend(image, noise.resize(size, Image.Resampling.BICUBIC), share)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _conversation(draw: random.Random, words: list[str]) -> list[dict[str, str]]:
    turns = []
    for number in range(draw.choice((1, 1, 2, 4))):
        question, answer = (" ".join(draw.choices(words, k=draw.randint(*span))) for span in ((5, 15), (10, 60)))
        turns.append({"from": "human", "value": question if number else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return turns


def _write_tokenizer(folder: Path, words: list[str]) -> None:
    import sentencepiece

    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(words[start : start + 20]) for start in range(0, len(words), 20)),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        control_symbols=["[INST]", "[/INST]"],
        num_threads=1,
        minloglevel=2,
    )


def open_ours(folder: Path, workers: int, states: tuple[bytes, ...] = ()) -> Any:
    """This project's loader, at its defaults but for the length of rows."""
    from benchmarks.loader_peers import IMAGE_SIZE, NUM_IMAGE_EMBEDDINGS, SEQ_LENGTH
    from mmcore.config import DataConfig
    from mmcore.data.loader import build_loader
    from mmcore.data.pictures import Pictures
    from mmcore.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder / "tokenizer")
    return build_loader(
        DataConfig(path=str(folder / "shards"), seq_length=SEQ_LENGTH, num_workers=workers),
        tokenizer=tokenizer,
        conversation="mistral_instruct",
        pictures=Pictures(
            image_token_id=tokenizer.vocab_size,
            image_size=IMAGE_SIZE,
            num_square_embeddings=NUM_IMAGE_EMBEDDINGS,
            background=(122, 116, 104),
        ),
        micro_batch_size=1,
        data_parallel_rank=0,
        data_parallel_size=1,
        seed=1,
        states=states,
    )


def ours(folder: Path, workers: int) -> Generator[int, None, None]:
    loader = open_ours(folder, workers)
    for batch in loader:
        yield len(batch.keys)


def speed(name: str, folder: Path, workers: int, count: int) -> tuple[float, float]:
    """Samples a second, and milliseconds of all processors that a sample takes."""
    from benchmarks import loader_peers as peers

    if name == BARE:
        return peers.bare_loop(folder, workers, count)
    loaders: dict[str, Callable[[Path, int], Generator[int, None, None]]] = {
        LLAVA: peers.pillow_files,
        TORCHVISION: peers.torchvision_files,
        WEBDATASET: peers.webdataset_shards,
        ENERGON: peers.documented_energon,
        OURS: ours,
    }
    batches = loaders[name](folder, workers)
    _take(batches, count // 4)
    start, worked = time.perf_counter(), _processor_time()
    taken = _take(batches, count)
    seconds, worked = time.perf_counter() - start, _processor_time() - worked
    batches.close()  # and with it the workers
    return taken / seconds, worked / taken * 1e3


def _take(batches: Iterator[int], count: int) -> int:
    taken = 0
    while taken < count:
        taken += next(batches)
    return taken


def _processor_time() -> float:
    """Seconds, of this process and its workers."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime, stime
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def workers_and_state(folder: Path, workers: int, count: int) -> tuple[list[float], bytes]:
    """Memory of each worker in MB after `count` samples, and the loader's state then."""
    loader = open_ours(folder, workers)
    batches = iter(loader)
    _take((len(batch.keys) for batch in batches), count)
    memory = [_private_memory(child.pid) for child in multiprocessing.active_children()]
    state = loader.state_dict()
    loader.close()
    return memory, state


def _private_memory(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))) / 1e3


def restore(folder: Path, workers: int, state: bytes) -> tuple[float, float]:
    """Seconds for the imports, and from a state to the first batch."""
    start = time.perf_counter()
    import mmcore.data.loader  # noqa: F401

    imported = time.perf_counter()
    loader = open_ours(folder, workers, (state,))
    next(iter(loader))
    taken = time.perf_counter() - imported
    loader.close()
    return imported - start, taken


def in_new_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns, run where nothing is imported or cached yet."""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=_answer, args=(answers, work, arguments))
    process.start()
    answer = answers.get()
    process.join()
    if isinstance(answer, RuntimeError):
        raise RuntimeError(f"{work.__name__}{arguments[:1]} failed") from answer
    return answer


def _answer(answers: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        import torch

        torch.set_num_threads(1)  # as in the workers
        multiprocessing.set_start_method("fork", force=True)  # of workers, as where a training begins
        answer = work(*arguments)
    except Exception as error:
        answer = RuntimeError(repr(error))
    answers.put(answer)
    os._exit(0)  # whatever threads energon has left behind


def measure(
    folder: Path, count: int, rounds: int, workers: tuple[int, ...] = WORKERS, names: tuple[str, ...] = NAMES
) -> dict[str, Any]:
    """All loaders in turn, several times over; see this file's docstring."""
    speeds: dict[int, dict[str, list[tuple[float, float]]]] = {
        number: {name: [] for name in names} for number in workers
    }
    restores: dict[int, list[tuple[float, float]]] = {number: [] for number in workers}
    memory: list[float] = []
    for _ in range(rounds):
        for number in workers:
            for name in names:
                speeds[number][name].append(in_new_process(speed, name, folder, number, count))
            used, state = in_new_process(workers_and_state, folder, number, count)
            memory += used
            restores[number].append(in_new_process(restore, folder, number, state))
    return {
        "samples_per_second": _medians(speeds, 0),
        "processor_ms_per_sample": _medians(speeds, 1),
        "rounds": {str(number): by_name for number, by_name in speeds.items()},
        "import_s": round(statistics.median(taken for found in restores.values() for taken, _ in found), 2),
        "restore_s": {
            str(number): round(statistics.median(taken for _, taken in found), 2) for number, found in restores.items()
        },
        "worker_memory_mb": round(max(memory, default=0.0), 1),
    }


def _medians(speeds: dict[int, dict[str, list[tuple[float, float]]]], which: int) -> dict[str, dict[str, float]]:
    return {
        str(number): {name: round(statistics.median(row[which] for row in rows), 2) for name, rows in by_name.items()}
        for number, by_name in speeds.items()
    }


def report(result: dict[str, Any]) -> None:
    for number, rates in result["samples_per_second"].items():
        worked = result["processor_ms_per_sample"][number]
        print(f"\n{number} workers{'samples/s':>27}{'ours is':>10}{'ms of processors':>20}{'ours is':>10}{'bar':>8}")
        for name, rate in rates.items():
            ratio = rates[OURS] / rate
            bar = f"{BARS[name]:>7.1f}x {_verdict(ratio >= BARS[name])}" if name in BARS else ""
            less = worked[name] / worked[OURS]
            print(f"{name:26}{rate:10.1f}{ratio:9.2f}x{worked[name]:20.2f}{less:9.2f}x{bar}")
        taken = result["restore_s"][number]
        print(f"{'restored':26}{taken:9.2f}s{'':40}{MAX_RESTORE:>7.1f}s {_verdict(taken <= MAX_RESTORE)}")
    used = result["worker_memory_mb"]
    print(f"\nlargest worker {used:.0f} MB, bar {MAX_WORKER_MEMORY:.0f} MB: {_verdict(used <= MAX_WORKER_MEMORY)}")


def _verdict(passed: bool) -> str:
    return "pass" if passed else "MISS"


def main() -> None:
    os.environ.setdefault("TQDM_DISABLE", "1")  # energon's progress
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000, help="of the dataset, and of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="empty folder for the dataset; a temporary one by default")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)) / "dataset"
        fabricate(folder, options.samples)
        sizes = [path.stat().st_size for path in (folder / "files").iterdir()]
        print(f"{len(sizes)} pictures of {statistics.mean(sizes) / 1e3:.0f} KB on average")
        result = measure(folder, options.samples, options.rounds)
    report(result)
    names = ("torch", "torchvision", "pillow", "megatron-energon", "webdataset")
    result["versions"] = {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }
    result["machine"] = {"cores": os.cpu_count(), "samples": options.samples, "rounds": options.rounds}
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
