"""The learning rate of both towers."""

import math


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Up linearly, then down to 0 along a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
