"""What a run's folder says at a glance, of runs in all conditions, made by hand; and of one that is running."""

import json
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from mmcore import checkpoint_files as files
from mmcore.commands import status as command
from mmcore.training import status
from mmcore.training.ends import append_row, write_done, write_end
from mmcore.training.run_lock import run_lock
from mmcore.training.status import lock_holder, read_status


def when(seconds_ago: float) -> str:
    return datetime.fromtimestamp(time.time() - seconds_ago, timezone.utc).isoformat(timespec="seconds")


def write_run(run: Path, steps: int = 60, *, speed: float = 1000.0, late: float = 1000.0, planned: int = 100) -> Path:
    """Steps of a second each, the last 20 at another speed, and a checkpoint of the 40th."""
    run.mkdir(exist_ok=True)
    config = {"train": {"steps": planned, "stages": []}, "model": {"freeze": []}}
    start = {"step": 0, "time": when(100), "host": "gpu07", "world_size": 8, "config": config}
    (run / "starts.jsonl").write_text(json.dumps(start) + "\n")
    rows = [
        {
            "step": step,
            "loss": 2 + 50 / step,
            "seconds": 1.0,
            "tokens_per_s": late if step > steps - 20 else speed,
            "data_wait": 0.05 if late >= speed else 0.6,
            "skipped": 3,
        }
        for step in range(1, steps + 1)
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = run / "step_00000040"
    folder.mkdir(exist_ok=True)
    (folder / "weights").write_bytes(b"x" * 5000)
    files.write_manifest(folder, {})
    (run / "lock").write_text(json.dumps({"host": "gpu07", "pid": 1234}))
    return run


def text(run: Path, **options: Any) -> str:
    found = read_status(run, **options)
    return "\n".join([*found.lines, *(f"! {finding}" for finding in found.findings)])


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "lock_holder", lambda run: {"host": "gpu07", "pid": 1234})


@pytest.mark.usefixtures("running")
def test_a_run_that_goes_well(tmp_path: Path) -> None:
    told = text(write_run(tmp_path / "run"))
    assert "step        60 of 100" in told and " 60%" in told
    assert "loss        loss 2.8333" in told
    assert "state       running (process 1234 on gpu07), last heard of 0:00:0" in told
    assert "speed       1,000 tokens/s, 100% of the run's median, 5% of the time waiting for data" in told
    assert "left        0:00:40 of steps, without saves and scores\n" in told
    assert "checkpoint  step_00000040, 0:00:0" in told and "sizes agree; 1 in all" in told
    assert "3 samples skipped" in told and "!" not in told
    *_, highest, _, _, _, _, _, _, lowest, steps = told.splitlines()
    assert highest == "  52.0000 \u2588" and lowest.startswith("   2.8333 \u2588") and lowest.endswith("\u2581")
    assert steps == f"     loss step 1{'60':>54}" and len(lowest) == len(steps)


@pytest.mark.usefixtures("running")
def test_one_that_has_become_slow_or_silent(tmp_path: Path) -> None:
    told = text(write_run(tmp_path / "run", late=500.0))
    assert "! its last 20 steps are at 50% of its own speed: the data is slow" in told
    found = read_status(write_run(tmp_path / "run"), now=time.time() + 3000)
    assert [finding[:30] for finding in found.findings] == ["it has logged no step for 0:50"]


ENDS = {
    "SIGTERM": (75, "ended after step 60, as SIGTERM asked", "code 75, ended after step 60", ""),
    "suspect": (16, "step 61 is bad", "code 16, step 61 is bad", ""),
    "bad again": (17, "step 61 is bad", "", "! the last job ended with code 17: step 61 is bad"),
    "a fault": (1, "SaveError: no room", "", "! the last job ended with code 1: SaveError: no room"),
    "killed": (None, "", "state       not running", "! no process holds the run and the last job ended without a word"),
}


@pytest.mark.parametrize("name", ENDS)
def test_one_that_is_not_running(name: str, tmp_path: Path) -> None:
    code, reason, line, finding = ENDS[name]
    run = write_run(tmp_path / "run")
    if code is not None:
        write_end(run, code, reason)
    told = text(run)
    assert line in told and finding in told and ("!" in told) == bool(finding)
    assert f"from step 0: {f'code {code} after step 60: {reason}' if code is not None else ''}" in told or code is None
    assert "once it runs" in told


def test_one_that_is_done(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=100)
    write_end(run, 0, "finished")
    write_done(run, 100)
    told = text(run, checksums=True)
    assert "state       finished" in told and "all checksums agree" in told and "!" not in told and "left" not in told


def test_damage(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=100)
    write_done(run, 100)
    weights = run / "step_00000040" / "weights"
    weights.write_bytes(b"x" * 4999 + b"y")
    assert "!" not in text(run)
    assert "! step_00000040 is damaged (weights has other content than was written)" in text(run, checksums=True)
    weights.write_bytes(b"x" * 4999)
    assert "DAMAGED: weights has 4999 bytes instead of 5000" in text(run)
    (run / "step_00000040" / "manifest.json").unlink()
    assert "! step_00000040 is damaged (manifest.json is missing): and there is no other" in text(run)


def test_what_is_left_behind(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "hang-31.txt").touch()
    (run / "damaged-step_00000020").mkdir()
    place = {"step": 50, "time": when(50), "fault": "nan", "hosts": ["gpu07", "gpu08"], "samples": ["a"]}
    (run / "suspect.json").write_text(json.dumps({"places": [{**place, "was_good_again": True}]}))
    told = text(run)
    assert "hangs       hang-31.txt" in told and "set aside   damaged-step_00000020" in told
    assert "on gpu07, gpu08, good in a later job: one of these machines computes wrongly" in told


def test_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no run: it has neither a log"):
        read_status(tmp_path)
    (tmp_path / "lock").write_text("")
    assert "step        none yet" in text(tmp_path) and "checkpoint  none yet" in text(tmp_path)


def test_who_holds_the_lock(tmp_path: Path) -> None:
    """Asking does not take it, nor lets go of it."""
    assert lock_holder(tmp_path) is None
    code = "import sys, time\nfrom pathlib import Path\nfrom mmcore.training.run_lock import run_lock\n"
    code += "with run_lock(Path(sys.argv[1])):\n print(flush=True)\n time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) as job:
        assert job.stdout and job.stdout.readline()
        for _ in range(2):
            holder = lock_holder(tmp_path)
            assert holder and holder["pid"] == job.pid
        job.kill()
        job.wait()
    assert lock_holder(tmp_path) is None
    with run_lock(tmp_path):
        pass


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    run = write_run(tmp_path / "run")
    assert command.main([str(run)]) == 1
    assert "mmcore status: no process holds the run" in capsys.readouterr().out
    write_end(run, 75, "asked")
    assert command.main([str(run), "--verify"]) == 0


def test_what_a_full_disk_has_torn(tmp_path: Path) -> None:
    """A row without its end is a line of its own: those after it count, and it is told."""
    run = write_run(tmp_path / "run")
    for log in ("ends.jsonl", "starts.jsonl"):
        with (run / log).open("a") as file:
            file.write('{"step": 60, "time": "20')
    for code in (1, 75):
        write_end(run, code, "asked")
    append_row(
        run / "starts.jsonl", {"step": 60, "time": when(-1), "world_size": 8, "config": {"train": {"steps": 80}}}
    )
    write_end(run, 0, "finished")
    rows = (run / "ends.jsonl").read_text().splitlines()
    assert [json.loads(row)["code"] for row in rows[1:]] == [1, 75, 0]
    told = text(run)
    assert "unreadable  starts.jsonl line 2, ends.jsonl line 1" in told and "step        60 of 80" in told


def test_jobs_that_end_before_they_train(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for code, reason in ((75, "preempted"), (1, "no GPU"), (1, "no GPU either")):
        write_end(run, code, reason)
    told = text(run).splitlines()
    at = next(index for index, line in enumerate(told) if line.startswith("jobs"))
    assert told[at + 1].endswith("from step 0: code 75 after step 60: preempted")
    assert told[at + 2].endswith("ended before its first step: code 1: no GPU")
    assert told[at + 3].endswith("ended before its first step: code 1: no GPU either")


ODD = {
    "log.jsonl": (None, '{"step": 1, "lo', '{"step": 1, "loss": null}\n{"step": 2}\n'),
    "starts.jsonl": (None, "", '{"step": 1}\n', '{"step": 1, "time": 5, "world_size": 2}\n'),
    "ends.jsonl": (None, "{}", '{"step": 1, "time": "2026-11-27T00:00:00+00:00"}\n'),
    "suspect.json": ("{}", '{"places": [', '{"places": [{}]}'),
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name, all_ in ODD.items() for content in all_])
def test_files_that_are_not_what_they_should_be(name: str, content: str | None, tmp_path: Path) -> None:
    """Of another version, or half written: what can be told is."""
    run = write_run(tmp_path / "run")
    (run / name).unlink(missing_ok=True)
    if content is not None:
        (run / name).write_text(content)
    assert "checkpoint  step_00000040" in text(run)
