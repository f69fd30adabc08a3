"""First-fit packing: several short rows in one slot."""

from __future__ import annotations

from collections.abc import Sequence


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
