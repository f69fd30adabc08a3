"""Text read while it is trained on: one row of the data at a time, into rows of tokens that are always full.

The position in the data is that of the next unread token, so a run that is resumed passes over rows without
tokenising them and goes on in the middle of a document.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from grain.experimental import ThreadPrefetchDatasetIterator

from ntjax.data.batch import Example, collate
from ntjax.data.encoded import Encode
from ntjax.data.files import Row
from ntjax.errors import BadData

Lazy = tuple[Callable[[], Row], str]  # a row that is parsed when it is asked for, and its place
Source = Callable[[int], Iterator[Lazy]]  # the rows from row n on
Step = tuple[dict[str, np.ndarray], dict[str, int], int]

AHEAD = 2  # batches built before they are asked for

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """The next unread token: how often all data were read, the row, the token within the row.

    `bad` rows were passed over since the data were begun.
    """

    epoch: int = 0
    row: int = 0
    token: int = 0
    bad: int = 0


class Stream:
    """Endless (batch, position after it, tokens in it) from a source that is read again when it ends.

    A batch has `collate`'s arrays [accumulation, rows_per_microbatch / process_count, length]: all tokens end
    to end, cut into rows. A document that crosses the end of a row goes on in the next one as a document of
    its own, whose first token isn't learned. A position is a dict of integers; a `Stream` made with it goes
    on with the batch after. Every process reads everything, and takes its rows of each microbatch.

    Raises BadData when more than `max_bad_rows` rows of the source are bad, and for a source without text.
    """

    def __init__(
        self,
        source: Source,
        encode: Encode[Example],
        length: int,
        rows_per_microbatch: int,
        accumulation: int,
        pad_id: int,
        position: dict[str, int] | None = None,
        *,
        max_bad_rows: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        share, rest = divmod(rows_per_microbatch, process_count)
        assert rest == 0, f"{rows_per_microbatch} rows can't be shared by {process_count} processes"
        self.source, self.encode, self.length, self.pad_id = source, encode, length, pad_id
        self.rows, self.accumulation, self.max_bad_rows = rows_per_microbatch, accumulation, max_bad_rows
        self.mine = slice(process_index * share, (process_index + 1) * share)
        self.set_state(position or asdict(Position()))

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Step:
        rows = [[self._fill() for _ in range(self.rows)] for _ in range(self.accumulation)]
        parts = [collate(part[self.mine], self.length, self.pad_id) for part in rows]
        batch = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
        return batch, self.get_state(), self.accumulation * self.rows * self.length

    def get_state(self) -> dict[str, int]:
        """The position of the next unread token."""
        return asdict(self.position)

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to a position; the source is opened there."""
        self.position = Position(**state)
        self.documents: list[Example] = []  # unread ones of the row at `position`
        self.fruitful = self.position != replace(Position(), epoch=self.position.epoch)
        self.unread = self.source(self.position.row)
        self.skip = self.position.token

    def _fill(self) -> list[Example]:
        """The documents of a full row."""
        taken: list[Example] = []
        room = self.length
        while room:
            if not self.documents:
                self._read()
            first, *others = self.documents
            taken.append(Example(first.tokens[:room], first.mask[:room]))
            rest = Example(first.tokens[room:], first.mask[room:])
            room -= len(taken[-1].tokens)
            self._move(len(taken[-1].tokens), [rest, *others] if len(rest.tokens) else others)
        return taken

    def _move(self, count: int, documents: list[Example]) -> None:
        """`count` tokens are read, and `documents` are left of the row."""
        self.documents = documents
        if documents:
            self.position = replace(self.position, token=self.position.token + count)
        else:
            self.position = replace(self.position, row=self.position.row + 1, token=0)

    def _read(self) -> None:
        """The documents of the next row that has any."""
        while not self.documents:
            try:
                read, where = next(self.unread)
            except StopIteration:
                self._begin_again()
                continue
            try:
                made = [document for document in self.encode(read(), where) if document.mask.any()]
            except BadData as error:
                self._pass_over(error)
                made = []
            # After a resume, without what was read of this row before.
            made, self.skip = _without(made, self.skip), 0
            self._move(0, made)
            self.fruitful |= bool(made)

    def _begin_again(self) -> None:
        if not self.fruitful:
            raise BadData("there is no text in the data set")
        self.set_state(asdict(Position(epoch=self.position.epoch + 1)))

    def _pass_over(self, error: BadData) -> None:
        self.position = replace(self.position, bad=self.position.bad + 1)
        if self.position.bad > self.max_bad_rows:
            raise error
        log.warning("warning: bad row passed over: %s", error)


def ahead(stream: Stream) -> ThreadPrefetchDatasetIterator[Step]:
    """The same, made by a thread before it is asked for; its errors are raised where they would have been."""
    return ThreadPrefetchDatasetIterator(stream, AHEAD)


def _without(documents: list[Example], count: int) -> list[Example]:
    """What follows the first `count` tokens."""
    left: list[Any] = []
    for document in documents:
        if len(document.tokens) > count:
            left.append(Example(document.tokens[count:], document.mask[count:]))
        count = max(0, count - len(document.tokens))
    return left
