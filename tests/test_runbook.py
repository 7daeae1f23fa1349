"""Every message that a run can end with stands in docs/runbook.md, and none that it cannot."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
LAUNCHERS = ROOT / "examples" / "llava_mistral_clip"

# What `mmcore train` calls. Of a sample that cannot be used the run tells `mmcore: skipped: ...`, and goes on.
ROOMS = (
    *("config*.py", "checks.py", "checkpoint*.py", "commands/train.py", "distributed.py", "environment.py"),
    *("models/*.py", "training/*.py", "data/[dest]*.py", "data/loader.py", "data/tokenizer.py", "data/workers.py"),
)
OF_SAMPLES = (
    "it would have ",
    "the file ends early",
    "it is a link",
    "sample {",
    "no json beside",
    "the json is nested",
)
OTHERS = (  # parts of other messages, faults of ours, and what other commands say
    *("is a link, a device", " bytes, more than are there", " leads out of its folder", "its index is not that of"),
    *("it holds no file", " exists: name another", " is a file: name a folder", "another job is writing"),
    "is no run: it has neither",
)


KINDS = ("ValueError", "SaveError", "BadStepError", "PreemptedError", "TooManySkippedError")


def template(node: ast.AST) -> str:
    """A string as it is written, with {...} for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) if isinstance(part, ast.Constant) else "{...}" for part in node.values)
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    return "{...}"


def strings(path: Path) -> list[str]:
    return [
        template(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant | ast.JoinedStr)
    ]


def raised(path: Path) -> Iterator[str]:
    """Messages of what a user is told; not of `raise X(other_message)`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            kind = ast.unparse(node.exc.func)
            text = template(node.exc.args[0])
            if kind in KINDS and re.search(r"\w{3}", text.replace("{...}", "")):
                yield text


def quotes(heading: str = "") -> list[str]:
    """Messages of the tables below a heading, or of all."""
    text = RUNBOOK.split(f"\n## {heading}\n")[1].split("\n## ")[0] if heading else RUNBOOK
    return list(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))


def pattern(quote: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, quote.split("…"))), re.DOTALL)


def is_in(quote: str, texts: list[str]) -> bool:
    found, longest = pattern(quote), max(quote.split("…"), key=len)
    return any(longest in text and found.search(text) for text in texts)


OURS = [quote for name in ("While it runs", "When it starts again", "Wrong usage") for quote in quotes(name)]


def test_every_message_is_told() -> None:
    patterns = [re.compile("^" + pattern(quote).pattern, re.DOTALL) for quote in OURS]
    missing = [
        f"{path.relative_to(ROOT)}: {text}"
        for room in ROOMS
        for path in sorted((ROOT / "mmcore").glob(room))
        for text in raised(path)
        if not text.startswith(OF_SAMPLES)
        and not any(part in text for part in OTHERS)
        and not any(found.match(text) for found in patterns)
    ]
    assert not missing, "\n".join(missing)


def test_every_message_that_is_told_exists() -> None:
    source = [text for path in sorted((ROOT / "mmcore").rglob("*.py")) for text in strings(path)]
    assert len(OURS) > 150
    gone = [quote for quote in OURS if not is_in(quote, source)]
    assert not gone, "\n".join(gone)
    scripts = [line for path in LAUNCHERS.glob("*.sh") for line in path.read_text().splitlines()]
    gone = [quote for quote in quotes("The launcher") if not is_in(quote, scripts)]
    assert not gone or not scripts, "\n".join(gone)


def test_files_and_options_that_it_names_exist() -> None:
    for name in re.findall(
        r"`(--(?:train|data|model|optimizer|checkpoint|parallel|eval|logging)\.[a-z0-9-]+)", RUNBOOK
    ):
        option = name.split(".")[1]
        source = (ROOT / "mmcore" / "config.py").read_text() + (ROOT / "mmcore" / "config_train.py").read_text()
        assert re.search(rf"^    {option.replace('-', '_')}: ", source, re.MULTILINE), name
    for link in re.findall(r"\]\(([^)#]+)\)", RUNBOOK):
        assert (ROOT / "docs" / link).exists(), link
