"""What is told where there is no terminal, by a clock that the test turns."""

import pytest

from mmcore.inference.progress import AnswerProgress


def test_a_line_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    with AnswerProgress("answers", 200, is_shown=True, clock=lambda: now[0]) as progress:
        for seconds, answers in ((30, 10), (31, 10), (5, 20), (60, 20), (3600, 40)):
            now[0] += seconds
            progress.advance(answers, 5 * answers)
    assert capsys.readouterr().err.splitlines() == [
        "answers 20/200 | 2 tokens/s | 0:01:01 so far, 0:09:09 left",
        "answers 60/200 | 2 tokens/s | 0:02:06 so far, 0:04:54 left",
        "answers 100/200 | 0 tokens/s | 1:02:06 so far, 1:02:06 left",
    ]


def test_others_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    with AnswerProgress("answers", 2, is_shown=False, clock=lambda: now[0]) as progress:
        now[0] += 1000
        progress.advance(1, 5)
        assert progress.line(0.0, "?") == "answers 1/2 | ? | 0:00:00 so far, 0:00:00 left"
    assert capsys.readouterr().err == ""
