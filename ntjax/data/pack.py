"""Several short rows in one slot, by first fit; long documents in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ntjax.data.encoded import Encoded


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of row indices: each row, in order, goes into the first bin that has room for it.

    Every row is in exactly one bin, no bin holds more than `capacity`, and the result depends on the order of
    the rows alone. O(n log n) time, O(n) memory: a tree of maxima over the room left in the bins, all of
    which exist from the start, so that "open a new bin" is the same search.
    """
    assert max(lengths, default=0) <= capacity, f"a row of {max(lengths)} tokens doesn't fit in {capacity}"
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [capacity] * (2 * leaves)
    bins: list[list[int]] = []
    for row, length in enumerate(lengths):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        index = node - leaves
        if index == len(bins):
            bins.append([])
        bins[index].append(row)
        room[node] -= length
        while node > 1:
            node //= 2
            most = max(room[2 * node], room[2 * node + 1])
            if room[node] == most:
                break
            room[node] = most
    return bins


def split(encoded: Encoded, length: int) -> Encoded:
    """Documents cut every `length` tokens: nothing is lost, and a piece is an example of its own.

    The first token of a piece isn't learned: what comes before it is in another row.
    """
    lengths = np.diff(encoded.offsets)
    pieces = -(-lengths // length)
    within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return _cut(encoded, np.repeat(encoded.offsets[:-1], pieces) + within * length)


def wrapped(encoded: Encoded, length: int) -> Encoded:
    """Documents cut where rows of `length` end when all tokens are laid end to end in them.

    First fit over these pieces, in order, gives just those rows: each is full before the next begins. The
    first token of a piece isn't learned.
    """
    return _cut(encoded, np.union1d(encoded.offsets[:-1], np.arange(0, len(encoded.tokens), length)))


def _cut(encoded: Encoded, starts: np.ndarray) -> Encoded:
    """The same tokens as examples that begin at `starts`, among them every document's start."""
    document = np.searchsorted(encoded.offsets, starts, side="right") - 1
    mask = encoded.mask.copy()
    mask[starts] = False
    return replace(
        encoded,
        mask=mask,
        offsets=np.append(starts, len(encoded.tokens)).astype(np.int64),
        truncated=encoded.truncated[document],
        sources=encoded.sources[document],
    )
