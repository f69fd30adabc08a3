"""Which rows each step sees, planned up front, and the pipeline that builds them.

The plan is a pure function of row lengths and settings, the same in every process, so the position in the
data is one integer, the step, valid on any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol, cast

import grain
import numpy as np

from ntjax.data.pack import first_fit
from ntjax.data.pooled import Line, Pooling, pooled, room
from ntjax.data.sizes import sizes
from ntjax.marks import UNIT


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


class Joined(Examples, Protocol):
    """Pairs whose documents can lie in one row, what both begin with in it once."""

    @property
    def joined_lengths(self) -> np.ndarray:
        """Tokens of the row that each pair takes then."""

    def joined(
        self, slots: Sequence[Sequence[int]], length: int, documents: int, pad_id: int
    ) -> dict[str, np.ndarray]:
        """The arrays of a microbatch of such rows."""


class Laid(NamedTuple):
    """How a step's examples lie: their indices [microbatches][rows][documents], of at most so many `documents`, in rows
    of `length` tokens, where `joined` both documents of a pair in one row."""

    slots: list[list[list[int]]]
    length: int
    documents: int
    joined: bool = False

    @property
    def area(self) -> int:
        """Tokens that are computed, padding among them."""
        return len(self.slots) * len(self.slots[0]) * self.length


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

    If it `fills`, a step has the examples that it would have anyway, laid together in fewer rows (`laid`), of which
    there are a multiple of `groups`. Where examples are pairs, `joined` [rows] are the tokens that each takes if both
    documents share one row instead of lying in two. Rows have the lengths of `sizes` in so many `parts`.
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
    fills: bool = False
    groups: int = 1
    joined: np.ndarray | None = None
    parts: int = 1

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
        """Tokens in a row of this step: `max_length` with packing, else the size that holds its longest row."""
        if self.packing:
            return self.max_length
        rows = [row for microbatch in self.slots(step) for slot in microbatch for row in slot]
        longest = max(int(self.lengths[row]) for row in rows)
        return next(sizes(longest, self.max_length, parts=self.parts))

    def laid(self, step: int) -> Laid:
        """The step's examples in rows, as `slots` and `length` have them; or, if the plan `fills`, where least is
        computed.

        There are as many rows as `rows_per_microbatch`, or a power of two times `groups`; microbatches are as many as
        `accumulation`, or a power of two. None has more tokens than it would have with a row an example: memory stays
        as it was, and shapes stay few. A row of pairs may be as long as both documents are.
        """
        slots, length = self.slots(step), self.length(step)
        if not self.fills or self.packing:
            return Laid(slots, length, self.documents)
        rows = [row for microbatch in slots for slot in microbatch for row in slot]
        room, fitting = self.rows_per_microbatch * length, sizes(length, self.max_length, parts=self.parts)
        counts = [*_halved(self.rows_per_microbatch, self.groups)]
        found = [*self._candidates(rows, self.lengths, fitting, counts, room)]
        if self.joined is not None:
            longest = max(int(self.joined[row]) for row in rows)
            fitting = sizes(longest, 2 * self.max_length, parts=max(2, self.parts))
            counts = [self.groups << power for power in range((2 * room // self.groups).bit_length())]
            candidates = self._candidates(rows, self.joined, fitting, counts, 2 * room)
            found += [laid._replace(joined=True) for laid in candidates]
        return min(found, key=lambda laid: (laid.area * (2 - laid.joined), laid.joined, laid.length))

    def _candidates(
        self, rows: list[int], lengths: np.ndarray, fitting: Iterable[int], counts: Sequence[int], room: int
    ) -> Iterator[Laid]:
        """The ways to lay examples of such `lengths` in rows of one of the `fitting` sizes, a microbatch having one of
        the `counts` of them and no more tokens than there is `room` for."""
        # First fit leaves least over when long ones come first.
        rows = sorted(rows, key=lambda row: -int(lengths[row]))
        needed = [int(lengths[row]) for row in rows]
        for length in fitting:
            bins = [[rows[i] for i in bin_] for bin_ in first_fit(needed, length)]
            for count in counts:
                microbatches = min(
                    1 << max(0, math.ceil(len(bins) / count) - 1).bit_length(), self.accumulation
                )
                if count * length <= room and microbatches * count >= len(bins):
                    filled = bins + [[]] * (microbatches * count - len(bins))
                    slots = [filled[i * count : (i + 1) * count] for i in range(microbatches)]
                    documents = 1 << (max(map(len, bins)) - 1).bit_length()
                    yield Laid(slots, length, documents)

    def _order(self, epoch: int) -> np.ndarray:
        if self.shuffle:
            return permutation(len(self.packs), self.seed, epoch)
        return np.arange(len(self.packs))


def _halved(rows: int, groups: int) -> Iterator[int]:
    """`rows`, and the smaller ones that are a power of two times `groups`."""
    yield rows
    count = 1 << (rows // groups - 1).bit_length() >> 1
    while count:
        if count * groups < rows:
            yield count * groups
        count //= 2


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
    vision: Pooling | None = None,
    groups: int = 1,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """This process's arrays [microbatches, rows / process_count, ...] of steps `start`, ..., as the plan lays them.

    Joined over the processes along axis 1 they are the single-process batch. The result is a grain iterator;
    its state is `{"next_index": step}`, so `start` is all there is to resume from. `threads` build ahead.

    With `vision` there are `data.pooled`'s arrays too where a row of the step shows a picture; rows are in so many
    `groups` over all processes.
    """
    for rows in (plan.rows_per_microbatch, plan.groups if plan.fills else process_count):
        assert rows % process_count == 0, f"{rows} rows can't be shared by {process_count} processes"

    def build(step: int) -> dict[str, np.ndarray]:
        slots, length, documents, joined = plan.laid(step)
        arrays = cast(Joined, examples).joined if joined else examples.batch
        share = len(slots[0]) // process_count
        mine = slice(process_index * share, (process_index + 1) * share)
        microbatches = [arrays(microbatch[mine], length, documents, pad_id) for microbatch in slots]
        if vision is not None and (space := room(lines(examples, slots), groups, vision)):
            own = lines(examples, (microbatch[mine] for microbatch in slots))
            for batch, each in zip(microbatches, own, strict=True):
                shape = batch["tokens"].shape
                found = pooled(each, length, groups // process_count, space, vision)
                batch |= {
                    name: array if name.startswith(UNIT) else array.reshape(*shape, *array.shape[2:])
                    for name, array in found.items()
                }
        return {name: np.stack([batch[name] for batch in microbatches]) for name in microbatches[0]}

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    iterator = iter(grain.MapDataset.range(plan.steps).map(build).to_iter_dataset(options))
    iterator.set_state({"next_index": start})
    return iterator


def lines(examples: Examples, batches: Iterable[Sequence[Sequence[int]]]) -> Iterator[list[Line]]:
    """The documents of each row of each batch; a pair's row is two lines, of what was chosen and what was rejected."""
    sides = range(len(examples.example(0).documents))
    for slots in batches:
        shown = [[examples.example(index).documents for index in slot] for slot in slots]
        yield [[documents[side] for documents in slot] for slot in shown for side in sides]
