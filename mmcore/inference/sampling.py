"""How a request's tokens are chosen. Imports no torch: the command line judges its options by it."""

from dataclasses import dataclass

# Below it logits that are divided by a temperature are no numbers any more; by far all is greedy then.
LOWEST = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one request's tokens are chosen."""

    temperature: float = 0.0
    """Logits are divided by it; 0 takes the most probable token always."""
    top_p: float = 1.0
    """Only the most probable tokens that together have at least this much are drawn from."""
    top_k: int = 0
    """Only this many of the most probable tokens are drawn from; 0: all."""
    repetition_penalty: float = 1.0
    """Logits of tokens that the prompt or the answer has already are divided by it, negative ones multiplied."""
    seed: int = 0
    """Of the random numbers: the same seed draws the same answer."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value makes no sense.
        """
        if self.temperature and not LOWEST <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or at least {LOWEST}, and is {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, and is {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, and is {self.top_k}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be above 0, and is {self.repetition_penalty}")


GREEDY = Sampling()
