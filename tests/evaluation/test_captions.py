"""Caption metrics: published scores to the digit, line breaks, Java that is missing, dead or hung."""

import json
import os
import random
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmcore.evaluation.confidence import Statistic, interval, mean
from mmcore.evaluation.metrics import captions
from mmcore.evaluation.metrics.captions import sanitise, score_captions, tokenize_ptb, tokenize_python
from mmcore.evaluation.scores import EvaluationError

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no ../shared/golden beside the project")
needs_java = pytest.mark.skipif(
    captions.java_problem() is not None, reason="no Java runtime: no METEOR, no PTB tokenizer"
)

CANDIDATES = {"1": "A cat sits on a mat.", "2": "Two dogs are running in a park.", "3": "a red bus"}
REFERENCES = {
    "1": ["a cat sits on the mat.", "There's a cat (asleep) on a mat!"],
    "2": ["two dogs run through the park"],
    "3": ["a red bus on a street", "A bus; it's red."],
}
BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


@pytest.fixture
def no_meteor(monkeypatch):
    """METEOR loads its paraphrases for seconds: tests that are not about it do without."""
    monkeypatch.setattr(captions, "meteor", lambda pairs, problem: (0.0, mean([0.0], 1.0)))


def at_its_sums(statistic: Statistic) -> float:
    return float(statistic.value(np.asarray(statistic.rows, dtype=np.float64).sum(0)))


def golden(name: str, *path: str) -> tuple[dict[str, float], dict[str, float]]:
    """Published and measured scores; SPICE is not among what we compute."""
    found = json.loads((GOLDEN / name / "expected.json").read_text())
    for key in path:
        found = found[key]
    return {key: value for key, value in found["published"].items() if key != "SPICE"}, found[
        "measured_pycocoevalcap_1.2"
    ]


@needs_golden
@needs_java
def test_nlgeval_scores_to_the_digit():
    """Maluuba/nlg-eval's README: BLEU-4 .201143, METEOR .295797, ROUGE-L .522104, CIDEr 1.242192."""
    published, measured = golden("caption_nlgeval")
    lines = [(GOLDEN / "caption_nlgeval" / f"{name}.txt").read_text().splitlines() for name in ("hyp", "ref1", "ref2")]
    candidates = {str(row): texts[0] for row, texts in enumerate(zip(*lines, strict=True))}
    references = {str(row): texts[1:] for row, texts in enumerate(zip(*lines, strict=True))}
    result = score_captions(candidates, references, "none")
    assert {name: round(value, 6) for name, value in result.metrics.items()} == published
    assert result.metrics == pytest.approx(measured, rel=1e-12)
    assert {name: at_its_sums(statistic) for name, statistic in result.statistics.items()} == pytest.approx(measured)
    assert result.skipped == {}
    assert result.scorer["tokenizer"] == "none"


@needs_golden
@needs_java
def test_clipscore_scores_to_the_digit():
    """jmhessel/clipscore's README: METEOR .3444, ROUGE .4280, CIDEr .5637."""
    published, measured = golden("caption_clipscore", "good")
    folder = GOLDEN / "caption_clipscore"
    candidates = json.loads((folder / "good_captions.json").read_text())
    references = json.loads((folder / "refs.json").read_text())
    result = score_captions(candidates, references)
    assert {name: round(value, 4) for name, value in result.metrics.items()} == published
    assert result.metrics == pytest.approx(measured, rel=1e-12)
    assert result.scorer["tokenizer"] == "ptb"


@needs_java
@pytest.mark.parametrize("character", BREAKS)
def test_a_line_break_in_a_caption_shifts_no_other(character):
    broken = {**CANDIDATES, "1": CANDIDATES["1"].replace(" ", character, 1)}
    lines = tokenize_ptb([sanitise(text) for text in (*broken.values(), "", "...")])
    assert lines == ["a cat sits on a mat", "two dogs are running in a park", "a red bus", "", ""]


@needs_java
def test_line_breaks_anywhere_change_no_score(no_meteor):
    broken = {name: [BREAKS + text.replace(" ", BREAKS) for text in texts] for name, texts in REFERENCES.items()}
    expected, found = score_captions(CANDIDATES, REFERENCES), score_captions(CANDIDATES, broken)
    assert found.metrics == expected.metrics


def test_unwritable_and_empty_captions_pass(no_meteor):
    odd = {**CANDIDATES, "1": "a \ud800 cat on a mat", "2": ""}
    references = {**REFERENCES, "1": ["a cat on a mat", "\x00"], "3": [""]}
    assert 0 < score_captions(odd, references).metrics["CIDEr"] < 10


@needs_java
def test_meteor_takes_no_word_for_its_separator_and_leaves_no_process(monkeypatch):
    started = []
    popen = captions.subprocess.Popen
    monkeypatch.setattr(
        captions.subprocess, "Popen", lambda *args, **kwargs: started.append(popen(*args, **kwargs)) or started[0]
    )
    pairs = [
        ("a dog runs in \xe9t\xe9", ["a ||| dog runs in \xe9t\xe9"]),
        ("", ["a cat", ""]),
        # Matches of all four stages: exact, stem, synonym, paraphrase.
        ("the dogs are walking on a large road", ["a dog walks on the big street"]),
        ("a group of kids plays together", ["a number of children play with each other"]),
    ]
    value, statistic = captions.meteor(pairs)
    assert value == pytest.approx(0.32900669700174195, rel=1e-12)  # as without the separator
    assert at_its_sums(statistic) == pytest.approx(value, rel=1e-12)
    assert started[0].returncode is not None


@needs_java
def test_ptb_equals_pycocoevalcap_and_ignores_the_locale(monkeypatch):
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    texts = [text for group in REFERENCES.values() for text in group] + [
        "caf\xe9 \u201cau lait\u201d",
        "it's 5:30 p.m.",
    ]
    official = PTBTokenizer().tokenize({"x": [{"caption": text} for text in texts]})["x"]
    monkeypatch.setenv("LC_ALL", "C")
    assert tokenize_ptb(texts) == official


@needs_golden
def test_intervals_are_drawn_from_the_official_numbers(no_meteor):
    """A metric's statistic gives pycocoevalcap's number, of all captions and of any draw of them."""
    rows = json.loads((GOLDEN / "coco_mini_images" / "annotations.json").read_text())
    # Each picture's second caption against its others; one is the same as one of those, one is empty.
    texts = {str(row["image_id"]): tokenize_python([*map(sanitise, row["captions"])]) for row in rows}
    candidates = {name: captions[1] for name, captions in texts.items()}
    references = {name: [*captions[:1], *captions[2:]] for name, captions in texts.items()}
    first, second, *_ = candidates
    candidates |= {first: references[first][2], second: ""}
    whole = score_captions(candidates, references, "none")
    for name in ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"):
        assert at_its_sums(whole.statistics[name]) == pytest.approx(whole.metrics[name], rel=1e-12)
        low, high = interval(whole.statistics[name])
        assert low < whole.metrics[name] < high
    for seed in range(3):
        drawn = random.Random(seed).choices(range(len(texts)), k=40)
        names = [[*texts][index] for index in drawn]
        again = score_captions(
            {str(row): candidates[name] for row, name in enumerate(names)},
            {str(row): references[name] for row, name in enumerate(names)},
            "none",
        )
        for name in ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L"):
            statistic = whole.statistics[name]
            part = replace(statistic, rows=[statistic.rows[index] for index in drawn])
            assert at_its_sums(part) == pytest.approx(again.metrics[name], rel=1e-12)


@needs_golden
@needs_java
def test_python_tokenizer_cuts_coco_as_ptb_does():
    rows = json.loads((GOLDEN / "coco_mini_images" / "annotations.json").read_text())
    texts = [sanitise(text) for row in rows for text in row["captions"]]
    assert len(texts) == 380
    assert tokenize_python(texts) == tokenize_ptb(texts)


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ('A man can\'t ride (quickly) a "red" bike.', "a man ca n't ride -lrb- quickly -rrb- a red bike"),
        ("It's the dog's year-old ball -- isn't it?", "it 's the dog 's year-old ball is n't it"),
        ("Mr. Smith left the U.S. at 5:30 for 1,000.50 days...", "mr. smith left the u.s. at 5:30 for 1,000.50 days"),
        ("I cannot; 50% of $5 \u2014 don\u2019t!!!", "i can not 50 % of $ 5 do n't !!!"),
        ("", ""),
    ],
)
def test_python_tokenizer(caption, tokens):
    assert tokenize_python([caption]) == [tokens]
    if captions.java_problem() is None:
        assert tokenize_ptb([caption]) == [tokens]


def test_without_java_the_rest_is_computed_and_said(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(captions, "meteor", lambda pairs, problem: (0.0, mean([0.0], 1.0)))
        expected = score_captions(CANDIDATES, REFERENCES, "python").metrics
    monkeypatch.setenv("PATH", "")
    result = score_captions(CANDIDATES, REFERENCES)
    assert list(result.metrics) == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]
    assert result.metrics == {name: value for name, value in expected.items() if name != "METEOR"}
    assert result.scorer["tokenizer"] == "python"
    assert set(result.skipped) == {"METEOR", "PTB tokenizer"}
    assert all("no Java runtime" in reason for reason in result.skipped.values())
    assert all(any(name in note for note in result.notes) for name in result.skipped)


def test_ptb_without_java_is_the_users_mistake(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"no Java runtime.*--tokenizer python"):
        score_captions(CANDIDATES, REFERENCES, "ptb")


def fake_java(folder: Path, script: str) -> str:
    """A PATH whose `java` answers -version and then runs `script`."""
    java = folder / "java"
    java.write_text(f'#!/bin/sh\n[ "$1" = -version ] && exit 0\n{script}\n')
    java.chmod(java.stat().st_mode | stat.S_IXUSR)
    return f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exec sleep 60", "took longer than 1 s"),
        ("echo no memory >&2; exit 3", r"ended with 3 \(no memory\)"),
        ("cat > /dev/null; exit 3", "took longer than 1 s"),
    ],
)
def test_java_that_fails_is_said_and_never_waited_for(script, reason, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", fake_java(tmp_path, script))
    monkeypatch.setattr(captions, "JAVA_SECONDS", 1.0)
    result = score_captions(CANDIDATES, REFERENCES, "python")
    assert "METEOR" not in result.metrics
    with pytest.raises(EvaluationError, match=reason):
        captions.meteor([("a cat", ["a cat"])])


def test_a_dead_tokenizer_is_a_fault(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", fake_java(tmp_path, "echo no memory >&2; exit 3"))
    with pytest.raises(EvaluationError, match=r"PTB tokenizer's Java process ended with 3 \(no memory\)"):
        score_captions(CANDIDATES, REFERENCES)
    monkeypatch.setenv("PATH", fake_java(tmp_path, "echo one line"))
    with pytest.raises(EvaluationError, match="returned 0 lines for 8 captions"):
        score_captions(CANDIDATES, REFERENCES)
