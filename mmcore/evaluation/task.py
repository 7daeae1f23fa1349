"""What a benchmark is: one file that loads its examples, prompts for them, and scores the answers.

By default it scores as the official scorer does; what deviates from that has a name and is an option (`OPTIONS`).
"""

import importlib
import json
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

from mmcore.checks import nearest
from mmcore.config import EvalConfig
from mmcore.evaluation.scores import Scores
from mmcore.foreign import parse_json

Options = Mapping[str, str]
"""Of a task, by name, all of them; see `read_options`."""

# A benchmark is a module with the functions of `Task`, imported when it is asked for.
TASKS = {
    "coco": "mmcore.evaluation.coco",
    "exact-match": "mmcore.evaluation.exact_match",
    "mmbench": "mmcore.evaluation.mmbench",
    "mmmu": "mmcore.evaluation.mmmu",
    "loss": "mmcore.evaluation.loss",
    "mathvista": "mmcore.evaluation.mathvista",
    "mme": "mmcore.evaluation.mme",
    "mmsci": "mmcore.evaluation.mmsci",
    "vqav2": "mmcore.evaluation.vqav2",
    "okvqa": "mmcore.evaluation.okvqa",
    "textvqa": "mmcore.evaluation.textvqa",
    "vizwiz": "mmcore.evaluation.vizwiz",
    "gqa": "mmcore.evaluation.gqa",
    "docvqa": "mmcore.evaluation.docvqa",
    "infovqa": "mmcore.evaluation.infovqa",
    "chartqa": "mmcore.evaluation.chartqa",
    "ocrbench": "mmcore.evaluation.ocrbench",
    "a-okvqa": "mmcore.evaluation.a_okvqa",
    "pope": "mmcore.evaluation.pope",
    "scienceqa": "mmcore.evaluation.scienceqa",
    "ai2d": "mmcore.evaluation.ai2d",
    "realworldqa": "mmcore.evaluation.realworldqa",
    "seed": "mmcore.evaluation.seed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One thing to answer, and what would be right."""

    id: str
    prompt: str
    """With an image tag where a picture stands among the words; without any, pictures come first."""
    images: tuple[Path | bytes, ...] = ()
    """Files, or their contents where the benchmark's own file holds them."""
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    """Answers to choose among, as the model would write them; none if it answers freely."""


class Task(Protocol):
    """The two things that a benchmark's file does, and what is known of them beforehand.

    A task may also have `submission(predictions, references, output, options)`, which writes what the benchmark's
    own server takes, for splits whose answers are not public.
    """

    METRIC: str
    """The number that the task is known by, one of `SCALES`."""
    SCALES: Mapping[str, str]
    """All metrics, and what each can be; a machine may lack what one of them needs. More is better, but for losses."""
    OPTIONS: Mapping[str, tuple[str, ...]]
    """Names of what can be chosen, with its values, of which the first is official and the default."""

    def examples(self, data: Path, images: Path | None = None, *, options: Options) -> list[Example]:
        """What a model is asked, in the file's order.

        Args:
            data: the benchmark's own file.
            images: folder of its pictures; by default `images` beside the file, or the file's folder.
            options: as of `read_options`.
        Raises:
            ValueError: not this benchmark's format, or a picture is missing.
        """

    def score(
        self, predictions: Path, references: Path, *, options: Options, only: Collection[str] | None = None
    ) -> Scores:
        """Score a file of predictions against the benchmark's own file; the pictures are not needed.

        Args:
            options: as of `read_options`.
            only: ids of the references that count; by default all.
        Raises:
            ValueError: a file is missing, unreadable or in another format.
            EvaluationError: the files do not belong together, or the scorer failed.
        """


def check_task(name: str) -> str:
    """`name`, if there is such a task.

    Raises:
        ValueError: there is none; names the nearest.
    """
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}{nearest(name, TASKS)} (tasks: {', '.join(TASKS)})")
    return name


def load_task(name: str) -> Task:
    """The benchmark's module.

    Raises:
        ValueError: there is no such task.
    """
    return cast(Task, importlib.import_module(TASKS[check_task(name)]))


def read_options(task: str, given: Iterable[str] = (), flag: str = "--options") -> dict[str, str]:
    """All options of a task: those that are given, as name=value, and the defaults of the others.

    Raises:
        ValueError: no such option, or it has no such value; names the nearest.
    """
    known = load_task(task).OPTIONS
    options = {name: values[0] for name, values in known.items()}
    for entry in given:
        name, _, value = entry.partition("=")
        if name not in known:
            has = ", ".join(f"{name}={'|'.join(values)}" for name, values in known.items()) or "none"
            raise ValueError(f"{flag} {entry}: {task} has no option {name!r}{nearest(name, known)} (it has {has})")
        if value not in known[name]:
            raise ValueError(f"{flag} {entry}: {name} of {task} is {' or '.join(known[name])}")
        options[name] = value
    return options


def check_eval(config: EvalConfig) -> None:
    """Find what is wrong with a run's evaluation before there is a model.

    Raises:
        ValueError: no such task, metric, option or file, or examples that lack a picture or a reference.
    """
    task = load_task(config.task)
    if config.metric and config.metric not in task.SCALES:
        raise ValueError(
            f"--eval.metric {config.metric}: {config.task} has no such metric{nearest(config.metric, task.SCALES)} (it "
            f"has {', '.join(task.SCALES)})"
        )
    read_options(config.task, config.options, "--eval.options")
    if not Path(config.data).exists():
        raise ValueError(f"--eval.data {config.data} is not there: give the file or folder of {config.task}'s examples")
    bare = [example.id for example in chosen_examples(replace(config, num_samples=0)) if not example.references]
    if bare:
        raise ValueError(
            f"--eval.data {config.data}: {len(bare)} examples have nothing to compare with, the first is {bare[0]}"
        )


def chosen_examples(config: EvalConfig) -> list[Example]:
    """The examples that a run is scored on, in the file's order: the same ones at every step and of every run."""
    options = read_options(config.task, config.options, "--eval.options")
    images = Path(config.images) if config.images else None
    examples = load_task(config.task).examples(Path(config.data), images, options=options)
    count = min(config.num_samples or len(examples), len(examples))
    return [examples[index] for index in sorted(random.Random(0).sample(range(len(examples)), count))]


def only_these(references: dict[str, Any], only: Collection[str] | None) -> dict[str, Any]:
    """The references whose ids count; see `Task.score`."""
    return references if only is None else {name: value for name, value in references.items() if name in only}


def read_json(path: Path, what: str) -> Any:
    """Content of a JSON file.

    Raises:
        ValueError: missing, unreadable, or not JSON; `what` says in the message what the file was to be.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{what} {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {path} is not UTF-8 text: byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{what} {path} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}"
        ) from None


def sample_id(value: Any, where: str) -> str:
    """An id as text: files write the same id as a number or as a string.

    Raises:
        ValueError: neither of them.
    """
    if isinstance(value, (int, str)) and not isinstance(value, bool) and value != "":
        return str(value)
    raise ValueError(f"{where}: an id is a number or a text, not {value!r}")


def find_images(data: Path, images: Path | None, names: Sequence[str | None]) -> list[tuple[Path, ...]]:
    """Paths of the pictures that the rows of `data` name, of each row one, or none where it names none.

    Raises:
        ValueError: one is not there; names the file, the row and how many there are.
    """
    named = [(row, name) for row, name in enumerate(names) if name is not None]
    candidates = [images] if images else [data.parent / "images", data.parent]
    # The first picture tells which of the two it is: a file may name `images/1.jpg` or `1.jpg`.
    folder = next((path for path in candidates if not named or (path / named[0][1]).is_file()), candidates[0])
    missing = [(row, folder / name) for row, name in named if not (folder / name).is_file()]
    if missing:
        row, path = missing[0]
        raise ValueError(
            f"{data}: {len(missing)} of {len(named)} pictures are missing, the first is {path} of row {row} (from 0): "
            "--images (of `mmcore train` --eval.images) names the folder that they lie in"
        )
    return [() if name is None else (folder / name,) for name in names]
