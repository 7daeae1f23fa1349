"""How full packing makes rows, for sequences as long as those of LLaVA's instruction tuning.

`python -m benchmarks.packing`

Prints, for rows of 2048, 4096 and 8192 tokens, the share of positions that hold a token: of batches of 16
padded to their longest, and of rows packed from buffers of several sizes; and what packing costs.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import NamedTuple

from mmcore.data.packing import pack

NUM_IMAGE_EMBEDDINGS = 576  # CLIP ViT-L/14 at 336 pixels
SEQ_LENGTHS = (2048, 4096, 8192)
BUFFERS = (100, 200, 256, 300, 512, 1000, 2000)
PADDED_BATCH = 16


class Part(NamedTuple):
    """Rows of one source in llava_v1_5_mix665k.json."""

    thousands: int
    embeddings: int
    text: int
    """Median of its tokens."""
    spread: float
    """Standard deviation of its logarithm."""


# Counts: LLaVA-1.5 (arXiv:2310.03744), table of the instruction tuning mixture. Text: estimates from what
# the rows hold (one long answer; one short one; ten questions on one picture; chats of many turns), not
# measured on the data.
MIXTURE = {
    "LLaVA-Instruct": Part(158, NUM_IMAGE_EMBEDDINGS, 220, 0.45),
    "ShareGPT": Part(40, 0, 1000, 0.8),
    "VQAv2": Part(83, NUM_IMAGE_EMBEDDINGS, 150, 0.5),
    "GQA": Part(72, NUM_IMAGE_EMBEDDINGS, 165, 0.5),
    "OKVQA": Part(9, NUM_IMAGE_EMBEDDINGS, 37, 0.4),
    "OCR-VQA": Part(80, NUM_IMAGE_EMBEDDINGS, 135, 0.3),
    "A-OKVQA": Part(66, NUM_IMAGE_EMBEDDINGS, 100, 0.3),
    "TextCaps": Part(22, NUM_IMAGE_EMBEDDINGS, 55, 0.3),
    "RefCOCO": Part(48, NUM_IMAGE_EMBEDDINGS, 270, 0.5),
    "Visual Genome": Part(86, NUM_IMAGE_EMBEDDINGS, 330, 0.5),
}


def draw_lengths(count: int, seq_length: int, seed: int = 0) -> list[int]:
    """Tokens of samples in random order, cut at `seq_length`."""
    draw = random.Random(seed)
    parts = draw.choices(list(MIXTURE.values()), [part.thousands for part in MIXTURE.values()], k=count)
    texts = (max(16, int(part.text * draw.lognormvariate(0, part.spread))) for part in parts)
    return [min(seq_length, part.embeddings + text) for part, text in zip(parts, texts, strict=True)]


def packed_fill(lengths: list[int], seq_length: int, buffer_size: int) -> float:
    """Share of positions that hold a token, of buffers that are emptied one after the other."""
    buffers = (lengths[start : start + buffer_size] for start in range(0, len(lengths), buffer_size))
    return sum(lengths) / (seq_length * sum(len(pack(buffer, seq_length)) for buffer in buffers))


def padded_fill(lengths: list[int], batch_size: int) -> float:
    """Likewise, of batches padded to their longest sample."""
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    return sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20000)
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    options = parser.parse_args()
    result: dict[str, dict[str, float]] = {}
    print(f"{'rows of':>8}{'padded':>9}" + "".join(f"{size:>8}" for size in BUFFERS) + "   (samples looked at)")
    for seq_length in SEQ_LENGTHS:
        lengths = draw_lengths(options.samples, seq_length)
        fills = {"padded": padded_fill(lengths, PADDED_BATCH)}
        start = time.perf_counter()
        fills |= {str(size): packed_fill(lengths, seq_length, size) for size in BUFFERS}
        cost = (time.perf_counter() - start) / len(BUFFERS) / options.samples * 1e6
        print(f"{seq_length:>8}  " + "".join(f"{fill:>7.1%} " for fill in fills.values()) + f"  {cost:.0f} us/sample")
        result[str(seq_length)] = {name: round(fill, 4) for name, fill in fills.items()}
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
