"""Inputs of the runs that are harmed, and what came of it, for the table at the end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.chain import RANKS, STEPS
from tests.faults.jobs import Job, arguments, write_inputs

TOLD: list[tuple[str, str]] = []


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    write_inputs(root)
    return root


@pytest.fixture(scope="session")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody kills, with all of its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    job = Job(arguments(inputs, folder / "run", STEPS, "--checkpoint.keep-last", STEPS), RANKS, folder / "notes")
    assert job.wait() == dict.fromkeys(range(RANKS), 0), job.said()
    return folder / "run"


@pytest.fixture
def tell() -> Callable[[str, str], None]:
    """Note what was tried of a promise, and what was found."""
    return lambda promise, found: TOLD.append((promise, found))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if TOLD:
        terminalreporter.section("promises")
        for promise, found in TOLD:
            terminalreporter.write_line(f"{promise}: {found}")
