"""The house's one rule: imports point one way (the order of README's architecture section)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A room may import those before it, and itself. `data` is special: see ALLOWED.
ORDER = (
    "constants",
    "checks",
    "foreign",
    "config_train",
    "config",
    "config_yaml",
    "environment",
    "host",
    "distributed",
    "models",
    "checkpoint_files",
    "pickles",
    "checkpoint_shards",
    "checkpoint_optimizer",
    "checkpoint",
    "evaluation",
    "inference",
    "training",
    "commands",
)
ALLOWED = {room: set(ORDER[: index + 1]) for index, room in enumerate(ORDER)}
ALLOWED["distributed"] |= {"host"}
ALLOWED["data"] = {"constants", "checks", "foreign", "config", "data"}
ALLOWED["recipes"] = {"config"}
ALLOWED["__main__"] = {"constants", "checks", "environment"}
for room in ("training", "inference", "commands"):
    ALLOWED[room] |= {"data"}
ALLOWED["commands"] |= {"recipes"}
ALLOWED["evaluation"] -= {"models", "distributed", "host", "pickles", "checkpoint"}
CONVERTERS = {"constants", "config", "pickles", "models.architecture", "models.presets"}
FOLDER = ROOT / "tools" / "converters"
PROOF = "parity/ranks.py"
LIGHT = (
    "constants.py",
    "checks.py",
    "foreign.py",
    "config.py",
    "config_train.py",
    "config_yaml.py",
    "environment.py",
    "recipes.py",
    "__main__.py",
    "models/architecture.py",
    "models/flops.py",
    "models/parameters.py",
    "models/presets.py",
    "checkpoint_files.py",
    "training/memory.py",
    "commands",
)
HEAVY = {"torch", "megatron", "transformers", "open_clip", "torchvision", "PIL", "numpy", "webdataset", "pycocoevalcap"}


def imported(path: Path, *, top_level: bool = False) -> set[str]:
    """Modules that a file imports, anywhere or at its top level."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    return {name.removeprefix("mmcore.") for name in imported(path) if name.startswith("mmcore.")}


@pytest.mark.parametrize("path", sorted(ROOT.glob("mmcore/**/*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    room = path.relative_to(ROOT / "mmcore").parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for name in ours(path):
        assert name.split(".")[0] in ALLOWED[room], f"{room} must not import mmcore.{name}"
    for name in imported(path):
        assert name.split(".")[0] not in {"tools", "tests", "examples"}, name


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_converters_need_only_architectures(path: Path) -> None:
    """But for the one file that runs what they wrote: verify.py loads it, in a process of its own."""
    if path == FOLDER / PROOF:
        return
    for name in ours(path):
        assert any(name == allowed or name.startswith(allowed + ".") for allowed in CONVERTERS), name
    assert not any(name.split(".")[0] == "megatron" for name in imported(path))
    assert path.name == "verify.py" or not any(name.startswith(("verify", "parity.ranks")) for name in imported(path))


@pytest.mark.parametrize("name", LIGHT)
def test_light_files_import_nothing_heavy(name: str) -> None:
    """What runs before a mistake on the command line is told; the rest is imported inside functions."""
    path = ROOT / "mmcore" / name
    for file in path.glob("*.py") if path.is_dir() else [path]:
        heavy = {module for module in imported(file, top_level=True) if module.split(".")[0] in HEAVY}
        assert not heavy, f"{file}: {heavy}"


def test_packages_are_empty() -> None:
    assert all(not path.read_text() for path in ROOT.glob("mmcore/**/__init__.py"))


def test_only_host_touches_cuda_names() -> None:
    """Everything else asks mmcore.host (torch.cuda may be read, never set)."""
    for path in ROOT.glob("mmcore/**/*.py"):
        if path.name == "host.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("torch", "cuda"), f"{path}:{node.lineno}"
