"""A run as YAML: read into its sections, strictly, and written."""

from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from mmcore.checks import nearest
from mmcore.config import RunConfig

MAX_CHARACTERS = 1 << 20


def merge(config: Any, values: dict[str, Any], where: str, prefix: str = "") -> Any:
    """Replace fields of a config dataclass by a nested dict's values.

    What values mean together is not judged here, for the command line may have the other half of a pair: whoever
    parses that makes the sections anew, which judges them.

    Raises:
        ValueError: an unknown key (names the nearest) or a value of the wrong kind.
    """
    known = {item.name: getattr(config, item.name) for item in fields(config)}
    hints = get_type_hints(type(config))
    changes: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in known:
            raise ValueError(f"{where}: unknown key {name!r}{nearest(key, known)}")
        current = known[key]
        if is_dataclass(current):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {name!r} is a section: it takes keys below it, not {value!r}")
            changes[key] = merge(current, value, where, f"{name}.")
        elif get_origin(hints[key]) is Literal:
            if value not in get_args(hints[key]):
                allowed = ", ".join(map(repr, get_args(hints[key])))
                raise ValueError(f"{where}: {name!r} is one of {allowed}, not {value!r}")
            changes[key] = value
        elif isinstance(item := next(iter(get_args(hints[key])), None), type) and is_dataclass(item):
            if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
                raise ValueError(f"{where}: {name!r} is a list of sections, not {value!r}")
            changes[key] = tuple(merge(item(), entry, where, f"{name}.{index}.") for index, entry in enumerate(value))
        else:
            changes[key] = _checked(current, value, name, where, item if isinstance(item, type) else str)
    return _unjudged(type(config), {**known, **changes})


def _unjudged(kind: type, values: dict[str, Any]) -> Any:
    """A dataclass's instance without its `__post_init__`."""
    made: Any = object.__new__(kind)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


def _checked(current: Any, value: Any, name: str, where: str, item: type) -> Any:
    """`value` as the kind that `current` has, a tuple's of `item`: YAML writes 1e-3 as text and a tuple as a list."""
    kind = type(current)
    try:
        if kind is tuple and isinstance(value, list) and all(type(entry) is item for entry in value):
            return tuple(value)
        if kind is float and not isinstance(value, bool):
            return float(value)
        if type(value) is kind:
            return value
    except (TypeError, ValueError):
        pass
    wanted = f"list of {'names' if item is str else 'numbers'}" if kind is tuple else kind.__name__
    raise ValueError(f"{where}: {name!r} takes a {wanted}, not {value!r}")


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file.

    Raises:
        ValueError: missing, unreadable, not YAML, or not a mapping.
    """
    try:
        content = _safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"--config {path} must hold sections (model, parallel, data, ...), not {type(content).__name__}"
        )
    return content


def _safe_load(text: str) -> Any:
    """`yaml.safe_load`, of what is short with all its aliases written out, as messages write it."""
    if len(text) > MAX_CHARACTERS or _length(yaml.compose(text, yaml.SafeLoader), {}) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"it stands for more than {MAX_CHARACTERS} characters")
    return yaml.safe_load(text)


def _length(node: Any, known: dict[int, int]) -> int:
    """Characters that a node stands for, with what is known of others."""
    if id(node) not in known:
        known[id(node)] = MAX_CHARACTERS  # as long as it is being counted: of one that holds itself
        if isinstance(node, yaml.MappingNode):
            inside = [part for pair in node.value for part in pair]
        else:
            inside = node.value if isinstance(node, yaml.SequenceNode) else []
        own = len(node.value) if isinstance(node, yaml.ScalarNode) else 0
        known[id(node)] = 1 + own + sum(_length(part, known) for part in inside)
    return known[id(node)]


def as_yaml(config: RunConfig) -> str:
    """YAML that `--config` takes back."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return str(yaml.safe_dump(plain(asdict(config)), sort_keys=False))
