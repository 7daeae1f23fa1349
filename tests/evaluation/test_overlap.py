"""BLEU's precisions and ROUGE as Hugging Face's `evaluate` has them: published examples, and counts by hand."""

import math

import pytest

from mmcore.evaluation.metrics.overlap import bleu, rouge, tokenize_13a

FOX = "The quick brown fox jumps over the lazy dog"
LOG = "The quick brown dog jumps on the log."


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Panel (a), 3.5 mm.", "Panel ( a ) , 3.5 mm ."),
        ("1,000,000 and 2-5, x=y", "1,000,000 and 2 - 5 , x = y"),
        ("state-of-the-art don't", "state-of-the-art don't"),
        ("end.Start a,b .5 4.", "end . Start a , b . 5 4 ."),
        ("5% [c] {d} ~e^2 \\alpha #1 $3 @f _g`h", "5 % [ c ] { d } ~ e ^ 2 \\ alpha # 1 $ 3 @ f _ g ` h"),
        ("&quot;a&quot; &amp;lt; b", '" a " < b'),
        ("hyphen-\nated\nlines <skipped>", "hyphenated lines"),
        ("\u00b5 \u00c9 \u22121 \u2019", "\u00b5 \u00c9 \u22121 \u2019"),
        ("", ""),
    ],
)
def test_words_of_bleu(text, tokens):
    assert tokenize_13a(text) == tokens.split()


def test_precisions_are_clipped_and_case_counts():
    value, precisions = bleu("the the cat sat on the mat", "The cat sat on the mat.")
    # of 7 words the, cat, sat, on, the or mat: "the" is there once; of 6 pairs 4, of 5 triples 3, of 4 fours 2
    assert precisions == [5 / 7, 4 / 6, 3 / 5, 2 / 4]
    assert value == pytest.approx(math.prod(precisions) ** (1 / 4), rel=1e-15)  # both have 7 words: no penalty


def test_a_short_text_is_penalised_and_lacks_long_n_grams():
    value, precisions = bleu("a b c d e", "a b c d e f g h")
    assert precisions == [1.0] * 4
    assert value == pytest.approx(math.exp(1 - 8 / 5), rel=1e-15)
    assert bleu("a b c", "a b c") == (0.0, [1.0, 1.0, 1.0, 0.0])
    assert bleu("", "a") == bleu("a", "") == bleu("<skipped>", "a") == (0.0, [0.0] * 4)


def test_rouge_scores_own_example():
    """README of the package rouge-score: F-measures .7058823529411765 and .5882352941176471."""
    found = rouge(LOG, FOX)
    assert found["rouge1"] == 0.7058823529411765
    assert found["rougeL"] == found["rougeLsum"] == 0.5882352941176471
    assert found["rouge2"] == pytest.approx(2 * (2 / 7) * (2 / 8) / (2 / 7 + 2 / 8), rel=1e-15)


def test_rouge_knows_letters_and_digits_of_ascii_alone():
    assert rouge("Hello, WORLD: 3.5", "hello world 3 5") == dict.fromkeys(
        ("rouge1", "rouge2", "rougeL", "rougeLsum"), 1
    )
    assert set(rouge("\u00b5 \u2212", "\u00b5 \u2212").values()) == set(rouge("", "a").values()) == {0.0}


def test_sentences_on_lines_are_joined_by_the_words_that_any_has_in_common():
    """Section 3.2 of Lin's ROUGE paper: w1 w2 w3 w4 w5 against two sentences that share four of its words."""
    found = rouge("w1 w3 w8 w9 w5\nw1 w2 w6 w7 w8", "w1 w2 w3 w4 w5")
    assert found["rougeL"] == pytest.approx(2 * (3 / 10) * (3 / 5) / (3 / 10 + 3 / 5), rel=1e-15)
    assert found["rougeLsum"] == pytest.approx(2 * (4 / 10) * (4 / 5) / (4 / 10 + 4 / 5), rel=1e-15)
    # A word counts no more often than the text has it: "a" once, though both of the reference's lines have it.
    assert rouge("a", "a b\nc a")["rougeLsum"] == pytest.approx(2 * 1 * (1 / 4) / (1 + 1 / 4), rel=1e-15)
