"""TextVQA: questions about words in pictures of Open Images, each asked of ten people; soft accuracy.

Read are TextVQA_0.5.1_val.json ({"data": [...]}), Hugging Face's table (lmms-lab/textvqa), and the pairs of files in
VQA's form that others have made of it. The prompt has no OCR tokens.

The official rule is that of the benchmark's authors, `m4c`, by which LLaVA's 58.2 % are counted too; VQA's is mode=vqa
(see `mmcore.evaluation.metrics.vqa`). LLaVA's files of answers have the picture's id as `question_id`: the question is
found by its words in `prompt`, as in llava/eval/eval_textvqa.py at commit c121f04.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from mmcore.evaluation import vqav2
from mmcore.evaluation.predictions import Predictions, load_predictions, match_answers
from mmcore.evaluation.scores import Scores
from mmcore.evaluation.short_answers import ANSWER_FORMATS, Question, ask, file_name, number, submit
from mmcore.evaluation.tables import read_rows
from mmcore.evaluation.task import Example, Options

METRIC = vqav2.METRIC
SCALES = vqav2.SCALES
OPTIONS = vqav2.OPTIONS


def examples(data: Path, images: Path | None = None, *, options: Options) -> list[Example]:
    """See `Task.examples`; answers need not be there."""
    return ask(data, images, vqav2.load(data, "questions"), names=_names)


def score(predictions: Path, references: Path, *, options: Options, only: Collection[str] | None = None) -> Scores:
    """See `Task.score`; the score is a percentage."""
    questions = vqav2.load_answered(references, only)
    return vqav2.soft(questions, _load_answers(predictions, questions, references), options, official="m4c")


def submission(predictions: Path, references: Path, output: Path, options: Options) -> None:
    """For EvalAI: [{"question_id", "answer"}]."""
    submit(
        predictions,
        references,
        vqav2.load(references),
        output,
        lambda question, answer: {"question_id": number(question.id), "answer": answer},
    )


def _names(question: Question) -> list[str]:
    name = file_name(question) or (question.image_id and f"{question.image_id}.jpg")
    return [name, f"train_images/{name}", f"test_images/{name}"]


def _load_answers(predictions: Path, questions: Mapping[str, Question], references: Path) -> Predictions:
    rows = [row for _, row in read_rows(predictions, "predictions")]
    pictures = {question.image_id for question in questions.values()}
    is_llava = bool(rows) and all(
        isinstance(row, dict) and {"question_id", "prompt", "text"} <= row.keys() and row["question_id"] in pictures
        for row in rows
    )
    if not is_llava:
        return load_predictions(predictions, list(questions), references, formats=ANSWER_FORMATS)
    names: dict[tuple[str, str], list[str]] = {}
    for question in questions.values():
        names.setdefault((question.image_id, question.text.lower().strip()), []).append(question.id)
    answers: dict[str, str] = {}
    for row in rows:
        # The line of the prompt that is a question of this picture; asked twice, its answers come in the same order.
        lines = (line.lower().strip() for line in row["prompt"].split("\n"))
        asked = next((names[key] for line in lines if names.get(key := (row["question_id"], line))), None)
        answers[asked.pop(0) if asked else f"{row['question_id']}: {row['prompt']:.40}"] = row["text"]
    return match_answers(predictions, answers, list(questions), references)
