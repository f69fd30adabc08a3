"""Completions handed to the rewards while others are still drawn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ntjax.drawing import in_parts
from ntjax.sampler import Completion, Group


def drawn(order: list[int], said: list[str]) -> Iterator[Group]:
    """Two completions of each prompt, in the order in which they become complete."""
    for place in order:
        said.append(f"drawn {place}")
        yield place, [Completion([place], [0.0], "stop"), Completion([place], [0.0], "length")]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ([0, 1, 2, 3, 4], "drawn 0, drawn 1, part 0 1, drawn 2, drawn 3, part 2 3, drawn 4, part 4"),
        ([2, 3, 1, 0, 4], "drawn 2, drawn 3, drawn 1, drawn 0, part 0 1, part 2 3, drawn 4, part 4"),
        ([1, 4, 0, 3, 2], "drawn 1, drawn 4, drawn 0, part 0 1, drawn 3, drawn 2, part 2 3, part 4"),
    ],
)
def test_a_part_is_handed_out_when_it_and_those_before_it_are_complete(
    order: list[int], expected: str
) -> None:
    said: list[str] = []
    for places, completions in in_parts(drawn(order, said), 5, 2):
        said.append(f"part {' '.join(map(str, places))}")
        assert [each.tokens for each in completions] == [[place] for place in places for _ in range(2)]
    assert ", ".join(said) == expected
