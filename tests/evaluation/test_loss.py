"""Perplexity: its arithmetic, what is counted beside it, and whether the samples are those of the dataset."""

import json
import math
from dataclasses import replace

import pytest
import yaml

from mmcore.data.shards import ShardWriter
from mmcore.evaluation import loss
from mmcore.evaluation.loss import SampleLoss
from mmcore.evaluation.scores import EvaluationError
from mmcore.evaluation.task import read_options

OFFICIAL = read_options("loss")


def row(name, total, tokens, source="a", **more):
    return SampleLoss(id=f"{source}/val_000000.tar/{name}", source=source, loss_sum=total, num_tokens=tokens, **more)


ROWS = [
    row("0", 2.0, 1),
    row("1", 10.0, 7),
    row("2", 3.0, 4, "b", was_cut=True),
    row("3", 0.0, 0, "b", problem="a broken PNG picture"),
    row("4", 0.0, 0, "b"),
]


@pytest.fixture
def dataset(tmp_path):
    """Two sources, blended; `b` has a shard that its metadata leaves out, and so one sample."""
    with ShardWriter(tmp_path / "a") as writer:
        for index in range(2):
            writer.write("val", str(index), {"json": b"{}"})
        writer.write("train", "9", {"json": b"{}"})
    with ShardWriter(tmp_path / "b", samples_per_shard=2) as writer:
        for index in range(6):
            writer.write("val", str(index), {"json": b"{}"})
    split = tmp_path / "b" / loss.SPLIT
    split.write_text(split.read_text().replace("exclude: []", "exclude: [val_000001.tar, val_000002.tar/5]"))
    return blend(tmp_path, [{"weight": 3, "path": "./a"}, {"weight": 1, "path": "./b"}])


def blend(folder, parts, key="blend", name="blend.yaml"):
    content = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": {"val": {key: parts}}}
    (folder / name).write_text(yaml.safe_dump(content))
    return folder / name


@pytest.fixture
def written(tmp_path):
    def written(rows):
        loss.write_losses(tmp_path / "p.jsonl", rows)
        return tmp_path / "p.jsonl"

    return written


def test_perplexity_is_over_tokens(written, dataset):
    scores = loss.score(written(ROWS), dataset, options=OFFICIAL)
    assert scores.metrics == {"perplexity": math.exp(15 / 12), "loss": 15 / 12}
    assert scores.groups["source"] == {
        "a": loss.Group(score=math.exp(12 / 8), num_samples=2),
        "b": loss.Group(score=math.exp(3 / 4), num_samples=1),
    }
    assert (scores.score, scores.size, scores.correct) == (math.exp(1.25), 3, None)
    assert [sample.score for sample in scores.samples] == [-2.0, -10 / 7, -0.75]
    assert scores.counts == {"repeated": 0, "skipped": 1, "cut": 1, "without trained tokens": 1}
    assert [note.split(" ", 3)[:3] for note in scores.notes] == [["1", "of", "5"]] * 3
    assert "b/val_000000.tar/3: a broken PNG picture" in scores.notes[0]
    low, high = scores.intervals()["perplexity"]
    assert math.exp(0.75) <= low < scores.score < high <= math.exp(2.0)


def test_the_file_is_read_as_it_was_written(written):
    path = written(ROWS)
    assert list(loss.read_losses(path)) == ROWS
    assert json.loads(path.read_text().split("\n")[0]) == {
        "id": "a/val_000000.tar/0",
        "source": "a",
        "loss_sum": 2.0,
        "num_tokens": 1,
    }


def test_repeated_rows_count_once_and_two_losses_of_a_sample_are_none(written, dataset):
    assert loss.score(written([*ROWS, ROWS[0]]), dataset, options=OFFICIAL).counts["repeated"] == 1
    with pytest.raises(EvaluationError, match=r"two different losses of 1 samples, the first is a/val_000000.tar/0"):
        loss.score(written([*ROWS, replace(ROWS[0], loss_sum=3.0)]), dataset, options=OFFICIAL)


def test_samples_are_those_of_the_dataset(written, dataset, tmp_path):
    assert loss.count_samples(dataset, "val") == {"a": 2, "b": 3}
    assert loss.count_samples(tmp_path / "a", "train") == loss.count_samples(
        tmp_path / "a/.nv-meta/.info.json", "train"
    )
    with pytest.raises(EvaluationError, match=r"of b 2 samples where the split has 3"):
        loss.score(written(ROWS[:-1]), dataset, options=OFFICIAL)
    with pytest.raises(EvaluationError, match=r"of b 0 samples where the split has 3"):
        loss.score(written(ROWS[:2]), dataset, options=OFFICIAL)
    with pytest.raises(EvaluationError, match=r"of a 2 samples where the split has 1"):
        loss.score(written(ROWS[:2]), tmp_path / "a", options={"split": "train"})
    with pytest.raises(EvaluationError, match=r"of c 5 samples where the split has 0"):
        loss.score(written([replace(one, source="c") for one in ROWS]), dataset, options=OFFICIAL)
    (tmp_path / "a").rename(tmp_path / "moved")
    assert loss.score(written(ROWS[:2]), tmp_path / "moved", options=OFFICIAL).size == 2


def test_blends_of_every_kind(written, dataset, tmp_path):
    """Named as the reader of the data names them: numbered where two folders have one name."""
    inner = blend(tmp_path, [{"path": "a", "repetitions": 2}], "blend_epochized", "inner.yaml")
    outer = blend(
        tmp_path, [{"weight": 1, "path": "inner.yaml"}, {"weight": 1, "path": "b"}, {"path": "./a"}], name="o.yaml"
    )
    assert loss.count_samples(inner, "val") == {"a": 2}
    assert loss.count_samples(outer, "val") == {"a_0": 2, "b": 3, "a_2": 2}
    part = blend(tmp_path, [{"path": "a", "split_part": "train"}, {"path": "b", "subset": {"range": ["0%", "50%"]}}])
    assert loss.count_samples(part, "val") == {"a": 1, "b": None}
    scores = loss.score(written([ROWS[0], ROWS[2]]), part, options=OFFICIAL)
    assert "of b a subset is taken: whether all its samples are there cannot be told" in scores.notes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"id": "1", "answer": "x"}, r"a loss has id, source, loss_sum and num_tokens.*KeyError\('source'\)"),
        ({"id": "1", "source": "a", "loss_sum": "x", "num_tokens": 1}, r"could not convert string to float"),
        ([1], r"a loss has id, source"),
    ],
)
def test_files_that_are_no_losses(tmp_path, dataset, content, message):
    (tmp_path / "p.jsonl").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        loss.score(tmp_path / "p.jsonl", dataset, options=OFFICIAL)


@pytest.mark.parametrize(("total", "tokens"), [(math.nan, 1), (math.inf, 1), (-1.0, 1), (1.0, -1)])
def test_losses_that_are_none(written, dataset, total, tokens):
    with pytest.raises(EvaluationError, match="the model's weights or its number format are broken"):
        loss.score(written([row("0", total, tokens), *ROWS[1:]]), dataset, options=OFFICIAL)


def test_datasets_that_are_none(written, tmp_path, dataset):
    with pytest.raises(ValueError, match=r"no YAML file with a split 'test' that names some \(KeyError\('test'\)"):
        loss.score(written(ROWS), dataset, options={"split": "test"})
    with pytest.raises(ValueError, match=r"has no split 'test' that can be read"):
        loss.score(written(ROWS), tmp_path / "a", options={"split": "test"})
    with pytest.raises(ValueError, match=r"list of shards .* cannot be read"):
        loss.score(written(ROWS), tmp_path, options=OFFICIAL)
    with pytest.raises(EvaluationError, match="no sample has a trained token"):
        loss.score(written([replace(one, num_tokens=0, loss_sum=0.0) for one in ROWS]), dataset, options=OFFICIAL)


def test_nothing_is_asked(dataset):
    with pytest.raises(ValueError, match="loss asks no questions: `mmcore generate --task loss` computes"):
        loss.examples(dataset, options=OFFICIAL)
