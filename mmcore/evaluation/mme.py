"""MME: questions to be answered with yes or no, two for each picture, in 14 tasks of perception and cognition.

A task's score is its accuracy over questions plus its accuracy over pictures, both of whose questions must be right,
each in percent: at most 200. Perception is the sum of ten tasks, cognition of four. An answer is yes or no if it is
that word, in any case, or has it among its first four characters ("yes" is looked for first); every other answer is
neither, and wrong.

Source: BradyFU/Awesome-Multimodal-Large-Language-Models at commit 1c1d69e, tools/eval_tool.zip, calculation.py. The
prompt is LLaVA-1.5's (llava_mme.jsonl of the eval.zip that its docs/Evaluation.md names), which lmms-eval took over
(EvolvingLMMs-Lab/lmms-eval, lmms_eval/tasks/mme at commit 306a8b4).

Questions are read from the release (a folder or zip of TASK/*.txt with the pictures beside them, or in `images` with
the texts in `questions_answers_YN`), from the folder of TASK.txt that eval_tool has (image, question, answer), and
from rows of question_id, category, question, answer and image (lmms-lab/MME: one Parquet file, or a folder of them).
Predictions may be eval_tool's folder of TASK.txt (image, question, answer, prediction) or LLaVA's answer file as well.
"""

import zipfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmcore.evaluation.confidence import Statistic
from mmcore.evaluation.predictions import Predictions, load_predictions, match_answers
from mmcore.evaluation.scores import EvaluationError, Group, Sample, Scores
from mmcore.evaluation.tables import read_rows
from mmcore.evaluation.task import Example, Options
from mmcore.foreign import check_zip

if TYPE_CHECKING:
    import numpy as np

PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
TASKS = [*PERCEPTION, *COGNITION]

METRIC = "perception"
SCALES = {"perception": "0 to 2000", "cognition": "0 to 800", "total": "0 to 2800"}
OPTIONS: dict[str, tuple[str, ...]] = {}

HINT = "Please answer yes or no."
INSTRUCTION = "Answer the question using a single word or phrase."
PICTURES = (".jpg", ".jpeg", ".png")
TEXTS = "questions_answers_YN"


@dataclass(frozen=True, slots=True)
class Question:
    """One of a picture's two."""

    id: str
    """TASK/PICTURE/1 or 2, the picture's name without its ending: the same from every file."""
    task: str
    image: str
    """File name of the picture; without an ending where the file does not tell it."""
    text: str
    answer: str
    """yes or no."""
    picture: Any = None
    """Path, or path inside of a zip file, or bytes; None where the file has none."""

    @property
    def key(self) -> tuple[str, str, str]:
        return _key(self.task, self.image, self.text)


def examples(data: Path, images: Path | None = None, *, options: Options) -> list[Example]:
    """See `Task.examples`."""
    found = load_questions(data)
    pictures = [_picture(question, data, images) for question in found]
    bare = [question for question, picture in zip(found, pictures, strict=True) if picture is None]
    if bare:
        raise ValueError(
            f"{data}: {len(bare)} of {len(found)} questions have no picture, the first is {bare[0].image} of "
            f"{bare[0].task}: --images names the folder of the release, or give the release itself"
        )
    return [
        Example(
            id=question.id,
            prompt=f"{question.text.replace(HINT, '').strip()}\n{INSTRUCTION}",
            images=(picture if isinstance(picture, (Path, bytes)) else picture.read_bytes(),),
            references=(question.answer.capitalize(),),
        )
        for question, picture in zip(found, pictures, strict=True)
    ]


def score(predictions: Path, references: Path, *, options: Options, only: Collection[str] | None = None) -> Scores:
    """See `Task.score`. Of a picture whose other question does not count, the one that counts decides."""
    import numpy as np

    questions = [question for question in load_questions(references) if only is None or question.id in only]
    found = _load_answers(predictions, questions, references)
    labels = {name: parse(answer) for name, answer in found.answers.items()}
    samples = [
        Sample(
            id=question.id,
            score=float(labels[question.id] == question.answer),
            answer=found.answers[question.id],
            parsed=labels[question.id],
            references=(question.answer,),
            group=question.task,
        )
        for question in questions
    ]
    rows = np.asarray(_rows(questions, samples))
    totals = rows.sum(0)
    statistics = {name: Statistic(rows=rows, value=partial(_sum, tasks)) for name, tasks in _sums(questions).items()}
    groups: dict[str, dict[str, Group]] = {"task": {}, "accuracy": {}, "accuracy plus": {}}
    for task, (right, asked, whole, shown) in zip(TASKS, totals.reshape(-1, 4).tolist(), strict=True):
        if asked:
            accuracy, plus = 100 * right / asked, 100 * whole / shown
            groups["task"][task] = Group(score=accuracy + plus, num_samples=int(asked))
            groups["accuracy"][task] = Group(score=accuracy, num_samples=int(asked))
            groups["accuracy plus"][task] = Group(score=plus, num_samples=int(shown))
    absent = [task for task in TASKS if task not in groups["task"]]
    notes = [f"no question is of {', '.join(absent)}: the sums are of the other tasks"] if absent else []
    if num_other := sum(not label for label in labels.values()):
        notes.append(f"{num_other} of {len(labels)} answers are neither yes nor no: they count as wrong")
    return Scores(
        metric=METRIC if METRIC in statistics else "cognition",
        metrics={name: float(statistic.value(totals)) for name, statistic in statistics.items()},
        scales={name: SCALES[name] for name in statistics},
        statistics=statistics,
        samples=samples,
        is_right_or_wrong=True,
        groups=groups,
        counts={**found.counts, "unparsed": num_other},
        scorer={"rule": "MME eval_tool/calculation.py at 1c1d69e"},
        notes=(*found.notes, *notes),
    )


def parse(answer: str) -> str:
    """yes, no, or "" for what is neither."""
    start = answer.lower()[:4]
    return next((label for label in ("yes", "no") if label in start), "")


def load_questions(path: Path) -> list[Question]:
    """All questions of a file or folder, in its order, of the release and of eval_tool in the order of the tasks.

    Raises:
        ValueError: no such file, a row lacks something, or a picture does not have two questions.
    """
    if path.is_dir() and not any(path.rglob("*.parquet")):
        rows = _tool(path) if any((path / f"{task}.txt").is_file() for task in TASKS) else _release(path, path)
    elif zipfile.is_zipfile(path) and path.suffix.lower() == ".zip":
        archive = zipfile.ZipFile(path)
        check_zip(archive, str(path))
        rows = _release(zipfile.Path(archive), path)
    else:
        files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        rows = (_from_row(row, where) for file in files for where, row in read_rows(file, "questions"))
    questions: list[Question] = []
    seen: Counter[tuple[str, str]] = Counter()
    for task, image, text, answer, picture in rows:
        stem = _stem(image)
        seen[task, stem] += 1
        label = answer.strip().lower()
        if task not in TASKS or label not in ("yes", "no"):
            what = f"{task!r} is none of its tasks" if task not in TASKS else f"the answer is {answer!r}, not yes or no"
            raise ValueError(f"{path} is not MME's: picture {image}: {what}")
        questions.append(Question(f"{task}/{stem}/{seen[task, stem]}", task, image, text, label, picture))
    odd = [f"{task}/{image}" for (task, image), count in seen.items() if count != 2]
    if odd or not questions:
        raise ValueError(
            f"{path} is not MME's, or not whole: every picture has two questions, but "
            + (f"{len(odd)} of {len(seen)} do not, first {odd[0]}" if odd else "there is none")
        )
    return questions


Row = tuple[str, str, str, str, Any]
"""Task, picture's file name, question, answer, picture."""


def _from_row(row: Any, where: str) -> Row:
    try:
        name, text, answer, task = (row[key] for key in ("question_id", "question", "answer", "category"))
        if not all(isinstance(value, str) for value in (name, text, answer, task)):
            raise TypeError
    except (KeyError, TypeError):
        raise ValueError(f"{where}: a question of MME has question_id, category, question and answer") from None
    picture = row.get("image")
    return task, name.rpartition("/")[2], text, answer, picture.get("bytes") if isinstance(picture, dict) else None


def _tool(folder: Path) -> Iterator[Row]:
    """Of eval_tool: one file a task."""
    for task in TASKS:
        if (folder / f"{task}.txt").is_file():
            for columns in _lines(folder / f"{task}.txt", (3, 4)):
                yield task, columns[0], columns[1], columns[2], None


def _release(root: Any, path: Path) -> Iterator[Row]:
    """Of the release, whose folders of tasks may lie in MME_Benchmark or another folder."""
    while not any((root / task).is_dir() for task in TASKS):
        folders = [item for item in root.iterdir() if item.is_dir() and not item.name.startswith(("_", "."))]
        if len(folders) != 1:
            raise ValueError(f"{path} holds no questions of MME: no folder has a task's name, such as {TASKS[0]}")
        root = folders[0]
    for task in TASKS:
        if not (root / task).is_dir():
            continue
        texts = root / task / TEXTS
        texts, pictures = (texts, root / task / "images") if texts.is_dir() else (root / task, root / task)
        named = {_stem(item.name): item for item in pictures.iterdir() if item.name.lower().endswith(PICTURES)}
        for file in sorted(texts.iterdir(), key=lambda item: str(item.name)):
            if file.name.endswith(".txt"):
                picture = named.get(_stem(file.name))
                for question, answer in _lines(file, (2,)):
                    yield task, picture.name if picture else _stem(file.name), question, answer, picture


def _lines(file: Any, widths: Sequence[int]) -> Iterator[list[str]]:
    """Columns of every line that is not empty."""
    try:
        # A line ends at a line break alone: read_text() of a path would end it at a carriage return as well.
        lines = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: byte {error.start}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            columns = line.split("\t")
            if len(columns) not in widths:
                raise ValueError(
                    f"{file} line {number} has {len(columns)} columns, not {' or '.join(map(str, widths))}: tabs "
                    "divide them, and there may be none in an answer"
                )
            yield columns


def _picture(question: Question, data: Path, images: Path | None) -> Any:
    """What the file has, or else the picture's path in the release's folders."""
    if question.picture is not None:
        return question.picture
    for folder in [images] if images else [data.parent / "images", data.parent]:
        for part in (question.task, f"{question.task}/images"):
            path = folder / part / question.image
            if path.is_file():
                return path
    return None


def _load_answers(path: Path, questions: Sequence[Question], references: Path) -> Predictions:
    """Of each question; see the file's beginning for the formats."""
    ids = [question.id for question in questions]
    if path.is_dir():
        files = [path / f"{task}.txt" for task in dict.fromkeys(question.task for question in questions)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise EvaluationError(f"{path} does not answer {references}: it lacks {', '.join(missing)}")
        given = [(_key(file.stem, image, text), said) for file in files for image, text, _, said in _lines(file, (4,))]
        return _by_question(path, given, questions, references)
    rows = [row for _, row in read_rows(path, "predictions")]
    if all(isinstance(row, dict) and {"question_id", "prompt", "text"} <= row.keys() for row in rows) and rows:
        names = [str(row["question_id"]).split("/") for row in rows]
        given = [
            (_key(name[0], name[-1], str(row["prompt"])), str(row["text"]).strip())
            for name, row in zip(names, rows, strict=True)
        ]
        return _by_question(path, given, questions, references)
    found = load_predictions(path, ids, references)
    # The official file has a line an answer: what breaks it is to be deleted.
    answers = {name: answer.replace("\r", "").replace("\n", "").strip() for name, answer in found.answers.items()}
    return Predictions(answers=answers, counts=found.counts, notes=found.notes)


def _by_question(
    path: Path, given: Sequence[tuple[tuple[str, str, str], str]], questions: Sequence[Question], references: Path
) -> Predictions:
    """Predictions that go by the question that they answer, not by an id."""
    named = {question.key: question.id for question in questions}
    answers: dict[str, str] = {}
    repeated, contradictory = 0, []
    for key, answer in given:
        name = named.get(key, "/".join(key))
        if name not in answers:
            answers[name] = answer
        elif answers[name] == answer:
            repeated += 1
        else:
            contradictory.append(name)
    ids = [question.id for question in questions]
    return match_answers(path, answers, ids, references, num_repeated=repeated, contradictory=contradictory)


def _key(task: str, image: str, text: str) -> tuple[str, str, str]:
    """What tells a question from all others, however its text was put."""
    return task, _stem(image), " ".join(text.replace(HINT, " ").replace(INSTRUCTION, " ").split())


def _stem(name: str) -> str:
    return name.rpartition(".")[0] or name


def _rows(questions: Sequence[Question], samples: Sequence[Sample]) -> list[list[float]]:
    """Of every picture [4 * tasks]: of its task the right answers, all, whether all are right, and that it is one."""
    rows: dict[tuple[str, str], list[float]] = {}
    for question, sample in zip(questions, samples, strict=True):
        picture = (question.task, _stem(question.image))
        start = 4 * TASKS.index(question.task)
        if picture not in rows:
            rows[picture] = [0.0] * (4 * len(TASKS))
            rows[picture][start + 2 : start + 4] = 1.0, 1.0
        rows[picture][start] += sample.score
        rows[picture][start + 1] += 1.0
        rows[picture][start + 2] *= sample.score
    return list(rows.values())


def _sums(questions: Sequence[Question]) -> dict[str, tuple[int, ...]]:
    """Metrics with the tasks, by number, that they add up; only of tasks that are there."""
    present = {question.task for question in questions}
    kinds = {"perception": PERCEPTION, "cognition": COGNITION, "total": TASKS}
    sums = {name: tuple(TASKS.index(task) for task in kind if task in present) for name, kind in kinds.items()}
    return {name: tasks for name, tasks in sums.items() if tasks}


def _sum(tasks: Sequence[int], sums: "np.ndarray") -> Any:
    """The score of some tasks, by number, of the sums over pictures."""
    tables = sums.reshape(*sums.shape[:-1], len(TASKS), 4)[..., list(tasks), :]
    return (100 * tables[..., 0] / tables[..., 1] + 100 * tables[..., 2] / tables[..., 3]).sum(-1)
