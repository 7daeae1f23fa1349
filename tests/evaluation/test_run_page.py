"""The page of a run: made of the run's own files, whole, with every text escaped."""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from mmcore.config import CheckpointConfig, ModelConfig, RunConfig, StageConfig, TrainConfig
from mmcore.evaluation.curves import Line, chart
from mmcore.evaluation.run_files import changed_options, read_run, rows_by_step
from mmcore.evaluation.run_page import write_run_page
from tests.evaluation.test_report import Tags

ATTACK = "<script>x</script><img src=x onerror=y> \"'& \ud800"
STAGES = (
    StageConfig(name="align", until=4, freeze=("vision_model", "language_model")),
    StageConfig(name="full", freeze=("vision_model",), lr=2e-5),
)
CONFIG = RunConfig(train=TrainConfig(steps=8, stages=STAGES), checkpoint=CheckpointConfig(save="runs/a"))


def step(number: int, **changes: Any) -> dict[str, Any]:
    share = {"loss": 2.0 / number, "num_tokens": 10, "num_samples": 2, "num_positions": 100}
    row = {"step": number, **share, "grad_norm": 1.0, "lr": 1e-4, "seconds": 0.5, "tokens_per_s": 200.0}
    row |= {"trained_tokens_per_s": 20.0, "fill": 0.75, "data_wait": 0.125, "memory_gib": number / 2}
    return row | {"skipped": number, "cut": 0} | changes


def start(number: int, config: RunConfig = CONFIG) -> dict[str, Any]:
    counts = {"vision_model": 1000, "vision_projection": 20, "language_model": 3000}
    row = {"step": number, "time": "2026-03-01T10:00:00+00:00", "host": "node17", "device": "cuda", "world_size": 8}
    trained = [20, 3020] if config.train.stages else [4020]
    return row | {"data_parallel_size": 8, "parameters": counts, "trained": trained, "config": asdict(config)}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def text(page: str) -> str:
    """What is read on a page, without its style."""
    return " ".join(" ".join(Tags(re.sub(r"(?s)<style>.*?</style>", "", page)).texts).split())


def test_a_whole_run(tmp_path: Path) -> None:
    sources = {name: {"loss": 1.5, "num_tokens": 5, "num_samples": 1, "skipped": 3} for name in ("chats", "captions")}
    write(tmp_path / "log.jsonl", [step(number, sources=sources) for number in range(1, 9)])
    write(tmp_path / "validation.jsonl", [{"step": 4, "loss": 0.75}, {"step": 8, "loss": 0.5, "sources": sources}])
    write(tmp_path / "scores.jsonl", [{"step": 8, "task": "coco", "num_samples": 9, "metrics": {"CIDEr": 0.625}}])
    write(tmp_path / "starts.jsonl", [start(0), start(5)])
    (tmp_path / "step_00000008").mkdir()

    assert write_run_page(tmp_path) == tmp_path / "report.html"
    page = (tmp_path / "report.html").read_text()
    told = text(page)
    for words in (
        f"{tmp_path.name} Training run, 8 of 8 steps finished",
        "Time in steps 0:00:04 Samples 16 Tokens, pictures included 800 Tokens trained 80 Speed 200 tokens/s",
        "Rows filled 75.0 % Waiting for data 12.5 % Peak memory, first rank 4 GiB",
        "Bad steps and rewinds none Checkpoints step_00000008",
        "Began 2026-03-01 10:00:00 UTC on node17 Began again after step 5",
        "Layout tensor 1 x pipeline 1 x context 1 x data 8, 8 ranks on cuda Parameters 4,020",
        "align 1 to 4 1.00e-03 20 vision_model language_model full 5 to 8 2.00e-05 3,020 vision_model",
        "chats 8 0 40 1.5 1.5 3 0",
        "Score: coco, CIDEr at the end 0.625",
        "--train.steps 8",
        "--checkpoint.save runs/a",
    ):
        assert words in told, words
    assert page.count('class="stage"') == page.count("<svg") == 9
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in page and "<script" not in page
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix in (".html", ".svg")) == [
        "loss.svg",
        "report.html",
    ]
    picture = ElementTree.fromstring((tmp_path / "loss.svg").read_text())
    named = [part.text for part in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"loss", "validation", "step", "full"} <= set(named)


def test_only_a_log(tmp_path: Path) -> None:
    """Of an older run, or of one that stopped before it could tell more; the line that a kill tore is nothing."""
    rows = [step(1), step(2, loss=math.nan, grad_norm=math.inf, fault="the loss is nan"), step(3)]
    for row in rows:
        del row["fill"], row["memory_gib"]
    write(tmp_path / "log.jsonl", rows)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    told = text(write_run_page(tmp_path).read_text())
    assert "3 of 3 steps finished" in told and "Peak memory, first rank - GiB" in told
    assert "Memory, peak" not in told and "Stages" not in told and "Options" not in told
    assert "Bad steps step 2: the loss is nan" in told and 'class="bad"' in (tmp_path / "loss.svg").read_text()


def test_how_it_ended(tmp_path: Path) -> None:
    write(tmp_path / "starts.jsonl", [start(0, RunConfig(model=ModelConfig(freeze=("vision_model",))))])
    for last, told in (({}, "2 of 1,000 steps not finished"), ({"fault": "a spike"}, "steps stopped: a spike")):
        write(tmp_path / "log.jsonl", [step(1), step(2, **last)])
        assert told in text(write_run_page(tmp_path).read_text())
    assert "whole run 1 to 1,000 1.00e-03 4,020 vision_model" in text((tmp_path / "report.html").read_text())


def test_no_finite_loss(tmp_path: Path) -> None:
    write(tmp_path / "log.jsonl", [step(1, loss=math.nan)])
    assert "No finite loss was logged." in text(write_run_page(tmp_path).read_text())
    assert not (tmp_path / "loss.svg").exists()


def test_every_text_is_escaped(tmp_path: Path) -> None:
    share = {ATTACK: {"loss": 1.0, "num_tokens": 1, "num_samples": 1, "num_positions": 1}}
    run = tmp_path / ATTACK.replace("/", "").replace("\ud800", "")
    run.mkdir()
    stages = (StageConfig(name="a", until=1), StageConfig(name=ATTACK))
    config = RunConfig(model=ModelConfig(checkpoint=ATTACK), train=TrainConfig(steps=2, stages=stages))
    write(run / "log.jsonl", [step(number, sources=share, fault=ATTACK) for number in (1, 2)])
    write(run / "validation.jsonl", [{"step": 2, "loss": 1.0, "sources": share}])
    write(run / "scores.jsonl", [{"step": 2, "task": ATTACK, "metrics": {ATTACK: 1.0}}])
    write(run / "starts.jsonl", [start(0, config) | {"host": ATTACK, "time": ATTACK, "device": ATTACK}])
    page = write_run_page(run).read_text(encoding="utf-8")
    tags = Tags(page).tags
    assert not {"script", "img"} & {tag for tag, _ in tags}
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)
    assert page.count("&lt;script&gt;x&lt;/script&gt;") > 20
    ElementTree.fromstring((run / "loss.svg").read_text(encoding="utf-8"))


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with pytest.raises(ValueError, match=r"log\.jsonl cannot be read: No such file"):
        read_run(tmp_path)
    log.write_text("")
    with pytest.raises(ValueError, match=r"log\.jsonl has no step to tell of"):
        read_run(tmp_path)
    log.write_text('{"step": 1}\n{"loss": 2}\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl line 2 is not a row of a run: 'step'"):
        read_run(tmp_path)
    log.write_text('{"step": 2, "loss": 3}\n{"step": 1}\n{"step": 2, "loss": 1}\n')
    assert [(row["step"], row.get("loss")) for row in rows_by_step(log)] == [(1, None), (2, 1)]


def test_options_as_they_are_given() -> None:
    config = RunConfig(model=ModelConfig(freeze=("vision_model", "language_model")), train=TrainConfig(val_interval=5))
    through_json = json.loads(json.dumps(asdict(config)))
    assert changed_options(through_json) == [
        ("--model.freeze", "vision_model language_model"),
        ("--train.val-interval", "5"),
    ]
    assert changed_options(json.loads(json.dumps(asdict(RunConfig())))) == []


def test_a_chart_of_several_lines() -> None:
    lines = [Line([1, 2, 4], [10.0, math.nan, 1000.0]), Line([3], [100.0], "raw c1", "one")]
    drawn = chart("x", lines, unit="y", stages=[(2, "b"), (9, "beyond")], bad_steps=[3])
    assert "y (log scale)" in drawn and ">b</text>" in drawn and "beyond" not in drawn
    assert re.findall(r'<path class="([^"]*)"', drawn) == ["mean dot", "raw c1 dot", "bad"]
    assert "y (log scale)" not in chart("x", lines, unit="y", is_linear=True)
    wide = chart("x", lines, unit="y", span=(0, 10), style="text {}")
    assert ">10</text>" in wide and "<style>text {}</style>" in wide and ">one</text>" in wide
    small = chart("x", [Line([1, 2], [0.0, 3.5e-4])], unit="lr")
    assert ">5e-5</text>" in small and ">1.5e-4</text>" in small
