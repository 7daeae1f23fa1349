"""How fast a run is: the utilisation of every step, and one line of JSON at the end."""

import functools
from collections.abc import Mapping
from dataclasses import asdict
from statistics import median
from typing import Any

from mmcore import host
from mmcore.config import RunConfig
from mmcore.evaluation.run_files import changed_options
from mmcore.models.architecture import Architecture
from mmcore.models.flops import Work, step_flops
from mmcore.models.parameters import num_parameters
from mmcore.training.freezing import is_named
from mmcore.training.stages import stage_of, stages

# One in so many steps, at the beginning of a job, is left out of the summary: kernels are compiled, buffers are made.
WARM_UP = 10


class Speed:
    """Counts what the steps of one job do."""

    def __init__(self, config: RunConfig, architecture: Architecture, world_size: int, trained: Mapping[str, int]):
        """
        Args:
            world_size: ranks that share the work.
            trained: numbers in each parameter that can be trained, by name.
        """
        self.config, self.architecture, self.world_size = config, architecture, world_size
        self.stages, self.trained = stages(config), trained
        self._is_trained = functools.cache(self._trains)
        self.peak = host.peak_tflops()
        self.rows: list[dict[str, float]] = []

    def report(self, step: int, work: Work, seconds: float, waited: float, num_samples: int) -> dict[str, float]:
        """Take in a step, and tell its TFLOP/s of one rank and, on a GPU that is known, its MFU and HFU.

        Both are of the GPU's peak in bf16, in FP8 too: so all precisions are measured with one measure.

        Args:
            step: from 1.
            work: of all ranks.
            waited: seconds of it that went into waiting for data.
        """
        is_trained = functools.partial(self._is_trained, stage_of(step, self.stages))
        flops = step_flops(self.architecture, work, is_trained, self.config.model.recompute)
        told = {"tflops": flops.model / seconds / 1e12 / self.world_size}
        if self.peak:
            told["mfu"] = told["tflops"] / self.peak
            told["hfu"] = told["mfu"] * flops.hardware / flops.model
        self.rows.append(
            {
                "step": step,
                "seconds": seconds,
                "waited": waited,
                "samples": num_samples,
                "positions": work.num_positions,
                "model": flops.model,
                "hardware": flops.hardware,
            }
        )
        return {name: float(f"{value:.4g}") for name, value in told.items()}

    def summary(self) -> dict[str, Any]:
        """The job in one line: means over its steps but the first tenth.

        Returns:
            samples_per_s, tokens_per_s (positions, pictures included), tflops of one rank, mfu and hfu (None where the
            peak is not known), peak_memory_gib of the main rank, step_ms_median, data_wait_share, params (in all, and
            trained in the last step's stage), config (options that differ from what they are without a recipe).
        """
        rows = self.rows[-(-len(self.rows) // WARM_UP) :] or self.rows
        total = {name: sum(row[name] for row in rows) for name in rows[0]}
        seconds = total["seconds"]
        tflops, done = (total[name] / seconds / 1e12 / self.world_size for name in ("model", "hardware"))
        numbers = {
            "samples_per_s": total["samples"] / seconds,
            "tokens_per_s": total["positions"] / seconds,
            "tflops": tflops,
            "mfu": tflops / self.peak if self.peak else None,
            "hfu": done / self.peak if self.peak else None,
            "peak_memory_gib": host.peak_memory() / 2**30,
            "step_ms_median": 1e3 * median(row["seconds"] for row in rows),
            "data_wait_share": total["waited"] / seconds,
        }
        stage = stage_of(int(rows[-1]["step"]), self.stages)
        return {
            **{name: None if value is None else float(f"{value:.5g}") for name, value in numbers.items()},
            "params": {
                "all": sum(num_parameters(self.architecture).values()),
                "trained": sum(numel for name, numel in self.trained.items() if self._is_trained(stage, name)),
            },
            "config": dict(changed_options(asdict(self.config))),
        }

    def _trains(self, stage: int, name: str) -> bool:
        return not any(is_named(name, part) for part in self.stages[stage].freeze)
