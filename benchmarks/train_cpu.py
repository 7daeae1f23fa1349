"""How fast one process trains on a CPU, beside transformers' LLaVA with the same weights and samples.

`OMP_NUM_THREADS=1 python -m benchmarks.train_cpu --output train_cpu.json`

A small LLaVA (CLIP, mlp2x_gelu, LLaMA's layers) leaves by `tools/converters/export_hf.py` and is loaded as
transformers' LlavaForConditionalGeneration. Both then take the same AdamW steps (forward, backward, clipping,
update; fp32) on the same samples, frozen as for alignment (only the projector is trained) and for instruction
tuning (all but the vision tower). The samples of a step are

- ours: packed into rows of 1024 tokens,
- transformers: in batches of 4 and of 16, each padded to its longest, as its users do and LLaVA's scripts; and one
  by one, which pads nothing and is no way to train on a GPU. Their losses are weighed by trained tokens, as its
  Trainer weighs them. SDPA, the fused AdamW, no cache, and pixels are made beforehand but for their normalisation.

Before anything is timed, the losses of three steps must be the same within 1e-4. Then all take one step in turn,
many times over; the median step counts. All sides train the same tokens, so ratios of times are those of time per
token. The bar is the faster of the padded batches.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcore import host

host.use_host()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from mmcore import distributed  # noqa: E402
from mmcore.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from mmcore.config import OptimizerConfig, ParallelConfig  # noqa: E402
from mmcore.data.batch import EncodedSample, collate  # noqa: E402
from mmcore.data.packing import pack  # noqa: E402
from mmcore.models.architecture import Architecture, LanguageArch, VisionArch  # noqa: E402
from mmcore.models.llava import LlavaModel, base_config  # noqa: E402
from mmcore.models.presets import PROJECTOR, compose  # noqa: E402
from mmcore.training import freezing  # noqa: E402
from mmcore.training.optimizer import build_optimizer, build_scheduler, wrap  # noqa: E402
from mmcore.training.step import train_step  # noqa: E402

ROOT = Path(__file__).parents[1]
FREEZES = {"alignment": ("vision_model", "language_model"), "instruction tuning": ("vision_model",)}
# transformers' names of the same parts.
THEIR_PARTS = {"vision_model": "model.vision_tower", "language_model": ("model.language_model", "lm_head")}
ADAM = OptimizerConfig(lr=1e-4, lr_decay_style="constant", adam_beta2=0.999, clip_grad=1.0)
SEQ_LENGTH = 1024
OURS = "mmcore, packed"
ALONE = "transformers, 1 by 1"
PADDED = {ALONE: 1, **{f"transformers, {size} padded": size for size in (4, 16)}}
MAX_DIFFERENCE = 1e-4
VISION = VisionArch(
    num_layers=4, hidden_size=256, ffn_hidden_size=1024, num_attention_heads=4, image_size=112, patch_dim=14
)
LANGUAGE = LanguageArch(
    model_type="llama",
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=704,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=64,
    vocab_size=2048,
    max_position_embeddings=SEQ_LENGTH,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One way to train."""

    step: Callable[[Sequence[EncodedSample]], float]
    """An optimizer step on the samples of a global batch; returns its loss."""
    rows: Callable[[Sequence[EncodedSample]], int]
    """Positions that it runs over for them, padding included."""


def architecture(vision: VisionArch = VISION, language: LanguageArch = LANGUAGE) -> Architecture:
    """The whole model. Its image token has a row of the vocabulary, as transformers wants it."""
    return compose(vision, language, PROJECTOR["mlp2x_gelu"](language), image_token_id=language.vocab_size - 1)


def draw(arch: Architecture, count: int, seed: int) -> list[EncodedSample]:
    """Samples of one picture, a question and an answer, whose lengths are spread as in instruction tuning.

    The median text is 120 tokens, as long as a quarter to twice the picture's 64; half of it is trained.
    """
    assert arch.vision is not None and arch.language is not None and arch.image_token_id is not None
    lengths, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
    side, samples = arch.vision.image_size, []
    for index in range(count):
        text = min(700, max(16, int(120 * lengths.lognormvariate(0, 0.8))))
        ids = torch.randint(0, arch.image_token_id, (text + 2,), generator=numbers)
        picture = torch.full((arch.vision.num_image_embeddings,), arch.image_token_id)
        tokens = torch.cat([ids[:1], picture, ids[1:]])
        mask = torch.zeros(len(tokens) - 1)
        mask[-text // 2 :] = 1
        samples.append(
            EncodedSample(
                key=str(index),
                tokens=tokens[:-1],
                labels=torch.where(mask > 0, tokens[1:], 0),
                loss_mask=mask,
                images=torch.randint(0, 256, (1, 3, side, side), generator=numbers, dtype=torch.uint8),
            )
        )
    return samples


def write_model(arch: Architecture, folder: Path) -> None:
    """A checkpoint of random weights, and its export for transformers."""
    (folder / "tokenizer").mkdir(parents=True)
    save_checkpoint(
        folder / "checkpoint",
        0,
        model=wrap(LlavaModel(arch, "local", **base_config(ParallelConfig()))),
        optimizer=None,
        architecture=arch,
        tokenizer=folder / "tokenizer",
        state={},
        loader_state=None,
        keep_last=1,
    )
    arguments = ["--input", folder / "checkpoint", "--output", folder / "export"]
    command = [sys.executable, ROOT / "tools" / "converters" / "export_hf.py", *arguments]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)


def ours(arch: Architecture, folder: Path, freeze: tuple[str, ...]) -> Side:
    """This project's step, as `mmcore train` takes it."""
    model = LlavaModel(arch, "local", **base_config(ParallelConfig()))
    freezing.freeze(model, freeze)
    ddp = wrap(model)
    optimizer = build_optimizer(ADAM, ddp)
    load_checkpoint(next((folder / "checkpoint").glob("step_*")), ddp)
    optimizer.reload_model_params()
    scheduler = build_scheduler(ADAM, optimizer, 1_000_000)
    scheduler.step(increment=1)

    def step(samples: Sequence[EncodedSample]) -> float:
        rows = pack([len(sample.tokens) for sample in samples], SEQ_LENGTH)
        batches = [collate([samples[index] for index in row]) for row in rows]
        return train_step(ddp, optimizer, scheduler, batches).total.loss

    return Side(step=step, rows=lambda samples: sum(len(sample.tokens) for sample in samples))


def theirs(arch: Architecture, folder: Path, freeze: tuple[str, ...], batch_size: int) -> Side:
    """transformers' model in the loop of its Trainer, without what else the Trainer does."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder / "export", attn_implementation="sdpa")
    model.train()
    for part in freeze:
        for name, parameter in model.named_parameters():
            if name.startswith(THEIR_PARTS[part]):
                parameter.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trained, lr=ADAM.lr, betas=(0.9, ADAM.adam_beta2), weight_decay=0.0, fused=True)

    def step(samples: Sequence[EncodedSample]) -> float:
        num_tokens = torch.tensor(sum(int(sample.loss_mask.sum()) for sample in samples))
        total = 0.0
        for start in range(0, len(samples), batch_size):
            batch = padded(arch, samples[start : start + batch_size])
            loss = model(**batch, num_items_in_batch=num_tokens, use_cache=False).loss
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, ADAM.clip_grad)
        adam.step()
        adam.zero_grad()
        return total

    def rows(samples: Sequence[EncodedSample]) -> int:
        parts = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
        return sum(len(part) * max(len(sample.tokens) for sample in part) for part in parts)

    return Side(step=step, rows=rows)


def padded(arch: Architecture, samples: Sequence[EncodedSample]) -> dict[str, Tensor]:
    """A batch as transformers' data collator makes it: padded on the right, labels not shifted."""
    from torch.nn.utils.rnn import pad_sequence

    assert arch.vision is not None
    # Ours are shifted already: what a token is to predict stands with it, and of the last one here alone.
    tokens = [torch.cat([sample.tokens, sample.labels[-1:]]) for sample in samples]
    none = torch.tensor([-100])
    labels = [torch.cat([none, sample.labels.masked_fill(sample.loss_mask == 0, -100)]) for sample in samples]
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (arch.vision.image_mean, arch.vision.image_std))
    return {
        "input_ids": pad_sequence(tokens, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(part) for part in tokens], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "pixel_values": (torch.cat([sample.images for sample in samples]) / 255 - mean) / std,
    }


def sides(arch: Architecture, folder: Path, freeze: tuple[str, ...]) -> dict[str, Side]:
    others = {name: theirs(arch, folder, freeze, size) for name, size in PADDED.items()}
    return {OURS: ours(arch, folder, freeze), **others}


def check_losses(found: dict[str, Side], batches: Sequence[Sequence[EncodedSample]]) -> float:
    """Take a step on each batch.

    Returns:
        The largest difference of a loss from ours.
    Raises:
        RuntimeError: they train something else.
    """
    worst = 0.0
    for number, samples in enumerate(batches, 1):
        losses = {name: side.step(samples) for name, side in found.items()}
        difference = max(abs(loss - losses[OURS]) for loss in losses.values())
        if not difference < MAX_DIFFERENCE:
            raise RuntimeError(f"step {number}: the losses are {losses}; they may differ by {MAX_DIFFERENCE}")
        worst = max(worst, difference)
    return worst


def measure(arch: Architecture, folder: Path, freeze: tuple[str, ...], num_samples: int, rounds: int) -> dict[str, Any]:
    """All sides in turn, several times over."""
    found = sides(arch, folder, freeze)
    difference = check_losses(found, [draw(arch, num_samples, seed) for seed in range(3)])
    times: dict[str, list[float]] = {name: [] for name in found}
    samples = draw(arch, num_samples, 3)
    for _ in range(rounds):
        for name, side in found.items():
            start = time.perf_counter()
            side.step(samples)
            times[name].append(time.perf_counter() - start)
    tokens = sum(len(sample.tokens) for sample in samples)
    return {
        "largest_difference": difference,
        "trained_tokens": sum(int(sample.loss_mask.sum()) for sample in samples),
        "positions": tokens,
        "padding": {name: round(1 - tokens / side.rows(samples), 3) for name, side in found.items()},
        "ms_per_step": {name: round(statistics.median(rows) * 1e3, 1) for name, rows in times.items()},
        "rounds": {name: [round(taken * 1e3, 1) for taken in rows] for name, rows in times.items()},
    }


def ratio(result: dict[str, Any]) -> float:
    """Speed of ours to that of the faster padded batches."""
    times = result["ms_per_step"]
    return min(taken for name, taken in times.items() if name not in (OURS, ALONE)) / times[OURS]


def report(results: dict[str, dict[str, Any]]) -> None:
    for stage, result in results.items():
        tokens, positions, times = result["trained_tokens"], result["positions"], result["ms_per_step"]
        print(f"\n{stage}: {tokens} trained tokens in {positions} positions a step")
        print(f"largest difference of a loss: {result['largest_difference']:.0e}, may be {MAX_DIFFERENCE:.0e}")
        print(f"{'':26}{'ms a step':>11}{'us a trained token':>20}{'us a position':>15}{'padding':>9}{'ours is':>10}")
        for name, taken in times.items():
            per_token, per_position = taken / tokens * 1e3, taken / positions * 1e3
            print(
                f"{name:26}{taken:11.1f}{per_token:20.1f}{per_position:15.1f}{result['padding'][name]:9.1%}"
                f"{taken / times[OURS]:9.2f}x"
            )
        print(f"{ratio(result):.2f}x of padded batches, bar 1.00x: {'pass' if ratio(result) >= 1 else 'MISS'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16, help="of a step")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    options = parser.parse_args()
    distributed.initialize(ParallelConfig(), seed=1)
    arch, results = architecture(), {}
    with tempfile.TemporaryDirectory() as folder:
        write_model(arch, Path(folder) / "model")
        for stage, freeze in FREEZES.items():
            results[stage] = measure(arch, Path(folder) / "model", freeze, options.samples, options.rounds)
    report(results)
    if options.output:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "megatron-core")}
        machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "python": platform.python_version()}
        options.output.write_text(json.dumps({**results, "versions": versions, "machine": machine}, indent=2) + "\n")
    distributed.shutdown()


if __name__ == "__main__":
    main()
