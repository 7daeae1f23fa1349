"""docker/compose.yaml says only what Compose knows, and what it starts are commands that exist."""

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tyro
import yaml
from torch.distributed.run import get_args_parser

from mmcore.commands import serve, train

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker" / "compose.yaml"
VARIABLE = r"\$\{([A-Z_]+):-([^}]*)\}"

# What of the Compose Specification (schema/compose-spec.json) is used here; nothing else passes, so a misspelt key is
# found. More is added when it is used.
TEXT, YES_OR_NO, TEXTS = {"type": "string"}, {"type": "boolean"}, {"type": "array", "items": {"type": "string"}}


def only(required: str = "", **properties: Any) -> dict[str, Any]:
    keys = required.split()
    return {"type": "object", "properties": properties, "required": keys, "additionalProperties": False}


DEVICE = only(
    "capabilities",
    driver=TEXT,
    count={"anyOf": [{"const": "all"}, {"type": "integer", "minimum": 1}]},
    capabilities=TEXTS,
)
VOLUME = only(
    "type source target",
    type={"const": "bind"},
    source=TEXT,
    target={"type": "string", "pattern": "^/"},
    read_only=YES_OR_NO,
    bind=only(create_host_path=YES_OR_NO),
)
SERVICE = only(
    "image command",
    image=TEXT,
    build=only("context", context=TEXT, dockerfile=TEXT, args={"type": "object", "additionalProperties": TEXT}),
    user={"type": "string", "pattern": r"^\d+:\d+$"},
    init=YES_OR_NO,
    profiles=TEXTS,
    command=TEXTS,
    environment={"type": "object", "additionalProperties": TEXT},
    stop_grace_period={"type": "string", "pattern": r"^(\d+h)?(\d+m)?(\d+s)?$"},
    ipc={"enum": ["host", "shareable", "private"]},
    ulimits={"type": "object", "additionalProperties": {"type": "integer"}},
    ports={"type": "array", "items": {"type": "string", "pattern": r"^127\.0\.0\.1:\d+:\d+$"}},
    volumes={"type": "array", "items": VOLUME},
    deploy=only(resources=only(reservations=only(devices={"type": "array", "items": DEVICE}))),
)
COMPOSE = {
    **only("name services", name=TEXT, services={"type": "object", "additionalProperties": SERVICE}),
    "patternProperties": {"^x-": {}},
}


def compose(**environment: str) -> dict[str, Any]:
    """The file as Compose reads it: YAML first, then variables in its texts."""

    def filled(node: Any) -> Any:
        if isinstance(node, dict):
            return {name: filled(value) for name, value in node.items()}
        if isinstance(node, list):
            return [filled(value) for value in node]
        if isinstance(node, str):
            node = re.sub(VARIABLE, lambda match: environment.get(match[1]) or match[2], node)
            assert "$" not in node
        return node

    return filled(yaml.safe_load(FILE.read_text()))


def commands(**environment: str) -> dict[str, list[str]]:
    return {name: service["command"] for name, service in compose(**environment)["services"].items()}


def test_only_what_compose_knows() -> None:
    jsonschema.validate(compose(), COMPOSE)
    misspelt = compose()
    misspelt["services"]["train"]["stop_grace_time"] = "1m"
    with pytest.raises(jsonschema.ValidationError, match="stop_grace_time"):
        jsonschema.validate(misspelt, COMPOSE)


def test_every_variable_is_explained_and_has_its_effect() -> None:
    text = FILE.read_text()
    used = set(re.findall(r"\$\{([A-Z_]+)", text))
    head = text.split("\nname:")[0]
    assert used == {word for word in re.findall(r"[A-Z_]{3,}", head) if word != "GPU"}
    for name in used:
        assert compose() != compose(**{name: "other"}), name


def test_training_is_a_run() -> None:
    torchrun = get_args_parser().parse_args(commands(RUN="sft", RECIPE="mistral_clip_sft")["train"][1:])
    assert torchrun.standalone and torchrun.nproc_per_node == "gpu" and torchrun.module
    assert torchrun.training_script == "mmcore" and torchrun.training_script_args[0] == "train"
    config, only_print = train.parse(torchrun.training_script_args[1:])
    assert not only_print and config.checkpoint.save == "/runs/sft" and config.train.global_batch_size == 128
    service = compose()["services"]["train"]
    targets = {volume["target"]: not volume.get("read_only", False) for volume in service["volumes"]}
    assert targets == {config.model.checkpoint: False, config.data.path: False, "/runs": True}


def test_tensorboard_shows_where_training_writes() -> None:
    from tensorboard.program import TensorBoard

    program, *options = commands()["tensorboard"]
    board = TensorBoard()
    board.configure(argv=[program, *options])
    config, _ = train.parse(get_args_parser().parse_args(commands()["train"][1:]).training_script_args[1:])
    assert Path(board.flags.logdir) in Path(config.logging.tensorboard_dir).parents
    assert compose()["services"]["tensorboard"]["ports"] == [f"127.0.0.1:{board.flags.port}:6006"]
    assert board.flags.host == "0.0.0.0"


def test_the_server_is_reached_and_guarded() -> None:
    verb, *options = commands()["serve"]
    config = tyro.cli(serve.ServeConfig, args=options)
    trained, _ = train.parse(get_args_parser().parse_args(commands()["train"][1:]).training_script_args[1:])
    assert verb == "serve" and str(config.checkpoint) == trained.checkpoint.save
    service = compose(MMCORE_TOKEN="secret")["services"]["serve"]
    assert service["ports"] == [f"127.0.0.1:{config.port}:{config.port}"] and not serve.is_local(config.host)
    assert service["environment"] == {serve.TOKEN_VARIABLE: "secret"}
    assert service["profiles"], "a plain `up` would start it beside the training, on the same GPUs"


def test_it_builds_the_image_by_its_own_arguments() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    for service in compose()["services"].values():
        assert (FILE.parent / service["build"]["context"]).resolve() == ROOT
        for name in service["build"]["args"]:
            assert re.search(rf"^ARG {name}\b", dockerfile, re.MULTILINE)
