"""First-fit packing."""

from __future__ import annotations

import numpy as np
import pytest

from ntjax.data.pack import first_fit


@pytest.mark.parametrize(
    ("lengths", "capacity", "bins"),
    [
        ([], 10, []),
        ([10], 10, [[0]]),
        ([6, 5, 4, 3, 2], 10, [[0, 2], [1, 3, 4]]),  # 4 fits beside 6; 3 and 2 only beside 5
        ([4, 7, 3, 3, 3], 10, [[0, 2, 3], [1, 4]]),  # the first with room, not the fullest
        ([9, 9, 1, 1, 1], 10, [[0, 2], [1, 3], [4]]),
        ([1, 1, 1, 1], 2, [[0, 1], [2, 3]]),
    ],
)
def test_by_hand(lengths, capacity, bins):
    assert first_fit(lengths, capacity) == bins


def naive(lengths, capacity):
    bins: list[list[int]] = []
    for row, length in enumerate(lengths):
        for one in bins:
            if sum(lengths[other] for other in one) + length <= capacity:
                one.append(row)
                break
        else:
            bins.append([row])
    return bins


@pytest.mark.parametrize("seed", range(5))
def test_is_the_definition_of_first_fit(seed):
    lengths = np.random.default_rng(seed).integers(1, 65, 200).tolist()
    assert first_fit(lengths, 64) == naive(lengths, 64)


def test_every_row_once_and_no_bin_too_full():
    lengths = np.random.default_rng(0).integers(1, 1500, 20_000)
    bins = first_fit(lengths.tolist(), 2048)
    assert sorted(row for one in bins for row in one) == list(range(20_000))
    assert max(lengths[one].sum() for one in bins) <= 2048
    assert len(bins) < 1.05 * lengths.sum() / 2048


def test_a_row_longer_than_the_capacity_is_our_bug():
    with pytest.raises(AssertionError, match="11 tokens"):
        first_fit([3, 11], 10)
