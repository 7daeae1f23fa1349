"""What of mmcore's engine is installed: `python versions.py [MODULE ...]`.

Prints one line of versions. Given modules, imports each of them and compares the versions that setup.py pins exactly
with those installed, by release alone: an image of NVIDIA's holds a build of its own, torch 2.11.0a0+eb65b36914.nv26.02
for 2.11.0. Exit code 1 if one cannot be imported or is of another release.
"""

import importlib
import platform
import sys
from importlib import metadata

SHOWN = ("mmcore", "torch", "megatron-core", "megatron-energon", "transformer-engine", "flash-attn", "apex")


def version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "none"


def faults(modules: list[str]) -> list[str]:
    """What cannot be imported, and what is of another release than setup.py pins."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    found = []
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # a library that is built for another one raises whatever it likes
            found.append(f"{module} cannot be imported: {type(error).__name__}: {error}")
    for line in metadata.requires("mmcore") or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        wanted = [pin.version for pin in requirement.specifier if pin.operator == "=="]
        there = version(requirement.name)
        if wanted and (there == "none" or Version(there).release != Version(wanted[0]).release):
            found.append(f"{requirement.name} is {there}, but mmcore is made for {wanted[0]}")
    return found


def main(modules: list[str]) -> int:
    shown = ", ".join(f"{name} {version(name)}" for name in SHOWN)
    print(f"{shown}, Python {platform.python_version()}", flush=True)
    found = faults(modules) if modules else []
    for fault in found:
        print(f"versions.py: {fault}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
