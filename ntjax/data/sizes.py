"""The few sizes that rows of tokens come in: each shape of a batch is a program to compile."""

from __future__ import annotations

from collections.abc import Iterator

SHORTEST = 64  # tokens; below this a step costs its overhead, and one more compilation buys nothing
# Parts that a doubling is divided in. A step of long rows takes a CPU seconds and compiling it no longer, so that less
# padding is soon worth another program; accelerators compile for minutes what they do in a second.
PARTS = {"cpu": 8}


def sizes(least: int, most: int, first: int = SHORTEST, parts: int = 1) -> Iterator[int]:
    """Those that hold `least`, up to `most` and that as the last: `first` and its doublings, with `parts` - 1 sizes
    evenly between two of them, or fewer, so that none is nearer than `first` to the next."""
    assert least <= most, f"{least} tokens in a row of at most {most}"
    size = first
    while size < most:
        yield from (
            each for each in range(size, min(2 * size, most), max(first, size // parts)) if each >= least
        )
        size *= 2
    yield most


def rounded(length: int, most: int) -> int:
    """The size of a row of `length` tokens, at most `most`: 64, 128, 256, ... and `most`."""
    return next(sizes(min(length, most), most))
