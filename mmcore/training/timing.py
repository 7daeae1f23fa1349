"""Where a step's time goes, part by part: on demand, since watching costs a little.

On a GPU the clock is the GPU's own: events in its queue, read once a step is over. On a CPU it is the wall's.
"""

from collections import defaultdict
from typing import Any

from torch import Tensor, nn

from mmcore import host

PARTS = {
    "vision_model": "vision_model",
    "vision_projection": "vision_projection",
    "language_model.decoder": "language_model",
    "language_model.output_layer": "output_layer",
}
"""Modules that are watched, and what their time is called."""
REST = "rest"


class ModuleTimes:
    """A stopwatch that runs all the time, for one part after the other.

    A module's forward pass is its own; its backward pass begins with the gradient of its output and lasts until that
    of the next module's below, or until something else begins.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        self._marks = [(host.tick(), REST)]
        for path, name in PARTS.items():
            if path in modules:
                self._watch(modules[path], name)

    def mark(self, name: str = REST) -> None:
        """From here on the time is `name`'s."""
        self._marks.append((host.tick(), name))

    def _watch(self, module: nn.Module, name: str) -> None:
        def end(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self.mark()
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and first.requires_grad:
                first.register_hook(lambda _: self.mark(name))

        module.register_forward_pre_hook(lambda *_: self.mark(name))
        module.register_forward_hook(end)

    def seconds(self) -> dict[str, float]:
        """Of each part since the last call; waits for the GPU."""
        self.mark()
        found: dict[str, float] = defaultdict(float)
        for (begun, name), (ended, _) in zip(self._marks, self._marks[1:], strict=False):
            found[name] += host.seconds_between(begun, ended)
        self._marks = self._marks[-1:]
        return dict(found)
