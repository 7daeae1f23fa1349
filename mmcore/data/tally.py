"""What is counted of a source, in a form that adds up."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Examples of each finding that are kept.
MAX_EXAMPLES = 5

Integers = NDArray[np.int64]


class Example(NamedTuple):
    """One sample of a finding."""

    shard: str
    key: str
    detail: str


@dataclass(slots=True)
class Prints:
    """Fingerprints of 8 bytes, each with the number of the sample that it is of."""

    values: "array[int]" = field(default_factory=lambda: array("Q"))
    owners: "array[int]" = field(default_factory=lambda: array("I"))

    def add(self, content: bytes, owner: int) -> None:
        self.values.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"))
        self.owners.append(owner)

    def extend(self, other: "Prints") -> None:
        self.values.extend(other.values)
        self.owners.extend(other.owners)

    def repeated(self) -> tuple[Integers, Integers]:
        """Places of all that are the same as an earlier one; of the first few, also the earliest one's."""
        values = np.asarray(self.values)
        order = np.argsort(values, kind="stable")
        ordered = values[order]
        again = np.sort(order[1:][ordered[1:] == ordered[:-1]])
        return again, order[np.searchsorted(ordered, values[again[:MAX_EXAMPLES]])]


@dataclass(slots=True)
class Tally:
    """What was counted of one source."""

    counts: Counter[str] = field(default_factory=Counter)
    """Samples, and tokens by what they are."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Samples by tokens, before any is cut."""
    used: Counter[int] = field(default_factory=Counter)
    """Samples that can be trained on, by tokens, the longest cut."""
    pictures: Counter[int] = field(default_factory=Counter)
    """Samples by number of pictures."""
    found: Counter[str] = field(default_factory=Counter)
    """Samples, or pictures, by finding."""
    examples: dict[str, list[Example]] = field(default_factory=dict)
    ids: tuple[int, int] | None = None
    """Lowest and highest token id."""
    keys: Prints = field(default_factory=Prints)
    files: Prints = field(default_factory=Prints)
    """Of the pictures."""
    wanted: dict[str, int] = field(default_factory=dict)
    """Numbers of the samples that were to be found."""

    def find(self, finding: str, example: Example, count: int = 1) -> None:
        self.found[finding] += count
        examples = self.examples.setdefault(finding, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(example)

    def add(self, other: "Tally") -> None:
        """Add what was counted of the samples behind these."""
        for name in ("counts", "lengths", "used", "pictures", "found"):
            getattr(self, name).update(getattr(other, name))
        for finding, examples in other.examples.items():
            self.examples[finding] = (self.examples.get(finding, []) + examples)[:MAX_EXAMPLES]
        self.see(other.ids or ())
        self.keys.extend(other.keys)
        self.files.extend(other.files)
        self.wanted = {**other.wanted, **self.wanted}

    def see(self, ids: Sequence[int]) -> None:
        if ids:
            seen = (*ids, *(self.ids or ()))
            self.ids = min(seen), max(seen)
