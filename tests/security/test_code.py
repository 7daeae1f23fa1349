"""What may open a door to files of strangers stands in one guarded module, and nowhere else in this repository.

Pickles are read by mmcore/pickles.py. YAML is loaded safely, weights are loaded as weights, archives are streamed, no
library runs code that a folder brings. Tests may make hostile files, and read their own results.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUARDED = ROOT / "mmcore" / "pickles.py"
FOLDERS = ("mmcore", "tools", "examples", "benchmarks")
SOURCES = sorted([ROOT / "setup.py", *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])

# Modules that read pickles, or import and run what a file names.
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "runpy", "pandas"}
# Calls by the last two names: of what they are asked to be careful about, how.
REFUSED = {
    ("yaml", "load"): "yaml.safe_load",
    ("yaml", "load_all"): "yaml.safe_load_all",
    ("yaml", "full_load"): "yaml.safe_load",
    ("yaml", "unsafe_load"): "yaml.safe_load",
    ("jit", "load"): "mmcore.pickles.read_modules",
    ("np", "fromfile"): "np.frombuffer of what was read",
    ("os", "system"): "subprocess with a list",
    ("os", "popen"): "subprocess with a list",
    ("shutil", "unpack_archive"): "streamed members",
}
ANYWHERE = {"extractall", "unsafe_load", "add_safe_globals"}
BUILT_IN = {"eval", "exec", "compile", "__import__"}
UNGUARDED_PICTURE = "Image.open without formats: Pillow knows some that run programs"


def findings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            names = []
        for name in names:
            if name.split(".")[0] in MODULES or name.startswith(("torch._weights_only", "torch.package")):
                yield node.lineno, f"{name} is imported: read pickles by mmcore.pickles"
            if name.startswith("transformers.Auto"):
                yield node.lineno, f"{name} runs code of a folder if it is told to: name the class"
        if isinstance(node, ast.Call):
            yield from ((node.lineno, told) for told in of_call(node))
        if isinstance(node, ast.Attribute) and node.attr.startswith("Auto") and is_name(node.value, "transformers"):
            yield node.lineno, f"transformers.{node.attr} runs code of a folder if it is told to: name the class"


def is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def of_call(node: ast.Call) -> Iterator[str]:
    options = {word.arg: word.value for word in node.keywords}
    owner, name = "", ""
    if isinstance(node.func, ast.Name):
        name = node.func.id
        if name in BUILT_IN:
            yield f"{name}() runs text"
    elif isinstance(node.func, ast.Attribute):
        name = node.func.attr
        value = node.func.value
        owner = value.id if isinstance(value, ast.Name) else value.attr if isinstance(value, ast.Attribute) else ""
    if better := REFUSED.get((owner, name)):
        yield f"{owner}.{name}: use {better}"
    if name in ANYWHERE:
        yield f"{name} trusts a file"
    if (owner, name) == ("torch", "load") and not is_true(options.get("weights_only")):
        yield "torch.load without weights_only=True"
    for option in ("allow_pickle", "trust_remote_code", "shell"):
        if option in options and not is_false(options[option]):
            yield f"{option} is on"
    if "weights_only" in options and not is_true(options["weights_only"]):
        yield "weights_only is off"
    if (owner, name) == ("Image", "open") and "formats" not in options:
        yield UNGUARDED_PICTURE


def is_true(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def is_false(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value in (False, None)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_of_strangers_are_read_in_one_place(path: Path) -> None:
    found = [f"{path}:{line}: {told}" for line, told in findings(ast.parse(path.read_text()))]
    if path.is_relative_to(ROOT / "mmcore"):
        found = [text for text in found if path != GUARDED or "pickle is imported" not in text]
    else:  # examples and benchmarks open pictures that they have made
        found = [text for text in found if UNGUARDED_PICTURE not in text]
    assert not found, "\n".join(found)


def test_there_are_sources() -> None:
    assert len(SOURCES) > 150 and GUARDED in SOURCES


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import dill",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "load_file(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "np.load(path, allow_pickle=True)",
        "tar.extractall(folder)",
        "LlamaForCausalLM.from_pretrained(folder, trust_remote_code=True)",
        "from transformers import AutoModel",
        "transformers.AutoTokenizer.from_pretrained(folder)",
        "eval(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "torch.jit.load(path)",
        "torch.serialization.add_safe_globals([Thing])",
        "Image.open(path)",
    ],
)
def test_each_of_them_would_be_found(text: str) -> None:
    assert list(findings(ast.parse(text)))


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(path, weights_only=True)",
        "yaml.safe_load(text)",
        "np.load(path, allow_pickle=False)",
        "model.eval()",
        "re.compile(text)",
        "Image.open(io.BytesIO(data), formats=FORMATS)",
        "subprocess.run([java, '-version'], shell=False)",
    ],
)
def test_what_is_careful_passes(text: str) -> None:
    assert not list(findings(ast.parse(text)))
