"""Examples to rectangular arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ntjax.data.pictures import Picture


@dataclass(frozen=True)
class Example:
    """A document as the loss sees it.

    `tokens` [t] int32; `mask` [t] bool, where `mask[i]` says that token i is learned, predicted from the
    tokens before it, so `mask[0]` is False; `truncated` says that its end was cut off. `pictures` are those
    whose tokens it has, in order.
    """

    tokens: np.ndarray
    mask: np.ndarray
    truncated: bool = False
    pictures: tuple[Picture, ...] = ()

    @property
    def documents(self) -> tuple[Example, ...]:
        """Itself; of a pair, both."""
        return (self,)


@dataclass(frozen=True)
class Pair:
    """Two documents of which the first is preferred; `margin`: by how much, where the data say."""

    chosen: Example
    rejected: Example
    margin: float | None = None

    @property
    def documents(self) -> tuple[Example, ...]:
        """What was chosen, then what was rejected."""
        return self.chosen, self.rejected


def collate(slots: Sequence[Sequence[Example]], length: int, pad_id: int) -> dict[str, np.ndarray]:
    """Each slot's documents one after another in a row of `length`, the rest of the row padding.

    `tokens` [batch, length] int32; `mask` [batch, length] bool; `segments` [batch, length] int32, 0 in
    padding, the documents of a row counted from 1; `positions` [batch, length] int32, from 0 in every
    document. An empty slot is a row of padding.
    """
    shape = (len(slots), length)
    batch = {
        "tokens": np.full(shape, pad_id, np.int32),
        "mask": np.zeros(shape, np.bool_),
        "segments": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
    }
    for row, documents in enumerate(slots):
        start = 0
        for segment, document in enumerate(documents, 1):
            end = start + len(document.tokens)
            assert end <= length, f"slot {row}: {end} tokens in a row of {length}"
            batch["tokens"][row, start:end] = document.tokens
            batch["mask"][row, start + 1 : end] = document.mask[1:]
            batch["segments"][row, start:end] = segment
            batch["positions"][row, start:end] = np.arange(end - start)
            start = end
    return batch
