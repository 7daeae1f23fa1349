"""What the images start with, and what their instructions refer to. tests/docker/build.sh carries them out."""

import fnmatch
import importlib.util
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILES = ("Dockerfile", "docker/Dockerfile.cpu")
ENTRYPOINT = ROOT / "docker" / "entrypoint.sh"


@pytest.fixture
def bin_(tmp_path: Path) -> Path:
    """Programs that a container has, which say what they are asked for."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("mmcore", "torchrun", "tensorboard"):
        write(folder / name, f'echo "{name} $$ $*"; echo a warning >&2; exit 7')
    write(folder / "python", '[ "$1" = /opt/mmcore/docker/versions.py ] && echo versions || echo "python $$ $*"')
    write(folder / "nvidia-smi", 'echo "0, NVIDIA H100, 81559 MiB, 580.95"; echo "1, NVIDIA H100, 81559 MiB, 580.95"')
    return folder


def write(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def start(bin_: Path, *command: str, **environment: str) -> tuple[int, int, str, str]:
    """Exit code, process, stdout and stderr of the entrypoint."""
    outside = {name: value for name, value in os.environ.items() if name not in ("RANK", "SLURM_PROCID")}
    with subprocess.Popen(
        [ENTRYPOINT, *command],
        env={**outside, "PATH": f"{bin_}:/usr/bin:/bin", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        out, err = process.communicate(timeout=20)
    return process.returncode, process.pid, out, err


def test_a_verb_takes_the_entrypoints_place(bin_: Path) -> None:
    """The same process, so that signals reach it; its exit code; its stdout and nothing else on it."""
    code, pid, out, err = start(bin_, "train", "mistral_clip_sft", "--data.path", "a b")
    assert (code, out) == (7, f"mmcore {pid} train mistral_clip_sft --data.path a b\n")
    gpus = "0, NVIDIA H100, 81559 MiB, 580.95\n1, NVIDIA H100, 81559 MiB, 580.95\n"
    assert err == f"versions\n{gpus}a warning\n"


def test_programs_are_started_as_they_are(bin_: Path) -> None:
    for name in ("torchrun", "tensorboard", "python"):
        _, pid, out, _ = start(bin_, name, "--option")
        assert out == f"{name} {pid} --option\n"
    assert start(bin_, "bash", "-c", "echo $0 $1", "a", "b")[2] == "a b\n"
    assert start(bin_, "/bin/echo", "by its path")[2] == "by its path\n"


def test_without_a_command_it_is_mmcore_without_a_verb(bin_: Path) -> None:
    _, pid, out, _ = start(bin_)
    assert out == f"mmcore {pid} \n"


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_one_rank_speaks(bin_: Path, variable: str) -> None:
    assert start(bin_, "train", **{variable: "3"})[3] == "a warning\n"
    assert start(bin_, "train", **{variable: "0"})[3].startswith("versions\n")


def test_no_gpu_is_no_fault(bin_: Path) -> None:
    write(bin_ / "nvidia-smi", "echo the driver is not loaded; exit 9")
    assert start(bin_, "train")[3] == "versions\nno GPU (nvidia-smi: the driver is not loaded)\na warning\n"
    (bin_ / "nvidia-smi").unlink()
    write(bin_ / "python", "exit 1")
    code, _, out, err = start(bin_, "train")
    assert (code, err) == (7, "no GPU\na warning\n") and out.startswith("mmcore ")


@pytest.fixture(scope="module")
def versions() -> Any:
    spec = importlib.util.spec_from_file_location("versions", ROOT / "docker" / "versions.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_versions_are_those_that_setup_py_pins(versions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions.faults(["json", "mmcore.constants"]) == []
    real = metadata.version
    there = {"torch": "2.11.0a0+eb65b36914.nv26.02", "torchvision": "0.26.0a0"}
    monkeypatch.setattr(metadata, "version", lambda name: there.get(name) or real(name))
    assert versions.faults([]) == []  # an image's own build of the same release
    there["torch"] = "2.10.0a0+b4e4ee81d3.nv25.12"
    assert versions.faults([]) == ["torch is 2.10.0a0+b4e4ee81d3.nv25.12, but mmcore is made for 2.11.0"]


def test_what_cannot_be_imported_fails_the_build() -> None:
    command = [sys.executable, ROOT / "docker" / "versions.py"]
    done = subprocess.run([*command, "json", "no_such_module"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "no_such_module cannot be imported: ModuleNotFoundError" in done.stderr
    assert re.match(r"mmcore \S+, torch 2.11.0\S*, megatron-core 0.16.1, ", done.stdout)
    assert subprocess.run(command, capture_output=True, cwd=ROOT).returncode == 0


def instructions(name: str) -> list[str]:
    """Instructions of a Dockerfile, continued lines joined, without comments."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.lstrip().startswith("#")]
    return [" ".join(line.split()) for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_reaches_the_engine(name: str) -> None:
    rules = (ROOT / ".dockerignore").read_text().split("\n")
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    assert "*" in rules
    copies = [line.split()[1:-1] for line in instructions(name) if line.startswith("COPY ") and "--from" not in line]
    sources = [source for copy in copies for source in copy]
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source, rule) or source.startswith(f"{rule}/") for rule in allowed), source
    assert {"constraints.txt", "setup.py", "mmcore", "tools", "examples"} <= set(sources)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_an_image_is(name: str) -> None:
    found = instructions(name)
    (labels,) = [line for line in found if line.startswith("LABEL ")]
    version = re.search(r'version="(.+?)"', (ROOT / "setup.py").read_text())
    assert version and f'org.opencontainers.image.version="{version[1]}"' in labels
    stages = [line for line in found if line.startswith("FROM ")]
    digest = next(line for line in found if re.match(r"ARG \w+_DIGEST", line)).split()[1]
    assert digest.endswith("_DIGEST="), "a digest that nobody has looked up"
    assert len(stages) == 2 and all(f"${{{digest[:-1]}:+@${{{digest[:-1]}}}}}" in stage for stage in stages)
    last = found[found.index(stages[1]) :]
    users = [line for line in last if line.startswith("USER ")]
    assert users == ["USER ${USER_ID}:${GROUP_ID}"]
    # Nothing of the image is made after its last user has come, nor asks whether it is well (HEALTHCHECK).
    assert {line.split()[0] for line in last[last.index(users[0]) :]} <= {
        *("USER", "WORKDIR", "ENTRYPOINT", "CMD", "ARG", "LABEL"),
    }


def test_images_differ_in_their_base_alone() -> None:
    """The same files in the same places, the same user, the same start."""
    same = ("COPY ", "WORKDIR ", "USER ", "ENTRYPOINT ", "CMD ", "RUN groupadd ", "ARG EXTRAS", "ENV HOME")
    gpu, cpu = ([line for line in instructions(name) if line.startswith(same)] for name in DOCKERFILES)
    assert gpu == cpu


def test_the_stand_ins_are_of_the_tags_that_are_built_on() -> None:
    script = (ROOT / "tests" / "docker" / "build.sh").read_text()
    for name in DOCKERFILES:
        tag = next(line for line in instructions(name) if re.match(r"ARG \w+_TAG=", line)).partition("=")[2]
        base = next(line for line in instructions(name) if line.startswith("FROM ")).split()[1].split(":")[0]
        assert f"{base}:{tag}" in script
