"""Which rows each step sees, planned up front, and the pipeline that builds them.

The plan is a pure function of row lengths and settings, the same in every process, so the position in the
data is one integer, the step, valid on any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import grain
import numpy as np

from ntjax.data.pack import first_fit

SHORTEST = 64  # tokens; below this a step costs its overhead, and one more compilation buys nothing


class Examples(Protocol):
    """Examples by number: documents, or pairs of them."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of a row that each example takes."""

    @property
    def sizes(self) -> np.ndarray:
        """Tokens that each example has: of a pair, both documents'."""

    def __len__(self) -> int: ...

    def example(self, index: int) -> Any:
        """Something whose `documents` are those of example `index`."""

    def batch(
        self, slots: Sequence[Sequence[int]], length: int, documents: int, pad_id: int
    ) -> dict[str, np.ndarray]:
        """The arrays of a microbatch: examples by slot, in rows of `length`, at most `documents` in a slot."""

    def digest(self) -> str:
        """Changes when anything does that a step sees."""

    def report(self) -> str:
        """What became of the rows, for people."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The rows of every step.

    `lengths` [rows]; `rows_per_microbatch` is over all processes. An epoch sees every row once, in its own
    order (the file's, unless `shuffle`), and its last step is filled up with empty slots, never with rows of
    the next epoch: ceil(rows / (rows_per_microbatch * accumulation)) steps, as transformers' Trainer counts
    them. `max_steps` above 0 overrides `epochs`, which may be a fraction.

    With `packing` a slot holds several rows. The packs are made once, by first fit over the rows (in an order
    drawn from the seed if `shuffle`, since neighbours in a file are often alike, or, `in_order`, in their own); an
    epoch reorders packs.
    """

    lengths: np.ndarray
    max_length: int
    rows_per_microbatch: int
    accumulation: int = 1
    epochs: float = 1.0
    max_steps: int = -1
    shuffle: bool = True
    seed: int = 42
    packing: bool = False
    in_order: bool = False

    @cached_property
    def packs(self) -> list[list[int]]:
        """Row indices of each slot of an epoch, before they are put in order."""
        rows = range(len(self.lengths))
        if not self.packing:
            return [[row] for row in rows]
        order = (
            permutation(len(rows), self.seed, -1)
            if self.shuffle and not self.in_order
            else np.arange(len(rows))
        )
        packs = first_fit(np.asarray(self.lengths)[order].tolist(), self.max_length)
        return [order[pack].tolist() for pack in packs]

    @cached_property
    def documents(self) -> int:
        """Most rows of the data that a slot holds: 1 without packing."""
        return max(len(pack) for pack in self.packs)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return math.ceil(len(self.packs) / (self.rows_per_microbatch * self.accumulation))

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.max_steps if self.max_steps > 0 else math.ceil(self.epochs * self.steps_per_epoch)

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` steps, counted in microbatches, as transformers' Trainer counts them."""
        whole, steps = divmod(step, self.steps_per_epoch)
        return whole + steps * self.accumulation / math.ceil(len(self.packs) / self.rows_per_microbatch)

    def slots(self, step: int) -> list[list[list[int]]]:
        """Row indices [accumulation][rows_per_microbatch][documents] of a step."""
        epoch, within = divmod(step, self.steps_per_epoch)
        size = self.rows_per_microbatch
        first = within * size * self.accumulation
        taken = self._order(epoch)[first : first + size * self.accumulation]
        slots = [self.packs[i] for i in taken] + [[]] * (size * self.accumulation - len(taken))
        return [slots[i : i + size] for i in range(0, len(slots), size)]

    def length(self, step: int) -> int:
        """Tokens in a row of this step: `max_length` with packing, else the bucket that holds its longest
        row.

        Buckets are 64, 128, 256, ... and `max_length`: few shapes, so few compilations.
        """
        if self.packing:
            return self.max_length
        rows = [row for microbatch in self.slots(step) for slot in microbatch for row in slot]
        longest = max(int(self.lengths[row]) for row in rows)
        return rounded(longest, self.max_length)

    def _order(self, epoch: int) -> np.ndarray:
        if self.shuffle:
            return permutation(len(self.packs), self.seed, epoch)
        return np.arange(len(self.packs))


def rounded(length: int, most: int) -> int:
    """The bucket that `length` tokens fall into: 64, 128, 256, ... and `most`."""
    return min(most, max(SHORTEST, 1 << (length - 1).bit_length()))


@lru_cache(maxsize=4)
def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch; epoch -1 is the order in which rows are packed."""
    return np.random.default_rng([seed, epoch + 1]).permutation(count)


def batches(
    plan: Plan,
    examples: Examples,
    pad_id: int,
    *,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 1,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """This process's arrays [accumulation, rows_per_microbatch / process_count, ...] of steps `start`, ...

    Joined over the processes along axis 1 they are the single-process batch. The result is a grain iterator;
    its state is `{"next_index": step}`, so `start` is all there is to resume from. `threads` build ahead.
    """
    share, rest = divmod(plan.rows_per_microbatch, process_count)
    assert rest == 0, f"{plan.rows_per_microbatch} rows can't be shared by {process_count} processes"
    mine = slice(process_index * share, (process_index + 1) * share)

    def build(step: int) -> dict[str, np.ndarray]:
        length = plan.length(step)
        microbatches = [
            examples.batch(microbatch[mine], length, plan.documents, pad_id)
            for microbatch in plan.slots(step)
        ]
        return {name: np.stack([batch[name] for batch in microbatches]) for name in microbatches[0]}

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    iterator = iter(grain.MapDataset.range(plan.steps).map(build).to_iter_dataset(options))
    iterator.set_state({"next_index": start})
    return iterator
