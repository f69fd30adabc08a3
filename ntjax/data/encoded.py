"""All examples of a data set in a few flat arrays."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from ntjax.data.batch import Example, collate
from ntjax.data.files import Row, Rows
from ntjax.data.pictures import Picture, Vision, counted
from ntjax.errors import BadData, ConfigError

Progress = Callable[[int, int], None]  # (rows done, rows in all)

CHUNK = 256  # rows sent to a worker at once


class Documents(Protocol):
    """What a row becomes: an example, or a pair of them."""

    @property
    def documents(self) -> tuple[Example, ...]: ...


D = TypeVar("D", bound=Documents)
Encode = Callable[[Row, str], Sequence[D]]  # (row, its place) -> what it becomes
Outcome = list[D] | BadData


@dataclass(frozen=True, eq=False)
class Encoded:
    """Examples end to end: example i is `tokens[offsets[i]:offsets[i + 1]]` and the same of `mask`.

    `tokens` [total] int32, `mask` [total] bool, `offsets` [examples + 1] int64, `truncated` [examples] bool,
    `sources` [examples] int64, the row each comes from. `read` rows were read; `bad` were passed over, with
    the first of the complaints in `complaints`; `nothing_to_learn` examples were dropped. `pictures` are those
    of each example, nothing where no example has any; `image_id` is the token that stands for them.
    """

    tokens: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray
    truncated: np.ndarray
    sources: np.ndarray
    read: int
    nothing_to_learn: int = 0
    bad: int = 0
    complaints: Sequence[str] = field(default=())
    pictures: Sequence[tuple[Picture, ...]] = ()
    image_id: int = -1

    def __len__(self) -> int:
        return len(self.truncated)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return np.diff(self.offsets)

    @property
    def sizes(self) -> np.ndarray:
        """The same: an example is one document."""
        return self.lengths

    def example(self, index: int) -> Example:
        """Example `index`, a view of the arrays."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        pictures = self.pictures[index] if self.pictures else ()
        return Example(self.tokens[span], self.mask[span], bool(self.truncated[index]), pictures)

    def batch(
        self, slots: Sequence[Sequence[int]], length: int, documents: int, pad_id: int
    ) -> dict[str, np.ndarray]:
        """`collate` of the examples of each slot."""
        return collate([[self.example(index) for index in slot] for slot in slots], length, pad_id)

    def digest(self) -> str:
        """32 hex digits that change when any token, mask, border or picture does."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.offsets, self.tokens, self.mask):
            digest.update(np.ascontiguousarray(array).data)
        known: dict[Picture, bytes] = {}  # both documents of a pair show the same
        for number, pictures in enumerate(self.pictures):
            for picture in pictures:
                known[picture] = known.get(picture) or picture.digest()
                digest.update(number.to_bytes(8, "little") + known[picture])
        return digest.hexdigest()

    def seen(self, sharing: int = 1) -> str:
        """How many pictures there are, each shown by so many examples, and their tokens; "" for text alone."""
        count = sum(map(len, self.pictures)) // sharing
        tokens = int((self.tokens == self.image_id).sum())
        return f"{counted(count, 'image')}, {counted(tokens, 'image token')}" if count else ""

    def report(self) -> str:
        """What became of the rows, for people."""
        learned, total = int(self.mask.sum()), len(self.tokens)
        share = f"{learned} of {total} tokens learned ({learned / total:.0%})"
        notes = [
            (int(self.truncated.sum()), "truncated"),
            (self.nothing_to_learn, "dropped: nothing to learn"),
            (self.bad, "bad rows passed over"),
        ]
        said = "; ".join(f"{count} {what}" for count, what in notes if count)
        lines = [f"{len(self)} examples of {self.read} rows, {share}", self.seen(), said, *self.complaints]
        return "\n".join(line for line in lines if line)


@dataclass(frozen=True)
class Gathered(Generic[D]):
    """What rows became, in order, and the row each comes from.

    `bad` rows were passed over, with the first of the complaints; `empty` ones had nothing to learn.
    """

    kept: Sequence[D]
    sources: Sequence[int]
    read: int
    empty: int
    bad: int
    complaints: Sequence[str]

    def encoded(self, vision: Vision | None = None) -> Encoded:
        """All documents end to end."""
        pairs = zip(self.kept, self.sources, strict=True)
        documents = [(document, source) for one, source in pairs for document in one.documents]
        pictures = [document.pictures for document, _ in documents]
        return Encoded(
            tokens=np.concatenate([document.tokens for document, _ in documents]),
            mask=np.concatenate([document.mask for document, _ in documents]),
            offsets=np.cumsum([0, *(len(document.tokens) for document, _ in documents)], dtype=np.int64),
            truncated=np.array([document.truncated for document, _ in documents]),
            sources=np.array([source for _, source in documents], np.int64),
            read=self.read,
            nothing_to_learn=self.empty,
            bad=self.bad,
            complaints=self.complaints,
            pictures=pictures if any(pictures) else (),
            image_id=-1 if vision is None else vision.image_id,
        )


def encode_rows(rows: Rows, encode: Encode[Example], **options: Any) -> Encoded:
    """Every example of every row, in order; those with nothing to learn are dropped and counted.

    Options and errors are `gather`'s.
    """
    return gather(rows, encode, **options).encoded()


def gather(
    rows: Rows,
    encode: Encode[D],
    *,
    max_bad_rows: int = 0,
    vocab_size: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    too_long: str = "the prompt alone fills max_length",
) -> Gathered[D]:
    """Everything that every row becomes, but for what has nothing to learn in any of its documents.

    Raises BadData when more than `max_bad_rows` rows are bad, when more than half of the examples have
    nothing to learn (`too_long` says why where they were cut), and for a token the model, of `vocab_size`
    tokens, doesn't have. Above one, `workers` processes encode; the result is the same.
    """
    kept: list[D] = []
    sources: list[int] = []
    complaints: list[str] = []
    bad = empty = cut = 0
    for index, outcome in enumerate(_outcomes(rows, encode, workers or 1)):
        if isinstance(outcome, BadData):
            bad += 1
            complaints = [*complaints, str(outcome)][:5]
            if bad > max_bad_rows:
                raise _too_many_bad(outcome, bad, max_bad_rows, complaints)
            continue
        for one in outcome:
            if vocab_size is not None:
                for document in one.documents:
                    _check_ids(document, vocab_size, rows.where(index))
            if any(document.mask.any() for document in one.documents):
                kept.append(one)
                sources.append(index)
            else:
                empty += 1
                cut += any(document.truncated for document in one.documents)
        if progress is not None:
            progress(index + 1, len(rows))
    if 2 * empty > empty + len(kept) or not kept:
        raise _nothing(empty, len(kept), cut, too_long)
    return Gathered(kept, sources, len(rows), empty, bad, complaints)


def _too_many_bad(last: BadData, bad: int, allowed: int, complaints: Sequence[str]) -> BadData:
    if not allowed:
        return last
    shown = "".join(f"\n  {complaint}" for complaint in complaints)
    return BadData(
        f"{bad} bad rows, and max_bad_rows is {allowed}:{shown}", fix="correct them or raise max_bad_rows"
    )


def _nothing(empty: int, kept: int, cut: int, too_long: str) -> BadData:
    why = f"; in {cut} of them {too_long}" if cut else ""
    return BadData(
        f"{empty} of {empty + kept} rows have nothing to learn{why}",
        fix="raise max_length"
        if cut
        else "look at the rows: none of them has an answer, or answers are empty",
    )


def _check_ids(example: Example, vocab_size: int, where: str) -> None:
    if len(example.tokens) and not 0 <= example.tokens.min() <= example.tokens.max() < vocab_size:
        wrong = next(int(token) for token in example.tokens if not 0 <= token < vocab_size)
        raise BadData(
            f"token {wrong} isn't one of the model's {vocab_size}",
            where=where,
            fix="use the tokenizer of this model",
        )


def _outcomes(rows: Rows, encode: Encode[D], workers: int) -> Iterator[Outcome[D]]:
    """What each row gives, in order."""
    if workers == 1:
        return (_outcome(rows, encode, index) for index in range(len(rows)))
    return _outcomes_of_workers(rows, encode, workers)


def _outcome(rows: Rows, encode: Encode[D], index: int) -> Outcome[D]:
    try:
        return list(encode(rows[index], rows.where(index)))
    except BadData as error:
        return error


def _outcomes_of_workers(rows: Rows, encode: Encode[D], workers: int) -> Iterator[Outcome[D]]:
    """The same from processes, started afresh: forking a process with accelerator threads can hang."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    try:
        shared = pickle.dumps((rows, encode))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"preprocessing_num_workers = {workers}, but this can't be sent to another process: {error}",
            fix="set preprocessing_num_workers = 1, or give formatting_func as an installed module:function",
        ) from error
    chunks = [range(first, min(first + CHUNK, len(rows))) for first in range(0, len(rows), CHUNK)]
    with ProcessPoolExecutor(workers, get_context("spawn"), _receive, (shared,)) as pool:
        yield from chain.from_iterable(pool.map(_chunk_outcomes, chunks))


_shared: tuple[Rows, Encode[Any]]  # in a worker: what it encodes, and how


def _receive(shared: bytes) -> None:
    global _shared
    _shared = pickle.loads(shared)


def _chunk_outcomes(chunk: range) -> list[Outcome[Any]]:
    rows, encode = _shared
    return [_outcome(rows, encode, index) for index in chunk]
