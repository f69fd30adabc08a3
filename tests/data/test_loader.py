"""The plan of steps, and the pipeline over it."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from ntjax.data.batch import Example, collate
from ntjax.data.loader import Plan, batches


class Numbered:
    """Row i is `lengths[i]` tokens, all of them i + 1."""

    def __init__(self, lengths):
        self.lengths = lengths

    def example(self, index):
        length = self.lengths[index]
        return Example(np.full(length, index + 1, np.int32), np.arange(length) > 0)

    def batch(self, slots, length, documents, pad_id):
        self.documents = documents
        return collate([[self.example(row) for row in slot] for slot in slots], length, pad_id)


LENGTHS = np.random.default_rng(0).integers(2, 100, 53)


def plan(**options):
    return Plan(
        **{"lengths": LENGTHS, "max_length": 128, "rows_per_microbatch": 4, "accumulation": 2, **options}
    )


def rows_of(one, step):
    return [row for microbatch in one.slots(step) for slot in microbatch for row in slot]


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 7),  # ceil(53 / 8)
        ({"epochs": 3.0}, 21),
        ({"epochs": 0.5}, 4),  # ceil(3.5)
        ({"epochs": 3.0, "max_steps": 5}, 5),
        ({"max_steps": 30}, 30),
        ({"rows_per_microbatch": 100}, 1),
    ],
)
def test_steps_are_counted_as_in_transformers(options, steps):
    assert plan(**options).steps == steps


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_is_every_row_once(packing, shuffle):
    one = plan(packing=packing, shuffle=shuffle, epochs=2.0)
    for epoch in range(2):
        steps = range(epoch * one.steps_per_epoch, (epoch + 1) * one.steps_per_epoch)
        assert sorted(row for step in steps for row in rows_of(one, step)) == list(range(53))


def test_without_shuffle_rows_come_in_file_order():
    one = plan(shuffle=False, epochs=2.0)
    assert [row for step in range(14) for row in rows_of(one, step)] == [*range(53), *range(53)]


def test_with_shuffle_each_epoch_and_each_seed_has_its_own_order():
    def order(epoch, seed):
        one = plan(seed=seed, epochs=2.0)
        return [row for step in range(7 * epoch, 7 * epoch + 7) for row in rows_of(one, step)]

    orders = [order(0, 1), order(1, 1), order(0, 2)]
    assert all(a != b for a, b in itertools.combinations([*orders, list(range(53))], 2))
    assert order(1, 1) == orders[1]


def test_the_last_step_of_an_epoch_is_filled_with_empty_slots():
    """53 rows are 6 steps of 8 and one of 5: a full microbatch, then one row and three empty slots."""
    last = plan(shuffle=False, epochs=2.0).slots(6)
    assert last == [[[48], [49], [50], [51]], [[52], [], [], []]]


def test_packs_keep_to_the_length_and_are_fewer_than_rows():
    one = plan(packing=True, epochs=1.0)
    slots = [slot for step in range(one.steps) for microbatch in one.slots(step) for slot in microbatch]
    assert max(LENGTHS[slot].sum() for slot in slots) <= 128
    assert len(one.packs) < 40


def test_unshuffled_packs_are_first_fit_in_file_order():
    one = Plan(np.array([6, 5, 4, 3, 2]), 10, rows_per_microbatch=2, shuffle=False, packing=True)
    assert one.slots(0) == [[[0, 2], [1, 3, 4]]]


@pytest.mark.parametrize(
    ("lengths", "length"),
    [([2, 3], 64), ([64, 1], 64), ([65], 128), ([300], 512), ([513], 700), ([700], 700)],
)
def test_steps_take_the_smallest_bucket_that_holds_their_rows(lengths, length):
    assert Plan(np.array(lengths), 700, rows_per_microbatch=2).length(0) == length


@pytest.mark.parametrize(("packing", "documents"), [(False, 1), (True, 3)])
def test_batches_are_told_the_most_rows_of_a_slot(packing, documents):
    """5 + 4 and 2 + 2 + 2 fit in 9, so the second slot has three."""
    one = Plan(np.array([5, 4, 2, 2, 2]), 9, rows_per_microbatch=1, shuffle=False, packing=packing)
    rows = Numbered(one.lengths)
    next(batches(one, rows, pad_id=0, threads=0))
    assert rows.documents == one.documents == documents


def test_packed_steps_have_one_length():
    assert {plan(packing=True).length(step) for step in range(3)} == {128}


def test_batches_have_the_planned_shape_and_rows():
    one = plan(shuffle=False)
    first = next(batches(one, Numbered(LENGTHS), pad_id=0))
    assert {name: array.shape for name, array in first.items()} == dict.fromkeys(
        ("tokens", "mask", "segments", "positions"), (2, 4, one.length(0))
    )
    assert first["tokens"][:, :, 0].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert first["segments"].astype(bool).sum(-1).ravel().tolist() == LENGTHS[:8].tolist()


@pytest.mark.parametrize("packing", [False, True])
def test_resume_is_exact_at_every_step(packing):
    """The position goes through JSON, as in a checkpoint, and is one integer."""
    one = plan(packing=packing, max_steps=30)
    whole = list(batches(one, Numbered(LENGTHS), pad_id=0))
    assert len(whole) == 30
    for stop in range(30):
        first = batches(one, Numbered(LENGTHS), pad_id=0, threads=0)
        for _ in itertools.islice(first, stop):
            pass
        state = json.loads(json.dumps(first.get_state()))
        assert state == {"next_index": stop}
        rest = batches(one, Numbered(LENGTHS), pad_id=0, start=state["next_index"], threads=0)
        assert same(next(rest), whole[stop])
    assert all(
        same(a, b) for a, b in zip(batches(one, Numbered(LENGTHS), 0, start=17), whole[17:], strict=True)
    )


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_batch_of_one(packing, count):
    one = plan(packing=packing, epochs=2.0)
    whole = batches(one, Numbered(LENGTHS), pad_id=0)
    shares = [
        batches(one, Numbered(LENGTHS), pad_id=0, process_index=p, process_count=count) for p in range(count)
    ]
    for expected, *parts in zip(whole, *shares, strict=True):
        joined = {name: np.concatenate([part[name] for part in parts], axis=1) for name in expected}
        assert same(joined, expected)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_threads_do_not_change_the_stream(threads):
    one = plan(epochs=2.0)
    expected = list(batches(one, Numbered(LENGTHS), pad_id=0, threads=0))
    assert all(
        same(a, b) for a, b in zip(batches(one, Numbered(LENGTHS), 0, threads=threads), expected, strict=True)
    )


FILLED = [(4, 1, 1), (4, 4, 1), (8, 4, 8), (16, 1, 4), (3, 2, 1), (1, 8, 1)]  # rows, accumulation, groups


@pytest.mark.parametrize(("rows", "accumulation", "groups"), FILLED)
def test_filled_steps_have_the_same_examples_in_fewer_rows(rows, accumulation, groups):
    lengths = np.clip(np.random.default_rng(3).lognormal(4.5, 0.8, 400), 2, 500).astype(int)
    options = dict(lengths=lengths, max_length=512, rows_per_microbatch=rows, accumulation=accumulation)
    apart, filled = plan(**options), plan(**options, fills=True, groups=groups)
    assert filled.steps == apart.steps
    areas, shapes = np.zeros(2), set()
    for step in range(apart.steps):
        given, laid = apart.laid(step), filled.laid(step)
        assert sorted(itertools.chain(*itertools.chain(*laid.slots))) == sorted(rows_of(apart, step))
        assert all(sum(lengths[row] for row in slot) <= laid.length for micro in laid.slots for slot in micro)
        assert max(len(slot) for micro in laid.slots for slot in micro) <= laid.documents
        count = len(laid.slots[0])
        assert all(len(micro) == count for micro in laid.slots)
        assert count % groups == 0
        assert len(laid.slots) <= accumulation
        assert count * laid.length <= rows * given.length  # a microbatch needs no more memory
        areas += given.area, laid.area
        shapes.add((len(laid.slots), count, laid.length))
    assert areas[1] < 0.9 * areas[0] or rows * accumulation == groups
    assert len(shapes) <= 20


def test_a_step_is_laid_in_the_same_way_every_time():
    one, other = (plan(fills=True, epochs=3.0) for _ in range(2))
    assert [one.laid(step) for step in range(one.steps)] == [other.laid(step) for step in range(one.steps)]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_filled_batches(count):
    one, rows = plan(fills=True, groups=4), Numbered(LENGTHS)
    whole = list(batches(one, rows, pad_id=0))
    parts = [
        list(batches(one, rows, pad_id=0, process_index=index, process_count=count)) for index in range(count)
    ]
    assert len(whole) == one.steps
    for step, *shares in zip(whole, *parts, strict=True):
        assert same(step, {name: np.concatenate([share[name] for share in shares], axis=1) for name in step})
