"""The pictures of a batch's rows: units in pools, one for each group of rows, and the places of their features.

How much room the pools of a step have is told by the sizes of all its pictures, so that every process makes arrays of
the same shapes; decoded are those of a process's own rows alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np

from ntjax.data.pictures import Picture, Vision
from ntjax.marks import UNIT, WORD

DECODERS = min(8, os.cpu_count() or 1)  # threads


class Document(Protocol):
    """Tokens [t], and the pictures that their first placeholders stand for."""

    @property
    def tokens(self) -> np.ndarray: ...

    @property
    def pictures(self) -> Sequence[Picture]: ...


Line = Sequence[Document]  # documents one after another; a pair's row is two lines, which are neighbours


class Pooling(Vision, Protocol):
    """A `Vision` that knows the shapes of its units before there are any."""

    def blank(self, features: int) -> dict[str, np.ndarray]:
        """One unit with nothing in it and room for so many features: name -> [1, ...]."""


class Room(NamedTuple):
    """What the pools of a step have room for: units of a group, and features of a unit."""

    units: int
    features: int


def room(batches: Iterable[Sequence[Line]], groups: int, vision: Vision) -> Room | None:
    """The room that batches take whose lines, those of all processes, are in so many groups of neighbours; None where
    no line has a picture."""
    units = features = 0
    for lines in batches:
        for group in _split(lines, groups):
            shapes = [vision.shape(picture.size) for picture in _shown(group)]
            units = max(units, sum(count for count, _ in shapes))
            features = max(features, *(size for _, size in shapes), 0)
    return Room(stepped(units), features) if units else None


def pooled(
    lines: Sequence[Line], length: int, groups: int, space: Room, vision: Pooling
) -> dict[str, np.ndarray]:
    """The arrays of lines of `length` tokens in so many groups; what a group shows twice is in its pool once.

    `picture_index` [lines, length] int32: of each token u * space.features + f, for feature f of unit u of the group's
    pool, or the marker that `vision` has for it, or `WORD`. `places` [lines, length, 3] int32 where `vision` has them.
    `pictures.NAME` [groups, space.units, ...]: the units, in the order of lines and of their pictures.
    """
    index = np.full((len(lines), length), WORD, np.int32)
    places = np.zeros((len(lines), length, 3), np.int32)
    first = [_first(group, vision) for group in _split(lines, groups)]
    for number, line in enumerate(lines):
        known, start = first[number * groups // len(lines)], 0
        for document in line:
            span = slice(start, start + len(document.tokens))
            index[number, span] = _index(document, known, space.features, vision)
            at = vision.places(document.tokens, document.pictures)
            places[number, span] = 0 if at is None else at
            start = span.stop
    found = {"picture_index": index} | _units(first, space, vision)
    has_places = vision.places(np.zeros(0, np.int32), ()) is not None
    return {**found, "places": places} if has_places else found


def stepped(count: int) -> int:
    """`count` or the next above it of 1, 2, 3, 4, 6, 8, 12, 16, ...: few shapes, so few compilations."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power


def _split(lines: Sequence[Line], groups: int) -> list[Sequence[Line]]:
    size, rest = divmod(len(lines), groups)
    assert rest == 0, f"{len(lines)} lines aren't {groups} groups"
    return [lines[number * size : (number + 1) * size] for number in range(groups)]


def _shown(lines: Sequence[Line]) -> list[Picture]:
    """The pictures of a group, each once."""
    return list(
        dict.fromkeys(picture for line in lines for document in line for picture in document.pictures)
    )


def _first(lines: Sequence[Line], vision: Vision) -> dict[Picture, int]:
    """The first unit of each picture of a group."""
    shown = _shown(lines)
    counts = [vision.shape(picture.size)[0] for picture in shown]
    return dict(zip(shown, np.cumsum([0, *counts]).tolist(), strict=False))


def _index(document: Document, first: dict[Picture, int], features: int, vision: Vision) -> np.ndarray:
    """[t]: what stands for each token of a document. A model can draw the placeholder too: behind the pictures'."""
    index = np.full(len(document.tokens), WORD, np.int32)
    parts = [index[:0]]
    for picture in document.pictures:
        unit, feature = vision.index(picture.size)
        parts.append(np.where(unit < 0, unit, (first[picture] + unit) * features + feature))
    numbers = np.concatenate(parts)
    at = np.flatnonzero(document.tokens == vision.image_id)
    assert len(at) >= len(numbers), f"{len(at)} placeholders for {len(numbers)} tokens of pictures"
    index[at[: len(numbers)]] = numbers
    return index


def _units(first: Sequence[dict[Picture, int]], space: Room, vision: Pooling) -> dict[str, np.ndarray]:
    """The pools [groups, units, ...] of groups whose pictures have their first units there."""
    blank = vision.blank(space.features)
    shape = len(first), space.units
    pools = {name: np.zeros((*shape, *array.shape[1:]), array.dtype) for name, array in blank.items()}
    at = list(
        chain.from_iterable(((group, *item) for item in known.items()) for group, known in enumerate(first))
    )
    with ThreadPoolExecutor(DECODERS) as threads:
        for (group, _, unit), made in zip(at, threads.map(vision.units, (p for _, p, _ in at)), strict=True):
            for name, array in made.items():
                pools[name][group, unit : unit + len(array), : array.shape[1]] = array
    return {UNIT + name: pool for name, pool in pools.items()}
