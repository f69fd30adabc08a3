"""Curves of bounded size, however long a log is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

POINTS = 2000  # of a curve; a screen is no wider


class Point(NamedTuple):
    """A metric at a step; None is a value that wasn't finite."""

    step: int
    value: float | None


@dataclass
class Series:
    """What a log says of one metric, in the order of steps: of many points, those that show.

    `gaps` counts the values that were not finite, `count` all of them.
    """

    points: list[Point] = field(default_factory=list)
    count: int = 0
    gaps: int = 0

    def add(self, step: int, value: float | None) -> None:
        """Takes the next value, None or a number, finite or not."""
        value = value if value is not None and math.isfinite(value) else None
        self.points.append(Point(step, value))
        self.count += 1
        self.gaps += value is None
        if len(self.points) > 4 * POINTS:
            self.points = thinned(self.points, 2 * POINTS)

    @property
    def last(self) -> float | None:
        """The newest finite value."""
        return next((value for _, value in reversed(self.points) if value is not None), None)


def thinned(points: Sequence[Point], limit: int) -> list[Point]:
    """At most `limit` of the points, six or more: the first, the last, and of each stretch of steps between them the
    lowest, the highest and a gap."""
    if len(points) <= limit:
        return list(points)
    first, *between, last = points
    stretch = (last.step - first.step + 1) / ((limit - 2) // 3)
    groups = groupby(between, key=lambda point: int((point.step - first.step) / stretch))
    return [first, *(point for _, group in groups for point in _extremes(group)), last]


def _extremes(points: Iterable[Point]) -> list[Point]:
    some = list(points)
    finite = [(point.value, place) for place, point in enumerate(some) if point.value is not None]
    gap = next(([place] for place, point in enumerate(some) if point.value is None), [])
    kept = {place for _, place in (min(finite), max(finite))} if finite else set()
    return [some[place] for place in sorted(kept.union(gap))]
