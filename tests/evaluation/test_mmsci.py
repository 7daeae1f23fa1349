"""MMSci: the official means of captions and accuracies of questions, prompts, and both forms of predictions."""

import json

import pytest

from mmcore.evaluation import mmsci, mmsci_matching
from mmcore.evaluation.confidence import Statistic
from mmcore.evaluation.metrics import captions
from mmcore.evaluation.scores import EvaluationError
from mmcore.evaluation.task import read_options

OFFICIAL = read_options("mmsci")
TEXTS = ["Negative MR of thin WTe2. (a) Sample 1.", "Spectra in water. (b) 25-500 uM.", "Cells in a dish."]
FIGURES = [
    {
        "uid": f"nc{number}",
        "category": "Physical sciences",
        "subject": "Optics" if number else "Materials science",
        "abstract": f"Abstract {number}.",
        "content": "word " * 2000,
        "image": f"nc{number}_figure_1.png",
        "caption": caption,
    }
    for number, caption in enumerate(TEXTS)
]


def question(setting, number, answer, subject="Optics"):
    options = "\n".join(f"{letter}: option {letter}" for letter in "ABCD")
    return {
        "uid": "x",
        "category": "Physical sciences",
        "subject": subject,
        "question": f"Which of setting {setting}, number {number}?\n{options}",
        "answer": answer,
        "image": f"nc{number}_figure_1.png",
    }


QUESTIONS = [[question(setting, number, "ABCD"[number]) for number in range(4)] for setting in (1, 2, 3)]


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
        return path

    return write


@pytest.fixture
def no_java(monkeypatch):
    """METEOR takes seconds to start."""
    monkeypatch.setattr(captions, "java_problem", lambda: "no Java runtime")


def answered(figures, *runs):
    return [
        {**figure, "prediction": list(answers)}
        for figure, answers in zip(figures, zip(*runs, strict=True), strict=True)
    ]


def test_captions_are_scored_one_by_one(write, no_java):
    """Means over captions; BLEU-k are the precisions of k-grams."""
    references = write("figures.json", FIGURES)
    said = [TEXTS[0], "Spectra in water.", "nothing"]
    path = write("p.json", {f"nc{number}_figure_1": text for number, text in enumerate(said)})
    scores = mmsci.score(path, references, options=OFFICIAL)
    assert scores.metrics["BLEU-1"] == scores.metrics["BLEU-3"] == pytest.approx((1 + 1 + 0) / 3)
    assert scores.metrics["BLEU"] == pytest.approx((1 + 2.718281828459045 ** (1 - 12 / 4)) / 3)
    # of 3 words 3, of 7 words 3 (spectra, in, water, b, 25, 500, um)
    assert scores.metrics["rouge1"] == scores.metrics["rougeL"] == pytest.approx((1 + 2 * 3 / 10) / 3)
    assert scores.metrics["CIDEr"] > 0 and "METEOR" not in scores.metrics and "METEOR" in scores.skipped
    assert (scores.score, scores.size, scores.correct) == (scores.metrics["rougeL"], 3, None)
    assert [round(sample.score, 4) for sample in scores.samples] == [1.0, 0.6, 0.0]
    assert scores.groups["subject"] == {
        "Materials science": mmsci.Group(score=1.0, num_samples=1),
        "Optics": mmsci.Group(score=pytest.approx(0.3), num_samples=2),
    }
    assert set(scores.intervals()) == set(scores.metrics)


def test_meteor_is_the_mean_of_captions(write, monkeypatch):
    each = Statistic(rows=[[0.2], [0.6], [0.1]], value=lambda sums: sums[..., 0])
    monkeypatch.setattr(captions, "meteor", lambda pairs, problem: (0.9, each))
    monkeypatch.setattr(captions, "java_problem", lambda: None)
    path = write("p.json", answered(FIGURES, TEXTS))
    scores = mmsci.score(path, write("figures.json", FIGURES), options={**OFFICIAL, "tokenizer": "python"})
    assert scores.metrics["METEOR"] == pytest.approx(0.3)
    assert any("MMSci's own is NLTK's" in note for note in scores.notes)


def test_empty_captions_have_no_part_in_the_mean(write, no_java):
    references = write("figures.json", FIGURES)
    path = write("p.json", answered(FIGURES, [TEXTS[0], " ", ""]))
    scores = mmsci.score(path, references, options=OFFICIAL)
    assert (scores.metrics["rouge1"], scores.size, scores.counts["empty"]) == (1.0, 1, 2)
    assert "2 empty captions have no part in the means, as officially" in scores.notes
    assert not any("like any other" in note for note in scores.notes)
    counted = mmsci.score(path, references, options={**OFFICIAL, "empty": "zero"})
    assert (counted.metrics["rouge1"], counted.size) == (pytest.approx(1 / 3), 3)
    with pytest.raises(EvaluationError, match="all captions are empty"):
        mmsci.score(write("p.json", answered(FIGURES, ["", "", " "])), references, options=OFFICIAL)


def test_several_answers_are_runs_whose_means_count(write, no_java):
    references = write("figures.json", FIGURES)
    path = write("p.json", answered(FIGURES, TEXTS, [TEXTS[0], "nothing", ""]))
    scores = mmsci.score(path, references, options=OFFICIAL)
    assert scores.metrics["rouge1"] == pytest.approx((1 + 1 / 2) / 2)  # the second run is over two captions
    assert [sample.score for sample in scores.samples] == [1.0, 0.5, 1.0]
    assert scores.scorer["runs"] == "2"
    with pytest.raises(ValueError, match="has 1 captions for some figures and 2 for others"):
        mmsci.score(
            write("p.json", [*answered(FIGURES[:2], *[TEXTS[:2]] * 2), *answered(FIGURES[2:], TEXTS[2:])]),
            references,
            options=OFFICIAL,
        )


def test_prompts_for_captions(write, tmp_path):
    references = write("figures.json", FIGURES)
    for number in range(3):
        write(f"images/nc{number}_figure_1.png", "")
    found = mmsci.examples(references, options=OFFICIAL)
    assert found[0].images == (tmp_path / "images/nc0_figure_1.png",)
    assert {example.prompt for example in found} == {
        "Please write a detailed description of the whole figures and all sub-figures based on the article."
    }
    abstract = mmsci.examples(references, options={**OFFICIAL, "grounding": "abstract"})[1].prompt
    instruction, rest = abstract.split("\n", 1)
    assert instruction.startswith("Please write a detailed description of the whole figure and all sub-figures")
    assert rest == " Article:\nAbstract 1."
    article = mmsci.examples(references, options={**OFFICIAL, "grounding": "article"})[1].prompt
    assert len(article) < 4 * 1024 + 2 * len(instruction)
    assert article.startswith(f"{instruction}\n Article:\nword word")
    assert article.endswith(f" ...\n\n{instruction}\n")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", ""),
        ("Z", "Z"),
        ("The answer is B.", "B"),
        ("The answer is b.", "B"),
        ("B: Temperature-dependent", "B"),
        ("B.", ""),  # none of the rules: officially the language model's
        ("(B)", ""),
        ("**b**", "B"),
        ("**Answer**: c", "C"),
        ("it shows subfigure (d)", "D"),
        ("sub-figure b, not C: this one", "B"),
        ("I think A figure like D: that", "A"),  # " A " is an article, and A comes first
        ("[INST] A: x [/INST] C ", "C"),
        ("", ""),
    ],
)
def test_the_rules_for_letters(answer, letter):
    assert mmsci_matching.read_letter(answer, answer) == letter


def test_the_rules_read_the_explanation():
    assert mmsci_matching.read_letter("no idea", "Therefore **D**") == "D"
    assert mmsci_matching.read_letter("A", "Therefore **D**") == "A"


def test_questions_in_three_settings(write):
    """Unparsable answers count as wrong; officially they leave the denominator."""
    references = write("questions.json", QUESTIONS)
    said = {f"{setting}/{number}": "ABCD"[number] for setting in (1, 2, 3) for number in range(4)}
    said |= {"1/1": "It is B.", "2/0": "no idea", "2/1": "B.", "3/3": "A"}
    path = write("p.json", said)
    scores = mmsci.score(path, references, options=OFFICIAL)
    accuracies = {"setting_1": 100.0, "setting_2": 50.0, "setting_3": 75.0}
    assert scores.metrics == {"accuracy": 75.0, **accuracies}
    assert (scores.metric, scores.score, scores.correct, scores.size) == ("accuracy", 75.0, 9, 12)
    assert scores.counts["unparsed"] == 2
    assert any("no letter in 2 of 12 answers" in note and "count as wrong" in note for note in scores.notes)
    assert {name: group.score for name, group in scores.groups["setting"].items()} == {"1": 100.0, "2": 50.0, "3": 75.0}
    assert set(scores.intervals()) == set(scores.metrics)
    official = mmsci.score(path, references, options={**OFFICIAL, "unparsed": "left-out"})
    assert official.metrics == {"accuracy": 90.0, **accuracies, "setting_2": 100.0}
    assert (official.correct, official.size) == (9, 10)
    with pytest.raises(EvaluationError, match="no answer names a letter"):
        nothing = write("p.json", dict.fromkeys(said, "?"))
        mmsci.score(nothing, references, options={**OFFICIAL, "unparsed": "left-out"})


def test_the_official_output_one_file_a_setting(write, tmp_path):
    """Lists of questions with `prediction`; the same question of two figures is told by its picture."""
    questions = [[dict(row) for row in rows] for rows in QUESTIONS]
    questions[2][1]["question"] = questions[2][0]["question"]
    questions[2][3] = {**questions[2][2], "answer": "B"}  # and the very same one twice: by their order
    references = write("questions.json", questions)
    for number, rows in enumerate(questions, 1):
        output = [
            {**row, "prediction": [{"answer": row["answer"], "explanation": ""}, {"answer": "?"}]} for row in rows
        ]
        write(f"out/wo_cot/setting-{number}/k_1/model.json", [{**row, "answer": ""} for row in output])
    scores = mmsci.score(tmp_path / "out", references, options=OFFICIAL)
    assert (scores.score, scores.size) == (100.0, 12)
    one = tmp_path / "out/wo_cot/setting-2/k_1/model.json"
    scores = mmsci.score(one, references, options={**OFFICIAL, "setting": "2"})
    assert scores.metrics == {"accuracy": 100.0, "setting_2": 100.0}
    with pytest.raises(EvaluationError, match="8 of 12 samples have no prediction"):
        mmsci.score(one, references, options=OFFICIAL)
    with pytest.raises(EvaluationError, match="references do not have"):
        mmsci.score(one, references, options={**OFFICIAL, "setting": "1"})


def test_prompts_for_questions(write):
    for number in range(4):
        write(f"images/nc{number}_figure_1.png", "")
    example = mmsci.examples(write("questions.json", QUESTIONS), options={**OFFICIAL, "setting": "3"})[1]
    assert example.prompt.endswith("D: option D\nChoose one answer from available options. Return only your answer.")
    assert (example.id, example.references, example.choices) == ("3/1", ("B",), ("A", "B", "C", "D"))
    flat = mmsci.examples(write("one.json", QUESTIONS[1]), options=OFFICIAL)
    assert [example.id for example in flat] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 1}, "neither MMSci's list of figures"),
        ([], "has no figures"),
        ([*FIGURES, FIGURES[0]], "has a figure twice"),
        ([{**FIGURES[0], "caption": ""}], "1 of 1 figures have no caption"),
        ([[{**QUESTIONS[0][0], "answer": ""}]], "1 of 1 questions have no answer"),
        ([[{"question": "?"}]], r"a question has question, image, answer \(KeyError\('image'\)\)"),
        ([QUESTIONS[0]] * 4, "has 4 settings"),
    ],
)
def test_files_that_are_none_of_its(write, content, message):
    with pytest.raises(ValueError, match=message):
        mmsci.score(write("p.json", []), write("r.json", content), options=OFFICIAL)
