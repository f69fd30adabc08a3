"""Completions of a prompt in rows behind it, the prompt computed once for all that share a row.

Axes: B completions of a microbatch, T time of prompt and completion, C time of completions, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ntjax.data.batch import Example
from ntjax.data.branched import Branches, collate_branches
from ntjax.data.sizes import sizes

LONGEST = 4  # shared rows, at most, in rows of a completion each: then one holds seven that are as long as the prompt
SAVING = 0.9  # share of a batch's tokens that must not be exceeded: another shape is another compilation


class _Row:
    """A row of completions being filled: their numbers in the microbatch, prompt by prompt, and its tokens so far."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.size = 0


def joined(batch: Mapping[str, np.ndarray], groups: int, pad_id: int) -> dict[str, np.ndarray]:
    """A window's arrays [microbatches, B, ...] with completions of the same prompt in rows behind it, or as they are if
    that would save little.

    `tokens`, `segments`, `positions` [microbatches, B, T] become [microbatches, R, time], R a multiple of `groups`, as
    `collate_branches` has them; with `prefixes`, and `wanted`: is the next token learned. `row` and `start`
    [microbatches, B] say where a completion's first token is.
    """
    lengths, starts = (batch["segments"] > 0).sum(axis=-1), batch["start"]
    _, many, time = batch["tokens"].shape
    alike = [_alike(tokens, start) for tokens, start in zip(batch["tokens"], starts, strict=True)]
    best: tuple[int, int, int, list[list[_Row]]] | None = None
    for length in sizes(int(lengths.max()), LONGEST * time, parts=2):
        laid = [_laid(*each, length) for each in zip(alike, lengths, starts, strict=True)]
        count = next(sizes(max(map(len, laid)), many, groups, parts=2))
        if best is None or count * length < best[0]:
            best = count * length, length, count, laid
    assert best is not None
    area, length, count, laid = best
    if area > SAVING * many * time:
        return dict(batch)
    found = [_collated(batch, micro, rows, count, length, pad_id) for micro, rows in enumerate(laid)]
    return dict(batch) | {name: np.stack([each[name] for each in found]) for name in found[0]}


def _alike(tokens: np.ndarray, starts: np.ndarray) -> list[list[int]]:
    """The rows [B, T] that begin with the same prompt, each as long as `starts` [B] says."""
    found: dict[bytes, list[int]] = {}
    for number, (row, start) in enumerate(zip(tokens, starts, strict=True)):
        found.setdefault(row[:start].tobytes(), []).append(number)
    return list(found.values())


def _laid(alike: list[list[int]], lengths: np.ndarray, starts: np.ndarray, length: int) -> list[_Row]:
    """Rows of at most `length` tokens, one filled after the other; where a group doesn't fit, its prompt is in both."""
    rows: list[_Row] = [_Row()]
    for numbers in alike:
        beginning = int(starts[numbers[0]]) - 1
        group: list[int] = []
        for number in numbers:
            own = int(lengths[number]) - beginning
            if rows[-1].size + own + (0 if group else beginning) > length:
                rows.append(_Row())
                group = []
            if not group:
                rows[-1].groups.append(group)
                rows[-1].size += beginning
            group.append(number)
            rows[-1].size += own
    return rows


def _collated(
    batch: Mapping[str, np.ndarray], micro: int, rows: Sequence[_Row], count: int, length: int, pad_id: int
) -> dict[str, np.ndarray]:
    """The arrays of a microbatch whose completions lie so, in so many rows."""
    starts, mask = batch["start"][micro], batch["mask"][micro]
    lengths = (batch["segments"][micro] > 0).sum(axis=-1)
    place = {name: np.zeros(len(starts), np.int32) for name in ("row", "start")}

    def document(number: int) -> Example:
        start, end = starts[number], lengths[number]
        learned = np.append(np.zeros(start, np.bool_), mask[number, : end - start])
        return Example(batch["tokens"][micro, number, :end], learned)

    slots: list[list[Branches]] = [[] for _ in range(count)]
    for index, row in enumerate(rows):
        at = 0
        for numbers in row.groups:
            slots[index].append(Branches([document(number) for number in numbers], int(starts[numbers[0]])))
            at += slots[index][-1].beginning
            for number in numbers:
                place["row"][number], place["start"][number] = index, at + 1
                at += int(lengths[number]) - slots[index][-1].beginning
    arrays = collate_branches(slots, length, pad_id)
    wanted = np.pad(arrays.pop("mask")[:, 1:], ((0, 0), (0, 1)))
    return arrays | place | {"wanted": wanted}
