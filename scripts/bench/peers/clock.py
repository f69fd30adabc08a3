"""A clock that a training loop marks after every step."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from harness import measured

Json = dict[str, Any]


@dataclass
class Clock:
    """Started before the weights are read."""

    began: float = field(default_factory=time.perf_counter)
    marks: list[Json] = field(default_factory=list)

    def mark(self, loss: float, tokens: float) -> None:
        """A step is done; `tokens` that aren't padding have been read in all."""
        here = measured([time.perf_counter()], [time.process_time()], tokens=[tokens], loss=loss)
        self.marks.append(here)

    def run(self, warm: int, last: int | None = None) -> Json:
        """What a contestant returns: the steps after the first `warm`, up to the step `last`; each lasts from the mark
        of the one before."""
        seen = self.marks[warm - 1 : last]
        keys = ("seconds", "cpu", "tokens")
        spent = {key: [after[key][0] - before[key][0] for before, after in pairwise(seen)] for key in keys}
        return measured(
            **spent,
            first_s=self.marks[0]["seconds"][0] - self.began,
            loss=[mark["loss"] for mark in self.marks[:3]],
            peak_gb=seen[-1]["peak_gb"],
        )
