"""Scores while training, in the trainer's own loop over batches by number: the same at every layout, and no trace."""

import functools
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import sentencepiece
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from mmcore import checkpoint
from mmcore import checkpoint_files as files
from mmcore.config import (
    CheckpointConfig,
    EvalConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from mmcore.data.batch import Batch
from mmcore.evaluation import exact_match
from mmcore.evaluation.scores import EvaluationError, Scores
from mmcore.evaluation.task import check_eval, chosen_examples
from mmcore.inference.generator import Prompt, generate
from mmcore.training import loop
from mmcore.training.metrics import Metrics
from mmcore.training.optimizer import wrap
from mmcore.training.scoring import best_steps
from tests import ranks, tiny
from tests.data.fabricated import conversation, picture

STEPS, EXAMPLES = 6, 7
ARCHITECTURE = replace(tiny.architecture(), conversation="mistral_instruct")
LAYOUTS = {
    "tp1": (ParallelConfig(), 1),
    "tp2sp": (ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True), 2),
    "pp2": (ParallelConfig(pipeline_model_parallel_size=2), 2),
    "dp2, overlap": (ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True), 2),
}


class Batches(Iterator[Batch]):
    """Batches by number, dealt to the replicas; at one of them the run dies."""

    sources: tuple[str, ...] = ()
    dies_at: ClassVar[int] = -1

    def __init__(self, config: RunConfig, _: Any, source: Path, *, resumed: bool = False) -> None:
        self.waited = 0.0
        self.next = json.loads(checkpoint.loader_states(source)[0]) if resumed else 0

    def __next__(self) -> Batch:
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        number, self.next = self.next, self.next + size
        if number == self.dies_at:
            raise InterruptedError
        return tiny.batch(2 * (number + rank) % 16, 2)

    def counts(self) -> dict[str, Any]:
        return {}

    def state(self) -> bytes:
        return json.dumps(self.next).encode()


def write_model(folder: Path, tokenizer: Path) -> None:
    content = {"architecture": ARCHITECTURE, "tokenizer": tokenizer, "loader_state": None, "state": {}}
    model = tiny.build(ParallelConfig(), arch=ARCHITECTURE)
    checkpoint.save_checkpoint(folder, 0, model=wrap(model), optimizer=None, keep_last=1, **content)


def write_data(path: Path, answers: list[str]) -> None:
    rows = [
        {"id": f"q{index}", "image": f"{index}.png", "conversations": conversation(f"what is {index * 'one '}", answer)}
        for index, answer in enumerate(answers)
    ]
    del rows[-1]["image"]
    path.write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def root(tmp_path_factory: Any) -> Path:
    """A model, a tokenizer and questions, some of which the model answers as it is to at step 2, others at 4."""
    root = tmp_path_factory.mktemp("scoring")
    (root / "tokenizer").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three what is this a picture of the number"] * 50),
        model_prefix=str(root / "tokenizer" / "tokenizer"),
        vocab_size=60,
        hard_vocab_limit=False,
        control_symbols=["[INST]", "[/INST]"],
        num_threads=1,
        minloglevel=2,
    )
    for index in range(EXAMPLES - 1):
        (root / f"{index}.png").write_bytes(picture(index))
    ranks.run(write_model, ParallelConfig(), 1, root / "model", root / "tokenizer")
    write_data(root / "first.json", ["no"] * EXAMPLES)
    run(root, "first", data="first.json")
    second, fourth, sixth = [answers(root / "first", step) for step in (2, 4, 6)]
    assert len(set(fourth)) > 2 and second != fourth != sixth, "answers are alike: the tests would see nothing"
    write_data(root / "data.json", [*fourth[:5], *second[5:]])
    return root


def config(root: Path, name: str, layout: ParallelConfig, *, data: str = "data.json", **options: Any) -> RunConfig:
    recompute = options.pop("recompute", "none")
    kept = {key: options.pop(key) for key in ("save_interval", "keep_last", "keep_best") if key in options}
    scored = {"task": "exact-match", "interval": 2, "max_new_tokens": 6, "batch_size": 2, **options}
    return RunConfig(
        model=ModelConfig(checkpoint=str(root / "model"), recompute=recompute),
        parallel=layout,
        train=TrainConfig(steps=STEPS, global_batch_size=2, precision="fp32"),
        optimizer=OptimizerConfig(lr=2e-3, lr_warmup_steps=1),
        checkpoint=CheckpointConfig(**{"save": str(root / name), "save_interval": STEPS, **kept}),
        eval=EvalConfig(data=str(root / data), **scored) if scored["interval"] else EvalConfig(),
    )


def run(root: Path, name: str, layout: str = "tp1", dies_at: int = -1, scorer: Any = None, **options: Any) -> list[str]:
    """Train; returns what was said."""
    parallel, world_size = LAYOUTS[layout]
    settings = config(root, name, parallel, **options)

    def trained() -> list[str]:
        said: list[str] = []
        loop.Batches = Batches  # type: ignore
        Batches.dies_at = dies_at
        loop.distributed.initialize = lambda *_: None  # the test's groups are up
        Metrics.say = lambda self, text: said.append(text)  # type: ignore
        if scorer:
            exact_match.score = scorer
        with suppress(InterruptedError):  # as if killed: nothing is waited for
            loop.train(settings, ARCHITECTURE)
        return said

    return ranks.run(trained, parallel, world_size)[0]


@functools.cache
def scored(root: Path, layout: str) -> list[str]:
    """The layout's run, as other tests look at it too."""
    return run(root, layout, layout, recompute={"tp2sp": "selective", "pp2": "full"}.get(layout, "none"))


def answers(run: Path, step: int) -> list[str]:
    lines = (run / "eval" / f"step_{step:08d}" / "predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["id"] for row in rows] == [f"q{index}" for index in range(len(rows))]
    return [row["answer"] for row in rows]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(run: Path) -> list[int]:
    return [int(folder.name.removeprefix("step_")) for folder in files.step_folders(run)]


def losses(run: Path) -> list[Any]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(run / "log.jsonl")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_at_every_layout(root: Path, layout: str) -> None:
    said = scored(root, layout)
    assert [answers(root / layout, step) for step in (2, 4, 6)] == [answers(root / "first", step) for step in (2, 4, 6)]
    right = exact_match.load_references(root / "data.json")
    for row in rows(root / layout / "scores.jsonl"):
        given = dict(zip(right, answers(root / layout, row["step"]), strict=True))
        num_correct = sum(given[name] in right[name] for name in right)
        assert row["metrics"] == {"exact_match": 100 * num_correct / EXAMPLES}
        assert (row["task"], row["num_samples"]) == ("exact-match", EXAMPLES)
        kept = json.loads((root / layout / "eval" / f"step_{row['step']:08d}" / "scores.json").read_text())
        assert kept["metrics"] == row["metrics"] and kept["num_correct"] == num_correct
    second, fourth, _ = [row["metrics"]["exact_match"] for row in rows(root / layout / "scores.jsonl")]
    assert fourth > second > 0
    assert f"step      4/{STEPS} | exact-match exact_match {fourth:.4f} of 7 samples, the best so far" in said


@pytest.mark.parametrize("layout", ["tp1", "dp2, overlap"])
def test_the_training_does_not_notice(root: Path, layout: str) -> None:
    scored(root, layout)
    run(root, f"{layout} plain", layout, interval=0)
    assert losses(root / layout) == losses(root / f"{layout} plain")
    assert not (root / f"{layout} plain" / "eval").exists()


def test_a_replica_without_examples(root: Path) -> None:
    """It waits for nobody, though the other one's forward passes would have gathered the weights."""
    run(root, "one", "dp2, overlap", num_samples=1)
    scored(root, "dp2, overlap")
    assert losses(root / "one") == losses(root / "dp2, overlap")
    assert [row["num_samples"] for row in rows(root / "one" / "scores.jsonl")] == [1, 1, 1]


def left_alone(layout: ParallelConfig) -> bool:
    model = tiny.build(layout)
    ddp = wrap(model)
    model.train()
    model.language_model.eval()
    for buffer in ddp.buffers:
        buffer.grad_data.copy_(torch.arange(buffer.grad_data.numel()))

    def state() -> list[Any]:
        tracker = get_cuda_rng_tracker().get_states()
        flags = [(module.training, getattr(module, "sequence_parallel", None)) for module in model.modules()]
        generators = [torch.get_rng_state().tolist(), {name: value.tolist() for name, value in tracker.items()}]
        grads = [buffer.grad_data.tolist() for buffer in ddp.buffers]
        needs = [(parameter.requires_grad, parameter.grad is None) for parameter in model.parameters()]
        weights = [parameter.tolist() for parameter in model.parameters()]
        return [flags, generators, grads, needs, weights, model.config.sequence_parallel]

    before = state()
    sample = tiny.sample(1)
    prompt = Prompt(tokens=sample.tokens.tolist(), images=sample.images)
    generate(model, [prompt], max_new_tokens=3, batch_size=1)
    return state() == before and before[-1] == layout.sequence_parallel


@pytest.mark.parametrize("layout", ["tp1", "tp2sp"])
def test_the_model_is_left_as_it_was(layout: str) -> None:
    parallel, world_size = LAYOUTS[layout]
    assert all(ranks.run(left_alone, parallel, world_size, parallel))


def hanging(*arguments: Any, **options: Any) -> Any:
    """A scorer that is still at work when the run is killed, at step 4."""
    if "step_00000004" in str(arguments[0]):
        time.sleep(100)
    return SCORE(*arguments, **options)


SCORE = exact_match.score


def test_a_resumed_run_keeps_the_best(root: Path) -> None:
    options = {"save_interval": 2, "keep_last": 1, "keep_best": 1}
    run(root, "resumed", dies_at=8, scorer=hanging, **options)
    assert steps(root / "resumed") == [2, 4]
    assert [row["step"] for row in rows(root / "resumed" / "scores.jsonl")] == [2]
    assert not (root / "resumed" / "eval" / "step_00000004").exists()
    run(root, "resumed", **options)
    scored(root, "tp1")
    whole = rows(root / "tp1" / "scores.jsonl")
    assert rows(root / "resumed" / "scores.jsonl") == whole
    best = max(whole, key=lambda row: row["metrics"]["exact_match"])["step"]
    assert best == 4 and steps(root / "resumed") == [4, 6]
    assert best_steps(config(root, "resumed", ParallelConfig(), **options))[0] == 4


def test_a_scorer_that_fails_ends_nothing(root: Path) -> None:
    """Whether it leaves the metric out, as at step 1, or raises an error, as later; each is told once."""

    def fails(predictions: Path, *_: Any, **__: Any) -> Scores:
        if "step_00000001" in str(predictions):
            found = {"metrics": {"other": 1.0}, "scales": {"other": ""}}
            return Scores(metric="other", samples=(), num_samples=7, notes=("no Java",), **found)
        raise EvaluationError("there is no Java")

    said = run(root, "fails", scorer=fails, interval=1)
    first, second = [text for text in said if text.startswith("WARNING")]
    assert first.startswith("WARNING: step 1 has no score, and the training goes on: exact_match is left out (no Java)")
    assert second.startswith(
        "WARNING: step 2 has no score, and the training goes on: exact-match's scorer failed (there is no Java)"
    )
    assert losses(root / "fails") == losses(root / "first")
    (row,) = rows(root / "fails" / "scores.jsonl")
    assert (row["step"], row["metrics"]) == (1, {"other": 1.0})
    for step in (2, 4, 6):
        assert answers(root / "fails", step) == answers(root / "first", step)
    kept = [path.name for path in sorted((root / "fails" / "eval").rglob("*.json*"))]
    assert kept == ["predictions.jsonl", "scores.json"] + ["predictions.jsonl"] * 5


def test_some_of_the_examples(root: Path) -> None:
    every = chosen_examples(EvalConfig(task="exact-match", data=str(root / "data.json"), interval=1))
    some = EvalConfig(task="exact-match", data=str(root / "data.json"), interval=1, num_samples=3)
    chosen = chosen_examples(some)
    assert len(chosen) == 3 and chosen == chosen_examples(some) and chosen == [row for row in every if row in chosen]
    names = {example.id for example in chosen}
    path = root / "some.jsonl"
    path.write_text("".join(json.dumps({"id": name, "answer": "x"}) + "\n" for name in names))
    assert exact_match.score(path, root / "data.json", options={}, only=names).size == 3
    assert len(chosen_examples(replace(some, num_samples=99))) == EXAMPLES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "exact_match"}, r"no task 'exact_match', did you mean 'exact-match'"),
        ({"metric": "CIDEr"}, r"--eval.metric CIDEr: exact-match has no such metric \(it has exact_match\)"),
        ({"options": ("tokenizer=ptb",)}, "--eval.options tokenizer=ptb: exact-match has no option 'tokenizer'"),
        ({"data": "absent.json"}, "--eval.data .*absent.json is not there"),
        ({"images": "tokenizer"}, "6 of 6 pictures are missing"),
    ],
)
def test_mistakes_are_found_before_there_is_a_model(root: Path, options: dict[str, Any], message: str) -> None:
    paths = {key: str(root / value) for key, value in options.items() if key in ("data", "images")}
    given = {"task": "exact-match", "data": str(root / "data.json"), "interval": 1, **options, **paths}
    with pytest.raises(ValueError, match=message):
        check_eval(EvalConfig(**given))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "coco", "data": "x"}, "--eval.task coco without --eval.interval"),
        ({"task": "coco", "interval": 5}, "--eval.task coco without --eval.data"),
        ({"data": "x"}, "--eval.data without --eval.task"),
        ({"interval": 1}, "--eval.interval without --eval.task"),
        ({"num_samples": 5}, "--eval.num-samples without --eval.task"),
        ({"interval": -1}, "--eval.interval must not be negative, but is -1"),
        ({"max_new_tokens": 0}, "--eval.max-new-tokens must be above 0"),
    ],
)
def test_sections_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalConfig(**options)


def test_the_best_needs_a_score_at_every_checkpoint() -> None:
    best = CheckpointConfig(save_interval=10, keep_best=1)
    with pytest.raises(ValueError, match=r"--checkpoint.keep-best 1 has nothing to go by"):
        RunConfig(checkpoint=best).check()
    with pytest.raises(ValueError, match=r"--checkpoint.save-interval 10 must be a multiple of --eval.interval 4"):
        RunConfig(checkpoint=best, eval=EvalConfig(task="coco", data="x", interval=4)).check()
    with pytest.raises(ValueError, match=r"save-interval 10 must be a multiple of --train.val-interval 20"):
        RunConfig(checkpoint=best, train=TrainConfig(val_interval=20)).check()
    with pytest.raises(ValueError, match="keep-best must not be negative"):
        CheckpointConfig(keep_best=-1)


def test_the_best_by_loss(tmp_path: Path) -> None:
    """No number is worse than any; of equals the older is the better."""
    found = {10: 2.0, 20: float("nan"), 30: 1.0, 40: 1.0, 50: 3.0}
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in found.items()]
    (tmp_path / "validation.jsonl").write_text("\n".join(lines) + "\n")
    settings = RunConfig(train=TrainConfig(val_interval=10), checkpoint=CheckpointConfig(save=str(tmp_path)))
    assert best_steps(settings) == [30, 40, 10, 50, 20]
    assert best_steps(replace(settings, checkpoint=CheckpointConfig(save=str(tmp_path / "new")))) == []


def test_scores_are_told(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging = LoggingConfig(tensorboard_dir=str(tmp_path / "board"))
    metrics = Metrics(RunConfig(checkpoint=CheckpointConfig(save=str(tmp_path)), logging=logging), 0)
    found = {"CIDEr": 0.5, "METEOR": 0.25}
    scores = Scores(metric="CIDEr", samples=(), num_samples=9, metrics=found, scales={})
    metrics.report_scores(3, "coco", "CIDEr", scores)
    metrics.last -= 100
    metrics.leave_out()
    assert time.monotonic() - metrics.last < 50 and 100 <= metrics.left_out < 150
    metrics.rewind(2, "")
    metrics.report_scores(4, "coco", "CIDEr", scores)
    metrics.close()
    assert rows(tmp_path / "scores.jsonl") == [{"step": 4, "task": "coco", "num_samples": 9, "metrics": found}]
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("scores/METEOR")] == [(3, 0.25), (4, 0.25)]
