"""What a killed run leaves behind is gone on with: no row twice, none lost, none of another run."""

import json
from pathlib import Path

import pytest

from mmcore.config import ParallelConfig
from mmcore.evaluation.task import Example
from mmcore.inference.parts import Part, Row, publish, read_parts
from tests import ranks

RUN = {"task": "coco", "--temperature": 0.5, "--stop": ("\n",)}
EXAMPLES = [Example(id=f"e{index}", prompt=f"What is {index}?") for index in range(5)]


def row(index: int, answer: str = "") -> Row:
    return Row(id=f"e{index}", answer=answer or f"naïve\u2028 {index}\n", finish_reason="stop")


def write(output: Path, replica: int, *rows: Row) -> Path:
    part = Part(output, replica, RUN)
    for one in rows:
        part.add(one)
    part.close()
    return output.with_name(f"{output.name}.part{replica}")


def test_a_run_goes_on_wherever_it_was_killed(tmp_path: Path) -> None:
    """Every length of the file: as if the kill had come after that byte."""
    output = tmp_path / "predictions.jsonl"
    path = write(output, 0, row(0), row(1), row(2))
    content = path.read_bytes()
    ends = [place + 1 for place, byte in enumerate(content) if byte == ord("\n")]
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        done = read_parts(output, RUN)
        assert list(done.values()) == [row(0), row(1), row(2)][: max(sum(end <= size for end in ends) - 1, 0)]
        write(output, 0, *(row(index) for index in range(3) if f"e{index}" not in done))
        assert path.read_bytes() == content


def test_parts_of_all_replicas_become_one_file(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "predictions.jsonl"
    assert read_parts(output, RUN) == {}
    write(output, 0, row(4), row(0))
    write(output, 11, row(2), row(3))
    (output.parent / "predictions.jsonl.partly").write_text("someone else's")
    write(output, 1)
    with pytest.raises(ValueError, match=r"1 of 5 answers are not in .*part\*, the first is that of e1"):
        publish(output, EXAMPLES, read_parts(output, RUN))
    assert not output.exists()
    write(output, 1, row(1), row(2))
    publish(output, EXAMPLES, read_parts(output, RUN))
    expected = [
        {"id": example.id, "prompt": example.prompt, "answer": row(index).answer}
        for index, example in enumerate(EXAMPLES)
    ]
    assert [json.loads(line) for line in output.read_text().split("\n")[:-1]] == expected
    assert {path.name for path in output.parent.iterdir()} == {"predictions.jsonl", "predictions.jsonl.partly"}


def test_another_run_is_told_apart(tmp_path: Path) -> None:
    output = tmp_path / "out"
    path = write(output, 0, row(0))
    with pytest.raises(ValueError) as caught:
        read_parts(output, {**RUN, "--temperature": 0.7, "--seed": 3})
    assert str(caught.value) == (
        f"{path} holds answers of another run (--temperature: 0.5, now 0.7; --seed: nothing, now 3): go on with that "
        f"one's options, give another --output, or remove {output}.part* to begin anew"
    )
    path.write_text('{"run": {}}\nno row\n')
    with pytest.raises(ValueError, match=r"out\.part0 cannot be read as a part of predictions"):
        read_parts(output, {})


def test_one_run_at_a_time_writes(tmp_path: Path) -> None:
    output = tmp_path / "out"
    part = Part(output, 0, RUN)
    part.add(row(0))

    def second() -> str:
        with pytest.raises(ValueError) as caught:
            Part(output, 0, RUN)
        return str(caught.value)

    assert "is being written by another run" in ranks.run(second, ParallelConfig(), 1)[0]
    part.close()
    assert list(read_parts(output, RUN)) == ["e0"]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be written: .*"):
        Part(tmp_path / "file" / "out", 0, RUN)
