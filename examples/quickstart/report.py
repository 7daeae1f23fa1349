"""Print the quickstart's final table and write RUN_DIR/report.html: scores, loss curves, held-out pictures.

Exits with 1 if a bar is missed.
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmcore.evaluation import exact_match
from mmcore.evaluation.curves import Curve
from mmcore.evaluation.predictions import load_predictions
from mmcore.evaluation.report import GalleryItem, SummaryRow, write_report
from mmcore.evaluation.run_files import rows_by_step, values
from mmcore.evaluation.task import Example, read_json

CAPTION_BAR = 90.0  # per cent of held-out captions that must be exactly right
BLIND_BAR = 5.0  # per cent that a model may get right that looks at another sample's picture
METRICS = {"Bleu_4": "BLEU-4", "METEOR": "METEOR", "ROUGE_L": "ROUGE-L", "CIDEr": "CIDEr"}
NUMBERS = {1: "one", 2: "two", 3: "three"}

# Row of predictions.jsonl, for the gallery: example, answer, whether it is right.
Answered = tuple[Example, str, bool]


def load_answered(run: Path, part: str, data: str) -> list[Answered]:
    """Held-out examples with what the model said to them."""
    path, source = run / "eval" / part / "predictions.jsonl", run / "raw" / data
    examples = exact_match.examples(source, options={})
    answers = load_predictions(path, [example.id for example in examples], source).answers
    return [
        (example, answers[example.id], exact_match.matches(answers[example.id], example.references))
        for example in examples
    ]


def load_curve(path: Path, name: str) -> Curve:
    """Loss by step."""
    rows = rows_by_step(path)
    return Curve(name, [row["step"] for row in rows], values(rows, "loss"))


def load_scores(run: Path, part: str, scorer: str) -> dict[str, Any]:
    return read_json(run / "eval" / part / f"scores_{scorer}.json", "scores")


def exact_row(run: Path, part: str, name: str, note: str, at_least: float = 0, at_most: float = 100) -> SummaryRow:
    """A row for an exact match, with a bar if one is given."""
    scores = load_scores(run, part, "exact")
    has_bar = at_least > 0 or at_most < 100
    return SummaryRow(
        name=name,
        value=f"{scores['score']:.1f} %",
        note=f"{scores['num_correct']} of {scores['num_samples']}{note}",
        passed=at_least <= scores["score"] <= at_most if has_bar else None,
    )


def by_number(captions: list[Answered]) -> list[SummaryRow]:
    """Exact match of pictures with one, two and three digits."""
    total: Counter[int] = Counter()
    right: Counter[int] = Counter()
    for example, _, correct in captions:
        num_digits = len(re.findall(r"\d", example.references[0]))
        total[num_digits] += 1
        right[num_digits] += correct
    return [
        SummaryRow(
            name=f"with {NUMBERS.get(count, count)} {'digit' if count == 1 else 'digits'}",
            value=f"{100 * right[count] / total[count]:.1f} %",
            note=f"{right[count]} of {total[count]}",
            is_part=True,
        )
        for count in sorted(total)
    ]


def summarise(run: Path, captions: list[Answered]) -> list[SummaryRow]:
    """All rows of the final table."""
    coco = load_scores(run, "captions", "coco")
    metrics = [
        SummaryRow(
            name=f"Captions, {title}",
            value=f"{coco['metrics'][name]:.3f}" if name in coco["metrics"] else "-",
            note=coco["skipped"].get(name, coco["scales"].get(name, "")),
        )
        for name, title in METRICS.items()
    ]
    return [
        exact_row(
            run, "captions", "Captions, exact match", f"; bar: at least {CAPTION_BAR:.0f} %", at_least=CAPTION_BAR
        ),
        *by_number(captions),
        exact_row(
            run,
            "blind_captions",
            "Blind control",
            f", pictures shuffled; bar: at most {BLIND_BAR:.0f} %",
            at_most=BLIND_BAR,
        ),
        exact_row(run, "pretrain_captions", "After pretraining alone", ", captions, only the projector trained"),
        exact_row(run, "answers", "Answers, exact match", ", one question a picture"),
        *metrics,
    ]


def gallery(captions: list[Answered], answers: list[Answered]) -> list[GalleryItem]:
    return [
        GalleryItem(
            image=example.images[0] if example.images else None,
            generated=answer,
            true=" / ".join(example.references),
            correct=correct,
            label=f"{label} {example.id}",
            prompt=example.prompt if label == "question" else "",
        )
        for label, part in (("caption", captions), ("question", answers))
        for example, answer, correct in part
    ]


def print_table(rows: list[SummaryRow]) -> None:
    marks = {True: "[green]met[/]", False: "[red]missed[/]", None: ""}
    table = Table(title="Quickstart: held-out pictures", title_justify="left")
    table.add_column("score")
    table.add_column("value", justify="right")
    table.add_column("what it means", style="dim")
    table.add_column("bar")
    for row in rows:
        table.add_row("  " * row.is_part + row.name, row.value, row.note, marks[row.passed])
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder that run.sh wrote")
    run = parser.parse_args().run
    try:
        captions = load_answered(run, "captions", "captions_val.json")
        answers = load_answered(run, "answers", "questions_val.json")
        rows = summarise(run, captions)
        stages = {"pretrain": "Pretraining: the projector alone", "sft": "Instruction tuning: all but the vision tower"}
        write_report(
            run / "report.html",
            title="Quickstart: reading handwritten digits",
            subtitle=f"{len(captions)} held-out pictures; no handwriting in them was seen in training.",
            summary=rows,
            curves=[load_curve(run / folder / "log.jsonl", name) for folder, name in stages.items()],
            gallery=gallery(captions, answers),
            notes=[
                "Exact match: the generated text is the true one, character by character, white space folded.",
                "Blind control: the same model with every picture replaced by another sample's.",
            ],
        )
    except ValueError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    print_table(rows)
    print(f"{run / 'report.html'}: curves of both stages, scores, and all held-out pictures")
    return 1 if any(row.passed is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
