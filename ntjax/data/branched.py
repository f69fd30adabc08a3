"""Documents that begin alike, their beginning once in a row.

The beginning is a segment of its own, and each document goes on from it as another, at the positions that it would have
anyway. The last token of what they have in common is repeated in each of them: its next token differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ntjax.data.batch import Example


class Branches(NamedTuple):
    """Documents, of which the first `common` tokens are the same, and none of these is learned."""

    documents: Sequence[Example]
    common: int

    @property
    def beginning(self) -> int:
        """Tokens that all documents go on from: those in common but the last."""
        return max(self.common - 1, 0)

    @property
    def size(self) -> int:
        """Tokens that they take in a row."""
        return self.beginning + sum(len(document.tokens) - self.beginning for document in self.documents)


def collate_branches(slots: Sequence[Sequence[Branches]], length: int, pad_id: int) -> dict[str, np.ndarray]:
    """`collate`'s arrays [batch, length] of documents that begin alike, and `prefixes` [batch, length] int32, the
    segment that a token goes on from, its own where there is none.

    Segments are numbered from 1 in every row: a beginning (of no tokens, maybe), its documents, the next beginning.
    """
    names = ("tokens", "segments", "positions", "prefixes")
    batch = {name: np.zeros((len(slots), length), np.int32) for name in names}
    batch["tokens"][:] = pad_id
    batch["mask"] = np.zeros((len(slots), length), np.bool_)
    for row, slot in enumerate(slots):
        start, segment = 0, 1
        for branches in slot:
            skipped, prefix = branches.beginning, segment
            parts = [branches.documents[0].tokens[:skipped]]
            parts += [document.tokens[skipped:] for document in branches.documents]
            for number, part in enumerate(parts):
                end = start + len(part)
                assert end <= length, f"slot {row}: {end} tokens in a row of {length}"
                at = (row, slice(start, end))
                batch["tokens"][at] = part
                batch["segments"][at] = segment
                batch["prefixes"][at] = prefix if skipped else segment
                batch["positions"][at] = np.arange(len(part)) + (skipped if number else 0)
                if number:
                    learned = branches.documents[number - 1].mask[skipped + 1 :]
                    batch["mask"][row, start + 1 : end] = learned
                start, segment = end, segment + 1
    return batch
