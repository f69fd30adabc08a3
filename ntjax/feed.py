"""What a stage is fed: batches of a plan made beforehand, or of a stream read while it is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ntjax.data.lazy import Files, Hub
from ntjax.data.loader import Examples, Plan, batches, permutation
from ntjax.data.prompts import Prompts
from ntjax.data.stream import Stream, ahead
from ntjax.data.text import TextEncoder
from ntjax.metrics import Metrics
from ntjax.stages.rollout import Geometry


class Fed(NamedTuple):
    """The arrays of a step [microbatches, rows of this process, ...], and what is known of it over all processes.

    `epoch` is that after the step; `position` is what a stream or a window of completions goes on from after it, None
    where the step says it.
    """

    batch: dict[str, np.ndarray]
    tokens: int
    epoch: float
    position: dict[str, Any] | None = None
    metrics: Metrics = {}  # what is known of the step's data beside


@dataclass(frozen=True)
class Planned:
    """Examples, and the plan that says which of them each step sees; this process reads one share of its rows."""

    plan: Plan
    examples: Examples
    pad_id: int
    share: tuple[int, int] = (0, 1)  # number and count, see `mesh.own_share`

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.plan.steps

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return self.plan.steps_per_epoch

    def tokens(self, step: int) -> int:
        """Tokens, padding left out, that a step reads over all processes."""
        sizes = self.examples.sizes
        return sum(int(sizes[row]) for rows in self.plan.slots(step) for slot in rows for row in slot)

    @contextmanager
    def open(self, start: int = 0, position: dict[str, int] | None = None) -> Iterator[Iterator[Fed]]:
        """The steps from `start` on."""
        rows = batches(
            self.plan,
            self.examples,
            self.pad_id,
            start=start,
            process_index=self.share[0],
            process_count=self.share[1],
        )
        yield (
            Fed(batch, self.tokens(step), self.plan.epoch(step + 1)) for step, batch in enumerate(rows, start)
        )


@dataclass(frozen=True)
class Streamed:
    """Text that is read, tokenised and packed while it is trained on."""

    source: Files | Hub
    encoder: TextEncoder
    steps: int
    length: int
    rows: int  # of a microbatch, over all processes
    accumulation: int
    max_bad_rows: int
    pad_id: int
    share: tuple[int, int] = (0, 1)

    @property
    def steps_per_epoch(self) -> int:
        """Not known: the whole stage counts as one."""
        return self.steps

    @contextmanager
    def open(self, start: int = 0, position: dict[str, int] | None = None) -> Iterator[Iterator[Fed]]:
        """The steps from `start` on, which begin at `position`."""
        stream = Stream(
            self.source,
            self.encoder,
            self.length,
            self.rows,
            self.accumulation,
            self.pad_id,
            position,
            max_bad_rows=self.max_bad_rows,
            process_index=self.share[0],
            process_count=self.share[1],
        )
        rows = ahead(stream)
        try:
            steps = zip(range(start, self.steps), rows, strict=False)
            yield (Fed(batch, tokens, float(at["epoch"]), at) for _, (batch, at, tokens) in steps)
        finally:
            rows.close()


@dataclass(frozen=True)
class Questions:
    """Prompts in the order in which they are asked: pass after pass, each in an order of its own with `shuffle`."""

    prompts: Prompts
    geometry: Geometry
    steps: int
    shuffle: bool
    seed: int
    pad_id: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the prompts."""
        return self.geometry.steps_per_epoch(len(self.prompts))

    def number(self, asked: int) -> int:
        """Which prompt comes after `asked` others."""
        epoch, within = divmod(asked, len(self.prompts))
        return int(permutation(len(self.prompts), self.seed, epoch)[within]) if self.shuffle else within

    def order(self, window: int) -> np.ndarray:
        """The rows of each step of a window: [steps, accumulation, rows]."""
        shape = self.geometry
        drawn = np.random.default_rng([self.seed, 1, window])
        epochs = [drawn.permutation(shape.completions) for _ in range(shape.epochs)]
        return np.concatenate(epochs).reshape(shape.steps, shape.accumulation, shape.rows)


Feed = Planned | Streamed | Questions
