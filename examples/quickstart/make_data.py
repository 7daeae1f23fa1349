"""Write the quickstart's raw data: scanned digits on a 4x4 grid, with captions, questions and text documents.

The handwriting is real (scikit-learn's bundled scans) and no scan is drawn in both the training and the held-out
pictures. Layouts and language are generated: a picture holds one digit, or two or three in one row or column. The same
seed writes the same bytes.

    OUTPUT/images/{train,val}/NNNNN.png
    OUTPUT/captions_train.json     LLaVA format, one caption a picture: alignment
    OUTPUT/instruct_train.json     LLaVA format, a caption and a question a picture: instruction tuning
    OUTPUT/captions_val.json       COCO captions format, held out
    OUTPUT/questions_val.json      LLaVA format, one question a picture, held out
    OUTPUT/text_train.jsonl        what the language model reads before it meets a picture, see `map_text`
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

GRID = 4  # cells along an edge
CELL = 16  # pixels along a cell's edge: twice a scan's, and the vision tower's patch
NUM_TRAIN_SCANS = 1500  # of 1797

BLANK = "\N{WHITE SQUARE}"  # an empty cell in a written map
NUMBERS = ("zero", "one", "two", "three")
DESCRIBE = "Describe the picture."


@dataclass(frozen=True, slots=True)
class Layout:
    """One to three digits in one row or column, in reading order."""

    digits: tuple[int, ...]
    cells: tuple[int, ...]
    """Row * GRID + column of each digit."""

    @property
    def is_row(self) -> bool:
        return self.cells[0] // GRID == self.cells[-1] // GRID


def draw_layout(rng: np.random.Generator, count: int) -> Layout:
    """Any digits in any cells of any one row or column."""
    digits = tuple(int(digit) for digit in rng.integers(0, 10, count))
    line = int(rng.integers(GRID))
    places = sorted(int(place) for place in rng.choice(GRID, count, replace=False))
    across = rng.random() < 0.5
    return Layout(digits, tuple(line * GRID + place if across else place * GRID + line for place in places))


def corner(layout: Layout) -> str:
    row, column = divmod(layout.cells[0], GRID)
    return f"{'upper' if row < GRID // 2 else 'lower'} {'left' if column < GRID // 2 else 'right'} corner"


def caption(layout: Layout) -> str:
    """`a handwritten 7 in the upper left corner`, `a handwritten 7 above a handwritten 3`, ..."""
    names = [f"a handwritten {digit}" for digit in layout.digits]
    if len(names) == 1:
        return f"{names[0]} in the {corner(layout)}"
    return (" to the left of " if layout.is_row else " above ").join(names)


def question(rng: np.random.Generator, layout: Layout) -> tuple[str, str]:
    """One of four kinds of question, and its answer."""
    kind = rng.integers(4)
    if kind == 0:
        return "How many digits are there?", NUMBERS[len(layout.digits)]
    if kind == 1:
        absent = [digit for digit in range(10) if digit not in layout.digits]
        is_there = rng.random() < 0.5
        digit = rng.choice(layout.digits if is_there else absent)
        return f"Is the digit {digit} in the picture?", "yes" if is_there else "no"
    if len(layout.digits) == 1:
        return (
            ("Where is the digit?", f"in the {corner(layout)}")
            if kind == 2
            else ("Which digit is it?", str(layout.digits[0]))
        )
    if kind == 2:
        return "Are the digits in a row or in a column?", "in a row" if layout.is_row else "in a column"
    place = int(rng.integers(2)) - 1  # 0: first, -1: last
    names = ("on the left", "on the right") if layout.is_row else ("at the top", "at the bottom")
    return f"Which digit is {names[place]}?", str(layout.digits[place])


def map_text(layout: Layout) -> str:
    """The layout in writing, one character a cell: where a picture has an image embedding, a text document has this.

    A language model that has only read captions cannot be steered by a projector; one that has read maps knows what
    to do with sixteen places in front of a text. It never sees a picture.
    """
    cells = [BLANK] * GRID * GRID
    for digit, cell in zip(layout.digits, layout.cells, strict=True):
        cells[cell] = str(digit)
    return "".join(cells)


def turns(rng: np.random.Generator, layout: Layout) -> list[tuple[str, str]]:
    """The request for a caption and one question, in either order."""
    pair = [(DESCRIBE, caption(layout)), question(rng, layout)]
    return pair if rng.random() < 0.5 else pair[::-1]


def conversation(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    """LLaVA's form: the picture stands at the head of the first human turn."""
    messages = []
    for human, gpt in pairs:
        messages += [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
    messages[0]["value"] = f"<image>\n{messages[0]['value']}"
    return messages


def split_scans(labels: np.ndarray, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Deal the scans to training and held-out pictures.

    Args:
        labels: int [n], the digit of each scan.
        seed: of the deal.
    Returns:
        For each digit the indices of its scans, for training and for held-out pictures; together
        all scans, each once.
    """
    order = np.random.default_rng((seed, 0)).permutation(len(labels))
    parts = order[:NUM_TRAIN_SCANS], order[NUM_TRAIN_SCANS:]
    train, val = ([part[labels[part] == digit] for digit in range(10)] for part in parts)
    return train, val


def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """Returns uint8 [n, CELL, CELL], ink 0 on paper 255, and int [n], the digits."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    ink = (255 - bunch.images * (255 / 16)).round().astype(np.uint8)  # [n, 8, 8]
    scans = [np.asarray(Image.fromarray(scan).resize((CELL, CELL), Image.Resampling.BILINEAR)) for scan in ink]
    return np.stack(scans), bunch.target


def draw_picture(
    rng: np.random.Generator, layout: Layout, scans: np.ndarray, by_digit: list[np.ndarray]
) -> Image.Image:
    cells = np.full((GRID, CELL, GRID, CELL), 255, np.uint8)
    for digit, cell in zip(layout.digits, layout.cells, strict=True):
        row, column = divmod(cell, GRID)
        cells[row, :, column] = scans[rng.choice(by_digit[digit])]
    return Image.fromarray(cells.reshape(GRID * CELL, GRID * CELL))


def counts(rng: np.random.Generator, total: int, weights: tuple[int, int, int]) -> Iterator[int]:
    """Numbers of digits in exactly these proportions, shuffled."""
    cycle = np.repeat((1, 2, 3), weights)
    yield from (int(count) for count in rng.permutation(np.resize(cycle, total)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--captions", type=int, default=8000, help="pictures for alignment")
    parser.add_argument("--conversations", type=int, default=12000, help="pictures for instruction tuning")
    parser.add_argument("--held-out", type=int, default=500, help="pictures for evaluation")
    parser.add_argument("--documents", type=int, default=20000, help="text documents for the language model")
    options = parser.parse_args()

    scans, labels = load_scans()
    train_scans, val_scans = split_scans(labels, options.seed)

    def pictures(part: str, stream: int, total: int, weights: tuple[int, int, int], first: int = 0) -> Iterator[Any]:
        """Draw and save pictures; yields (name, layout, generator)."""
        rng = np.random.default_rng((options.seed, stream))
        folder = options.output / "images" / part
        folder.mkdir(parents=True, exist_ok=True)
        for index, count in enumerate(counts(rng, total, weights), first):
            layout = draw_layout(rng, count)
            picture = draw_picture(rng, layout, scans, train_scans if part == "train" else val_scans)
            picture.save(folder / f"{index:05d}.png", compress_level=1)
            yield f"{part}/{index:05d}.png", layout, rng

    def llava(name: str, pairs: list[tuple[str, str]]) -> dict[str, Any]:
        return {"id": Path(name).stem, "image": name, "conversations": conversation(pairs)}

    captions = [
        llava(name, [(DESCRIBE, caption(layout))])
        for name, layout, _ in pictures("train", 1, options.captions, (1, 1, 1))
    ]
    # Three digits are the hardest to get right, so that tuning sees them most.
    instruct = [
        llava(name, turns(rng, layout))
        for name, layout, rng in pictures("train", 2, options.conversations, (2, 2, 3), first=options.captions)
    ]
    coco: dict[str, list[Any]] = {"images": [], "annotations": []}
    questions = []
    for index, (name, layout, rng) in enumerate(pictures("val", 3, options.held_out, (1, 1, 1))):
        coco["images"].append({"id": index, "file_name": name})
        coco["annotations"].append({"id": index, "image_id": index, "caption": caption(layout)})
        questions.append(llava(name, [question(rng, layout)]))
    for name, content in {
        "captions_train": captions,
        "instruct_train": instruct,
        "captions_val": coco,
        "questions_val": questions,
    }.items():
        (options.output / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")

    rng = np.random.default_rng((options.seed, 4))
    with (options.output / "text_train.jsonl").open("w", encoding="utf-8") as file:
        for index, count in enumerate(counts(rng, options.documents, (1, 1, 1))):
            layout = draw_layout(rng, count)
            text = {"caption": caption(layout)} if index % 2 else {"turns": turns(rng, layout)}
            file.write(json.dumps({"map": map_text(layout), **text}, ensure_ascii=False) + "\n")

    total = len(captions) + len(instruct)
    print(f"{total} training pictures, {len(questions)} held out, {options.documents} documents in {options.output}")


if __name__ == "__main__":
    main()
