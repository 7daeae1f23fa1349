"""Raw data sets of a few pictures, `mmcore prepare` as a user calls it, and what it wrote."""

import json
import sys
import tarfile
from pathlib import Path
from typing import Any

from mmcore.__main__ import main
from tests.data.fabricated import conversation, picture

KINDS = {"a.png": "PNG", "b.jpg": "JPEG", "sub/c.webp": "WEBP", "d.jpeg": "JPEG", "wrong.png": "GIF"}
TALK = conversation("<image>\nWhat is it?", "A cat.")


def prepare(source: str, output: Path, annotations: Path, *options: str) -> int:
    """Run the verb in this process, through the same door as the console script.

    More annotations may open the options.
    """
    argv = ["mmcore", "prepare", source, "--output", str(output), "--annotations", str(annotations), *options]
    if "--images" not in options:
        argv += ["--images", str(annotations.parent / "images")]
    before, sys.argv = sys.argv, argv
    try:
        return main()
    except SystemExit as stop:  # a wrong option
        return int(stop.code or 0)
    finally:
        sys.argv = before


def write_pictures(folder: Path) -> Path:
    """A folder `images` of pictures in several formats, in the folder of a raw data set."""
    for seed, (name, kind) in enumerate(KINDS.items()):
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(seed, kind=kind))
    return folder


def annotations(raw: Path, content: Any, name: str = "rows.json") -> Path:
    path = raw / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def good(raw: Path, *more: dict[str, Any]) -> Path:
    return annotations(raw, [{"id": f"id.{name}", "image": name, "conversations": TALK} for name in KINDS] + list(more))


def members(output: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in sorted(output.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {f"{path.name}/{member.name}": tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    return found


def nothing_but(folder: Path, *names: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
