"""Scored runs: what `mmcore evaluate` leaves in a folder, written together and read again.

scores.json    numbers, counts and hashes: `mmcore.evaluation.scores.as_json`, and two more:
               `samples`, the next file and its hash; `examples`, where prompts and pictures come from
samples.jsonl  a row for each sample: what was asked, answered, read in the answer, and right
report.html    both for people: `mmcore.evaluation.scored_page`
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmcore.evaluation.scores import EvaluationError, Sample, sha256
from mmcore.evaluation.tables import read_rows
from mmcore.evaluation.task import load_task, read_json

SCORES_FILE, SAMPLES_FILE, PAGE_FILE = "scores.json", "samples.jsonl", "report.html"
KEYS = {"task", "score", "num_samples", "metric", "metrics", "scales"}  # which a scores.json has, whoever wrote it


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRun:
    """One task on one file of predictions."""

    name: str
    content: Mapping[str, Any]
    """Of scores.json."""
    samples: Mapping[str, Sample]
    """By id, in the order of the references; empty where none were kept."""

    @property
    def task(self) -> str:
        return str(self.content["task"])


def beside(output: Path) -> tuple[Path, Path]:
    """samples.jsonl and report.html of a scores.json; of any other name NAME.samples.jsonl and NAME.report.html."""
    stem = "" if output.name == SCORES_FILE else f"{output.stem}."
    return output.with_name(stem + SAMPLES_FILE), output.with_name(stem + PAGE_FILE)


def with_questions(
    task: str,
    samples: Iterable[Sample],
    data: Path,
    images: Path | None,
    options: Mapping[str, str],
    prompts: Mapping[str, str] | None = None,
) -> tuple[list[Sample], str]:
    """Samples with what was asked and its pictures, where these are known.

    Args:
        data, images, options: as of `Task.examples`.
        prompts: by id; these are stronger than the examples'.
    Returns:
        The samples, and why there are no pictures: a score does not need them, so that this is no error.
    """
    samples, prompts, examples, problem = list(samples), prompts or {}, {}, ""
    try:
        examples = {example.id: example for example in load_task(task).examples(data, images, options=options)}
        if not any(sample.id in examples for sample in samples):
            problem = f"the samples have other ids than the questions of {data}"
    except (ValueError, EvaluationError) as error:
        problem = str(error)
    found = []
    for sample in samples:
        example = examples.get(sample.id)
        prompt = prompts.get(sample.id) or (example.prompt if example else sample.prompt)
        found.append(replace(sample, prompt=prompt, images=example.images if example else sample.images))
    return found, problem


def load_prompts(predictions: Path) -> dict[str, str]:
    """What the model was asked, by id, where it is `mmcore generate` that wrote the predictions."""
    if predictions.suffix != ".jsonl":
        return {}
    return {
        str(row["id"]): row["prompt"]
        for _, row in read_rows(predictions, "predictions")
        if isinstance(row, dict) and "id" in row and isinstance(row.get("prompt"), str)
    }


def samples_file(samples: Iterable[Sample]) -> bytes:
    """Content of samples.jsonl. Pictures that lie inside the benchmark's own file are null."""
    rows = (
        {
            "id": sample.id,
            "group": sample.group,
            "prompt": sample.prompt,
            "answer": sample.answer,
            "parsed": sample.parsed,
            "references": sample.references,
            "score": sample.score,
            "images": [str(image.absolute()) if isinstance(image, Path) else None for image in sample.images],
        }
        for sample in samples
    )
    # A lone surrogate, which an answer can have, is written as JSON spells it.
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "backslashreplace")


def scores_files(paths: Sequence[Path]) -> list[Path]:
    """The scores' files that are meant: themselves, or those in the folders.

    Raises:
        ValueError: one is given twice.
    """
    files = [path / SCORES_FILE if path.is_dir() else path for path in paths]
    resolved = [file.resolve() for file in files]
    for file, other in zip(files, resolved, strict=True):
        if resolved.count(other) > 1:
            raise ValueError(f"{file} is given more than once")
    return files


def read_runs(files: Sequence[Path]) -> list[ScoredRun]:
    """Read what was written.

    Raises:
        ValueError: one is missing, or not what `mmcore evaluate` writes, or its samples are of another run.
    """
    names = run_names([file.resolve() for file in files])
    return [_read_run(name, file) for name, file in zip(names, files, strict=True)]


def with_pictures(runs: Sequence[ScoredRun]) -> tuple[list[ScoredRun], str]:
    """Runs of one task, with pictures from the benchmark's own file where samples.jsonl does not tell of any.

    Returns:
        The runs, and why there are no pictures.
    """
    samples = [sample for run in runs for sample in run.samples.values()]
    source = runs[0].content.get("examples")
    if not samples or not source or (any(sample.images for sample in samples) and not any(map(_is_inside, samples))):
        return [*runs], ""
    images = source["images"] and Path(source["images"])
    found, problem = with_questions(runs[0].task, samples, Path(source["data"]), images, source["options"])
    by_id = {sample.id: sample for sample in found}
    return [
        replace(
            run,
            samples={
                name: replace(sample, prompt=sample.prompt or by_id[name].prompt, images=by_id[name].images)
                for name, sample in run.samples.items()
            },
        )
        for run in runs
    ], problem


def _is_inside(sample: Sample) -> bool:
    """Whether a picture lies in the benchmark's own file."""
    return b"" in sample.images


def run_names(files: Sequence[Path]) -> list[str]:
    """A short name for each scores file: as many folders as tell it from the others, and its own name where that is
    not scores.json.

    Args:
        files: absolute and different.
    """
    parts = [file.parts[1:-1] if file.name == SCORES_FILE else file.parts[1:] for file in files]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) or SCORES_FILE for part in parts]


def _read_run(name: str, file: Path) -> ScoredRun:
    content = read_json(file, "scores")
    is_known = isinstance(content, dict) and content.keys() >= KEYS
    if not is_known or content["metric"] not in content["metrics"]:
        raise ValueError(f"{file} is not what mmcore evaluate writes: give its --output, or the folder that holds it")
    samples: dict[str, Sample] = {}
    if kept := content.get("samples"):
        path = file.with_name(kept["file"])
        if path.is_file():
            if sha256(path) != kept["sha256"]:
                raise ValueError(f"{path} is not the one that {file} was written with: run mmcore evaluate again")
            samples = {sample.id: sample for sample in map(_sample, path.read_text(encoding="utf-8").split("\n")[:-1])}
    return ScoredRun(name=name, content=content, samples=samples)


def _sample(line: str) -> Sample:
    row = json.loads(line)
    images = tuple(b"" if image is None else Path(image) for image in row.pop("images"))
    return Sample(**row | {"references": tuple(row["references"]), "images": images})
