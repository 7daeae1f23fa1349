"""`mmcore train RECIPE [--config FILE.yaml] [--section.option value ...] [--print-config]`."""

import argparse
import inspect
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro

from mmcore.checkpoint_files import check_disk, checkpoint_bytes, never_trained
from mmcore.checks import nearest
from mmcore.config import RunConfig
from mmcore.config_yaml import as_yaml, load_yaml, merge
from mmcore.constants import EXIT_DONE, EXIT_FAULT, EXIT_PREEMPTED, EXIT_USAGE, MODULES
from mmcore.environment import queue_in_order
from mmcore.evaluation.task import check_eval
from mmcore.models.architecture import Architecture, check_layout, check_length, with_image_mode
from mmcore.models.presets import resolve_architecture
from mmcore.recipes import RECIPES
from mmcore.training import signals
from mmcore.training.ends import write_done, write_end
from mmcore.training.memory import check_host, host_memory
from mmcore.training.run_lock import run_lock
from mmcore.training.writers import check_writers


def usage() -> str:
    rows = "\n".join(f"  {name:24}{(recipe.__doc__ or '').splitlines()[0]}" for name, recipe in RECIPES.items())
    return (
        "usage: mmcore train RECIPE [--config FILE.yaml] [--section.option value ...] [--print-config]\n\n"
        f"recipes:\n{rows}\n\n`mmcore train RECIPE --help` lists the options with the recipe's values.\n"
    )


def parse(argv: list[str]) -> tuple[RunConfig, bool]:
    """The run that a command line asks for: recipe, then YAML, then options.

    Returns:
        The run, and whether it is only to be printed.
    Raises:
        ValueError: unknown recipe, a YAML that is not a run, or options that do not fit together.
    """
    recipe, *options = argv
    if recipe not in RECIPES:
        raise ValueError(f"{recipe!r} is not a recipe{nearest(recipe, RECIPES)}; `mmcore train --help` lists them")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    first.add_argument("--print-config", action="store_true")
    known, options = first.parse_known_args(options)
    config = RECIPES[recipe]()
    if known.config:
        config = merge(config, load_yaml(known.config), str(known.config))
    description = (
        f"{inspect.getdoc(RECIPES[recipe])}\n\n--config FILE.yaml sets options too; --print-config prints such a file."
    )
    config = tyro.cli(
        RunConfig,
        prog=f"mmcore train {recipe}",
        description=description,
        default=config,
        args=options,
    )
    config.check()
    return config, known.print_config


def check(config: RunConfig, world_size: int) -> Architecture:
    """Everything that can be said before a process group, a GPU or torch is there.

    Raises:
        ValueError: what is missing, contradicts itself or does not fit the ranks.
    """
    if not config.data.path and not config.data.synthetic:
        raise ValueError("no data: give --data.path, an energon dataset that `mmcore prepare` wrote")
    if config.data.path and "://" not in config.data.path and not Path(config.data.path).exists():
        raise ValueError(f"--data.path {config.data.path} does not exist: write it with `mmcore prepare`")
    if not config.checkpoint.save and config.checkpoint.save_interval:
        raise ValueError("no place to keep the run: give --checkpoint.save, a folder for its checkpoints and log")
    architecture = with_image_mode(resolve_architecture(config.model), config.data.image_mode)
    check_layout(architecture, config.parallel)
    check_length(architecture, config.data.seq_length)
    if config.eval.task:
        check_eval(config.eval)
    check_writers(config.logging)
    parallel = config.parallel
    config.train.check_batch_sizes(parallel.data_parallel_size(world_size), parallel.microbatch_multiple)
    frozen = never_trained([stage.freeze for stage in config.train.stages] or [config.model.freeze])
    weight_bytes = 2 if config.train.precision == "bf16" else 4
    size, weights = (checkpoint_bytes(architecture, parts, weight_bytes) for parts in (frozen, MODULES))
    if config.checkpoint.save_interval:
        check_disk(config.checkpoint, config.train.steps, size)
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        check_host(weights, size - weights, parallel, world_size, local_world_size, host_memory())
    return architecture


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), end="")
        return EXIT_DONE
    config, only_print = parse(argv)
    if only_print:
        print(as_yaml(config), end="")
        return EXIT_DONE
    queue_in_order(config.parallel)
    architecture = check(config, int(os.environ.get("WORLD_SIZE", 1)))
    if config.checkpoint.save:
        return _run(config, architecture)
    with TemporaryDirectory() as folder:
        return _run(replace(config, checkpoint=replace(config.checkpoint, save=folder)), architecture)


def _run(config: RunConfig, architecture: Architecture) -> int:
    """The run, as the only one that writes its folder, and its report."""
    is_main = os.environ.get("RANK", "0") == "0"
    run = Path(config.checkpoint.save)
    if config.checkpoint.save_interval:  # else there is nothing to save
        signals.listen()
    code, reason = EXIT_FAULT, ""
    with run_lock(run) if is_main else nullcontext():
        try:
            code, reason = _train(config, architecture, is_main)
            if is_main and code == EXIT_DONE:
                code, reason = _finish(run, config.train.steps)
        except BaseException as error:
            code = EXIT_USAGE if isinstance(error, ValueError) else EXIT_FAULT
            reason = f"{type(error).__name__}: {error}"
            raise
        finally:  # finished, stopped or interrupted
            if is_main and config.checkpoint.save_interval:
                write_end(run, code, reason)
                _report(run)
    return code


def _finish(run: Path, steps: int) -> tuple[int, str]:
    try:
        write_done(run, steps)
    except ValueError as error:  # no mistake of the user's: the disk's
        print(f"mmcore train: {error}", file=sys.stderr)
        return EXIT_FAULT, str(error)
    return EXIT_DONE, "finished"


def _train(config: RunConfig, architecture: Architecture, is_main: bool) -> tuple[int, str]:
    """The run, and each fault of it said once.

    Returns:
        Exit code, and what it stands for.
    """
    from mmcore.checkpoint import SaveError
    from mmcore.data.stream import TooManySkippedError
    from mmcore.training import watchdog
    from mmcore.training.batches import check_data
    from mmcore.training.loop import train
    from mmcore.training.policy import BadStepError

    check_data(config, architecture)
    try:
        train(config, architecture)
    except signals.PreemptedError as told:
        if is_main:
            print(f"mmcore train: {told}", file=sys.stderr)
        return EXIT_PREEMPTED, str(told)
    except (BadStepError, SaveError) as error:  # which all ranks raise
        if is_main:
            print(f"mmcore train: {error}", file=sys.stderr)
        else:
            time.sleep(3)  # torchrun ends the others as soon as one has failed: the first speaks before that
        return error.code if isinstance(error, BadStepError) else EXIT_FAULT, str(error)
    except TooManySkippedError as error:  # of the rank that reads those samples
        print(f"mmcore train: {error}", file=sys.stderr)
        return EXIT_FAULT, str(error)
    finally:
        watchdog.stop()
    return EXIT_DONE, ""


def _report(run: Path) -> None:
    """Write the page of a run that has a step to tell of; what keeps it from that is said, and ends nothing."""
    from mmcore.evaluation.run_page import write_run_page

    log = run / "log.jsonl"
    if not log.exists() or not log.stat().st_size:
        return
    try:
        print(f"{write_run_page(run)}: the run's curves and numbers", file=sys.stderr)
    except Exception as error:  # a run is not to fail for its picture
        print(f"mmcore train: no report.html was written: {type(error).__name__}: {error}", file=sys.stderr)
