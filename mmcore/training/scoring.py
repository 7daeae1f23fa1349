"""Scores while training: the model, as it is on its ranks, answers a task's examples, and the task's scorer judges.

All ranks generate. The main one then scores in a thread, since some scorers are Java programs that take minutes: the
training goes on meanwhile, and the score is told when it is there. A scorer that fails is told too, and ends no run.

    RUN/eval/step_00000100/predictions.jsonl   what the model answered; there once the scorer is done, or has failed
    RUN/eval/step_00000100/scores.json         as of `mmcore evaluate`; not there where it failed
"""

import json
import math
import shutil
import threading
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mmcore import checkpoint_files as files
from mmcore import distributed
from mmcore.config import RunConfig
from mmcore.constants import TOKENIZER_DIR
from mmcore.data.tokenizer import load_tokenizer
from mmcore.evaluation.predictions import write_predictions
from mmcore.evaluation.scores import Scores, as_json, write_json
from mmcore.evaluation.task import chosen_examples, load_task, read_options
from mmcore.inference.answers import answer_texts, layout
from mmcore.inference.generator import share
from mmcore.models.architecture import Architecture
from mmcore.models.llava import LlavaModel
from mmcore.training.metrics import SCORES_LOG, VALIDATION_LOG, Metrics
from mmcore.training.optimizer import gather_parameters

FOLDER = "eval"


class Scoring:
    """What --eval asks for. All ranks make one, and all call `evaluate` and `catch_up`."""

    def __init__(
        self, config: RunConfig, architecture: Architecture, source: Path, model: LlavaModel, metrics: Metrics | None
    ) -> None:
        """Lay out the prompts, once for the whole run.

        Args:
            config: `check_eval` has accepted its evaluation.
            architecture: the model's, with the run's template.
            source: checkpoint whose tokenizer counts.
            metrics: where scores are told, on the main rank.
        Raises:
            ValueError: a picture is broken.
        """
        self.config, self.metrics, self.conversation = config.eval, metrics, architecture.conversation
        self.steps, self.run = config.train.steps, Path(config.checkpoint.save)
        self.task = load_task(self.config.task)
        self.options = read_options(self.config.task, self.config.options)
        self.metric = self.config.metric or self.task.METRIC
        self.tokenizer = load_tokenizer(source / TOKENIZER_DIR)
        self.examples = chosen_examples(self.config)
        mine = share(len(self.examples))
        self.prompts = [
            layout(example, self.tokenizer, architecture, has_pixels=model.pre_process) if index in mine else None
            for index, example in enumerate(self.examples)
        ]
        self.step = 0
        self.thread: threading.Thread | None = None
        self.result: Scores | str = ""  # what is wrong, where there is no score
        self.told = ""

    def is_due(self, step: int) -> bool:
        return step % self.config.interval == 0 or step == self.steps

    def catch_up(self, step: int, ddp: Any) -> None:
        """Evaluate a step that a run goes on from, if the run was killed before its score was there."""
        scored = [bool(self.metrics) and step in (row["step"] for row in _rows(self.run / SCORES_LOG))]
        dist.broadcast_object_list(scored, 0)
        if self.is_due(step) and not scored[0]:
            self.evaluate(step, ddp)

    def evaluate(self, step: int, ddp: Any) -> None:
        """Answer, and begin to score.

        Args:
            ddp: the model's wrapper, which is left as it was.
        """
        self.finish()
        distributed.meet()  # the main rank may have waited for a scorer
        gather_parameters(ddp)
        options = {"max_new_tokens": self.config.max_new_tokens, "batch_size": self.config.batch_size}
        answers = answer_texts(ddp.module, self.prompts, self.tokenizer, self.conversation, **options)
        if self.metrics:
            self.step = step
            self.thread = threading.Thread(target=self._score, args=(answers,), name=f"scoring {step}", daemon=True)
            self.thread.start()
            self.metrics.leave_out()

    def tell(self) -> None:
        """Tell the score that was begun, if it is there."""
        if self.thread and not self.thread.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait for the score that was begun, and tell it."""
        if not self.thread or not self.metrics:
            return
        self.thread.join()
        self.thread = None
        if isinstance(self.result, Scores):
            self._report(self.metrics, self.result)
        else:
            self._warn(self.metrics, self.result)

    def abandon(self) -> None:
        """End without the score that was begun, unless it is there."""
        self.tell()
        if self.thread and self.metrics:
            self.metrics.say(f"step {self.step} has no score: the run ends before its scorer does")

    def _report(self, metrics: Metrics, scores: Scores) -> None:
        value = scores.metrics.get(self.metric, -math.inf)
        earlier = [row["metrics"].get(self.metric, -math.inf) for row in _rows(self.run / SCORES_LOG)]
        is_best = value > max(earlier, default=-math.inf)
        metrics.report_scores(self.step, self.config.task, self.metric, scores, is_best=is_best)
        is_missing = self.metric not in scores.metrics
        self._warn(metrics, f"{self.metric} is left out ({'; '.join(scores.notes)})" if is_missing else "")

    def _warn(self, metrics: Metrics, problem: str) -> None:
        if problem and problem != self.told:
            metrics.say(
                f"WARNING: step {self.step} has no score, and the training goes on: {problem}. The answers are in "
                f"{files.step_folder(self.run / FOLDER, self.step)}. The same failure is not told again"
            )
        self.told = problem

    def _score(self, answers: list[str]) -> None:
        """In the thread: nothing that goes wrong here may end the run."""
        try:
            final = files.step_folder(self.run / FOLDER, self.step)
            folder = final.with_name(files.INCOMPLETE + final.name)
            shutil.rmtree(folder, ignore_errors=True)
            predictions, references = folder / "predictions.jsonl", Path(self.config.data)
            write_predictions(predictions, self.examples, answers)
            try:
                only = {example.id for example in self.examples}
                scores = self.task.score(predictions, references, options=self.options, only=only)
                inputs = {"predictions": predictions, "references": references}
                write_json(folder / "scores.json", as_json(self.config.task, scores, inputs))
                self.result = scores
            finally:
                files.publish(folder, final)
        except Exception as error:
            self.result = f"{self.config.task}'s scorer failed ({error or type(error).__name__})"


def best_steps(config: RunConfig) -> list[int]:
    """Steps of the run by what --checkpoint.keep-best compares, the best first; of equals the older one."""
    run = Path(config.checkpoint.save)
    if config.eval.task:
        metric = config.eval.metric or load_task(config.eval.task).METRIC
        worth = {row["step"]: row["metrics"].get(metric, -math.inf) for row in _rows(run / SCORES_LOG)}
    else:
        worth = {row["step"]: -row["loss"] for row in _rows(run / VALIDATION_LOG)}
    return sorted(worth, key=lambda step: (-worth[step] if math.isfinite(worth[step]) else math.inf, step))


def _rows(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
