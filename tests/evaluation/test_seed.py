"""SEED-Bench: its own file, parts and dimensions, the id that it has twice, and letters."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from mmcore.evaluation.scores import EvaluationError
from mmcore.evaluation.seed import DIMENSIONS, examples, load_questions, score, submission
from mmcore.evaluation.task import read_options


def question(name, kind, answer, **more):
    return {
        "question_id": name,
        "question_type_id": kind,
        "data_type": "image" if kind < 10 else "video",
        "data_id": f"{name}_1" if kind < 10 else f"{name}.webm",
        "question": "Which?",
        **{f"choice_{letter}": f"{letter}{letter}" for letter in "abcd"},
        "answer": answer,
        **more,
    }


DATA = {
    "questions": [question("1", 1, "A"), question("2", 5, "B"), question("3", 5, "C"), question("v1", 10, "D")],
    "question_type": {"Scene Understanding": 1, "Counting": 5, "Action Recognition": 10},
}


@pytest.fixture
def run(tmp_path):
    (tmp_path / "SEED-Bench.json").write_text(json.dumps(DATA))

    def run(answers, *given, **more):
        rows = answers if isinstance(answers, list) else [{"id": k, "answer": v} for k, v in answers.items()]
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return score(tmp_path / "p.jsonl", tmp_path / "SEED-Bench.json", options=read_options("seed", given), **more)

    return run


ALL = {"1": "A", "2": "B", "3": "A", "v1": "D"}


@pytest.mark.parametrize(("part", "right", "size"), [("image", 2, 3), ("video", 1, 1), ("all", 3, 4)])
def test_parts(run, part, right, size):
    """Answers to the rest are passed over."""
    scores = run(ALL, f"part={part}")
    assert (scores.correct, scores.size, scores.score) == (right, size, pytest.approx(100 * right / size))
    assert scores.counts == {"empty": 0, "missing": 0, "repeated": 0, "unparsed": 0}


def test_dimensions(run):
    scores = run(ALL, "part=all")
    groups = {kind: {name: (g.score, g.num_samples) for name, g in row.items()} for kind, row in scores.groups.items()}
    assert groups == {
        "dimension": {"Scene Understanding": (100, 1), "Counting": (50, 2), "Action Recognition": (100, 1)},
        "part": {"image": (pytest.approx(200 / 3), 3), "video": (100, 1)},
    }


def test_only_the_letter_is_the_letter(run):
    answers = {"1": "a", "2": "B. bb", "3": "C"}
    assert (run(answers).correct, run(answers).counts["unparsed"]) == (1, 2)
    scores = run(answers, "letters=first")
    assert (scores.correct, scores.scorer["letters"]) == (3, "first")


def test_what_is_missing_is_wrong_and_what_is_foreign_refused(run):
    scores = run([{"question_id": 1, "prediction": "A"}])
    assert (scores.score, scores.counts["missing"]) == (pytest.approx(100 / 3), 2)
    with pytest.raises(EvaluationError, match=r"do not have \(9\)"):
        run({**ALL, "9": "A"})
    with pytest.raises(EvaluationError, match=r"answers none of the 3 questions of .* that count"):
        run({"v1": "D"})
    assert run({"2": "B"}, only=["2"]).score == 100


def test_the_published_file_has_an_id_twice(tmp_path):
    """49914 is: 14,233 pictures' questions count then, as they do for LLaVA's script."""
    data = {**DATA, "questions": [*DATA["questions"], question("2", 1, "A")]}
    path = tmp_path / "SEED-Bench.json"
    path.write_text(json.dumps(data))
    rows = [{"question_id": name, "prediction": answer} for name, answer in [*ALL.items(), ("2", "B")]]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = score(tmp_path / "p.jsonl", path, options=read_options("seed"))
    assert (scores.correct, scores.size, scores.counts["repeated"]) == (2, 4, 1)
    assert [(sample.id, sample.score) for sample in scores.samples][1:] == [("2", 1), ("3", 0), ("2 (again)", 0)]
    for name in ("1", "2", "3"):
        (tmp_path / f"{name}_1").write_bytes(b"")
    assert [example.id for example in examples(path, options=read_options("seed"))] == ["1", "2", "3"]


@pytest.mark.parametrize("folder", ["images/SEED-Bench-image", "SEED-Bench-image", "images"])
def test_pictures_without_endings(tmp_path, folder):
    path = tmp_path / "SEED-Bench.json"
    path.write_text(json.dumps(DATA))
    (tmp_path / folder).mkdir(parents=True)
    for name in ("1", "2", "3"):
        (tmp_path / folder / f"{name}_1").write_bytes(b"")
    first, *_ = examples(path, options=read_options("seed"))
    assert first.images == (tmp_path / folder / "1_1",)
    assert first.prompt == (
        "Which?\nA. aa\nB. bb\nC. cc\nD. dd\nAnswer with the option's letter from the given choices directly."
    )
    assert (first.choices, first.references) == (("A", "B", "C", "D"), ("A",))


def test_a_videos_frame_in_its_middle(tmp_path):
    path = tmp_path / "SEED-Bench.json"
    path.write_text(json.dumps(DATA))
    frame = tmp_path / "SEED-Bench-video-image" / "10_v1.png"
    frame.parent.mkdir()
    frame.write_bytes(b"")
    (example,) = examples(path, options=read_options("seed", ["part=video"]))
    assert example.images == (frame,)


def test_tables_of_lmms_lab_and_of_vlmevalkit(tmp_path):
    rows = [question("1", 9, "A", image=[{"bytes": b"x"}]), question("v1", 11, "B", image=[{"bytes": b"y"}] * 8)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test-00000-of-00001.parquet")
    (first,) = examples(tmp_path, options=read_options("seed"))
    assert (first.id, first.images) == ("1", (b"x",))
    (video,) = examples(tmp_path, options=read_options("seed", ["part=video"]))
    assert video.images == (b"y",) * 8
    assert [q.groups["dimension"] for q in load_questions(tmp_path)] == [
        ("Text Understanding",),
        ("Action Prediction",),
    ]
    assert len(DIMENSIONS) == 12

    table = tmp_path / "SEEDBench_IMG.tsv"
    table.write_text("index\tquestion\tA\tB\tC\tD\tanswer\tcategory\n4\tWhich?\ta\tb\tc\td\tD\tInstance Identity\n")
    (tmp_path / "p.tsv").write_text("index\tanswer\tprediction\n4\tD\tA\n")
    scores = score(tmp_path / "p.tsv", table, options=read_options("seed"))
    assert (scores.score, list(scores.groups["dimension"])) == (0, ["Instance Identity"])
    with pytest.raises(ValueError, match="part=video: the references have no such questions"):
        score(tmp_path / "p.tsv", table, options=read_options("seed", ["part=video"]))


def test_what_the_leaderboard_takes(tmp_path):
    (tmp_path / "SEED-Bench.json").write_text(json.dumps(DATA))
    (tmp_path / "p.json").write_text(json.dumps({**ALL, "3": "c"}))
    arguments = tmp_path / "p.json", tmp_path / "SEED-Bench.json", tmp_path / "out.json"
    submission(*arguments, read_options("seed", ["part=all", "letters=first"]))
    found = [json.loads(line) for line in (tmp_path / "out.json").read_text().splitlines()]
    assert found == [{"question_id": name, "prediction": answer} for name, answer in {**ALL, "3": "C"}.items()]
