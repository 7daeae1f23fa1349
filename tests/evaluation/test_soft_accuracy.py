"""Rules of soft accuracy against numbers that the benchmarks' own scorers gave."""

import json
from pathlib import Path

import pytest

from mmcore.evaluation.metrics.vqa import CONTRACTIONS, CONTRACTIONS_VIZWIZ, accuracy, m4c, normalise

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "vqa_norm" / "edge_cases_normalised.json"

# What ten people say, and an answer; then its accuracy by GT-Vision-Lab/VQA's vqaEval.py at commit a013f00, by that of
# the VizWiz API, by LLaVA's m4c_evaluator.py at commit c121f04, and by Megatron-LM's rule, each as it was run on this.
MEASURED = [
    (["yes"] * 10, "Yes.", 0.0, 1.0, 1.0, 1.0),
    (["yes"] * 9 + ["no"], "Yes.", 1.0, 1.0, 1.0, 1.0),
    (["2"] * 3 + ["two"] * 2 + ["3"] * 5, "Two", 1.0, 0.9, 1.0, 1.0),
    (["1,000"] + ["10"] * 9, "1,000", 0.3, 0.0, 0.3, 1 / 3),
    (["left,right"] * 2 + ["left right"] + ["a dog"] * 7, "left/right!", 0.9, 0.3, 0.3, 1.0),
    (["dont know"] * 4 + ["red"] * 6, "don't know", 1.0, 0.0, 1.0, 1.0),
    (["the cat's"] * 2 + ["red?"] * 8, "cat's", 0.6, 0.0, 0.6, 2 / 3),
    (["red"] * 10, " red\n", 1.0, 1.0, 1.0, 1.0),
]


@pytest.mark.skipif(not GOLDEN.is_file(), reason="no ../shared/golden beside the project")
def test_normalises_as_the_official_scorer():
    pairs = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert len(pairs) >= 50
    for text, expected in pairs:
        assert normalise(text.replace("\n", " ").replace("\t", " ").strip()) == expected, text


@pytest.mark.parametrize(("people", "answer", *(rules := ("vqa", "vizwiz", "m4c", "min3"))), MEASURED)
def test_accuracy_is_that_of_the_official_scorers(people, answer, vqa, vizwiz, m4c, min3):
    for rule, expected in zip(rules, (vqa, vizwiz, m4c, min3), strict=True):
        assert accuracy(answer, people, rule)[0] == pytest.approx(expected, abs=1e-15), rule


@pytest.mark.parametrize(("same", "left_out", "of_all"), [(0, 0, 0), (1, 0.3, 1 / 3), (2, 0.6, 2 / 3), (3, 0.9, 1)])
def test_one_two_and_three_people_who_say_the_same(same, left_out, of_all):
    people = ["cat"] * same + ["dog"] * (10 - same)
    for rule in ("vqa", "vizwiz", "m4c"):
        assert accuracy("cat", people, rule)[0] == pytest.approx(left_out)
    assert accuracy("cat", people, "min3")[0] == pytest.approx(of_all)
    assert accuracy("cat", ["cat"] * 4 + ["dog"] * 6, "vqa")[0] == 1


def test_what_a_rule_compares():
    assert accuracy("The Cat.", ["cat"] * 10, "vqa") == (0, "The Cat.")
    assert accuracy("The Cat.", ["cat"] * 9 + ["dog"], "vqa") == (1, "cat")
    assert accuracy("The Cat.", ["cat"] * 10, "min3") == (1, "cat")


@pytest.mark.parametrize(
    ("text", "plain", "cut"),
    [
        ("dog's", "dog's", "dog 's"),
        ("red,blue", "red blue", "redblue"),
        ("1,000", "1000", "1000"),
        ("why?not", "why not", "whynot"),
        ("Three, four", "3 4", "3 4"),
    ],
)
def test_m4c_removes_commas_and_cuts_clitics(text, plain, cut):
    assert (normalise(text), m4c(text)) == (plain, cut)


def test_dots_are_removed_until_the_32nd():
    assert normalise("." * 40 + "x") == "." * 8 + "x"


def test_contractions():
    assert len(CONTRACTIONS) == len(CONTRACTIONS_VIZWIZ) == 120
    assert normalise("dont") == "don't"
    assert normalise("dont", is_vizwiz=True) == "don\u2019t"
    assert normalise("cant", is_vizwiz=True) == "can't"
    assert normalise("somebody'd") == "somebodyd"
