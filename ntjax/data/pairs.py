"""Preferences as tokens: pairs of documents, and all pairs of a data set in flat arrays.

Token ids and masks are those of TRL 1.16 (`DPOTrainer._prepare_dataset`, `RewardTrainer._prepare_dataset`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ntjax.data.batch import Example, Pair
from ntjax.data.branched import Branches, collate_branches
from ntjax.data.chat import Canonical, formatted
from ntjax.data.encode import agreeing, answered, asked, cut
from ntjax.data.encoded import Encoded, gather
from ntjax.data.files import Row, Rows
from ntjax.data.pictures import Vision
from ntjax.data.placeholders import Placing
from ntjax.data.preference import check_columns, preference, split_prompt
from ntjax.data.spans import Tokenizer
from ntjax.errors import BadData

if TYPE_CHECKING:
    from ntjax.config import DatasetConfig


@dataclass(frozen=True, eq=False)
class EncodedPairs:
    """Pairs: document 2k is what was chosen in pair k, document 2k + 1 what was rejected.

    `margin` [pairs] float32; `ref_logps` [pairs, 2] float32, the log-probabilities of both completions under
    the reference model. Either may be absent.
    """

    documents: Encoded
    margin: np.ndarray | None = None
    ref_logps: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.documents) // 2

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of the longer document of each pair."""
        return self.documents.lengths.reshape(-1, 2).max(axis=1)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Tokens of both documents of each pair."""
        return self.documents.lengths.reshape(-1, 2).sum(axis=1)

    @cached_property
    def in_common(self) -> np.ndarray:
        """Tokens that both documents of each pair begin with, before the first that is learned."""
        return np.array([_in_common(*self.example(index).documents) for index in range(len(self))], np.int64)

    @cached_property
    def joined_lengths(self) -> np.ndarray:
        """Tokens of the row that each pair takes in `joined`."""
        return self.sizes - np.maximum(self.in_common - 1, 0)

    def example(self, index: int) -> Pair:
        """Pair `index`, a view of the arrays."""
        chosen, rejected = self.documents.example(2 * index), self.documents.example(2 * index + 1)
        return Pair(chosen, rejected, None if self.margin is None else float(self.margin[index]))

    def batch(
        self, slots: Sequence[Sequence[int]], length: int, documents: int, pad_id: int
    ) -> dict[str, np.ndarray]:
        """Two rows for each slot, what was chosen and what was rejected, pair k of the slot segment k + 1 of both.

        `collate`'s arrays [batch, 2, length]; `pairs` [batch, documents] bool, which places hold a pair; where
        there are such, `margin` [batch, documents] and `ref_logps` [batch, 2, documents], 0 in empty places.
        """
        chosen, rejected = (
            self.documents.batch(
                [[2 * pair + side for pair in slot] for slot in slots], length, documents, pad_id
            )
            for side in (0, 1)
        )
        batch = {name: np.stack([chosen[name], rejected[name]], axis=1) for name in chosen}
        return batch | self._of_pairs(slots, documents)

    def joined(
        self, slots: Sequence[Sequence[int]], length: int, documents: int, pad_id: int
    ) -> dict[str, np.ndarray]:
        """One row for each slot, what both documents of a pair begin with in it once: of pair k of the slot that
        beginning is segment 3k + 1, what was chosen 3k + 2, what was rejected 3k + 3.

        `collate_branches`'s arrays [batch, 1, length], and those of pairs as in `batch`.
        """
        shared = [
            [Branches(self.example(pair).documents, self.in_common[pair]) for pair in slot] for slot in slots
        ]
        batch = {name: array[:, None] for name, array in collate_branches(shared, length, pad_id).items()}
        return batch | self._of_pairs(slots, documents)

    def _of_pairs(self, slots: Sequence[Sequence[int]], documents: int) -> dict[str, np.ndarray]:
        batch = {"pairs": np.array([[place < len(slot) for place in range(documents)] for slot in slots])}
        if self.margin is not None:
            batch["margin"] = _placed(self.margin, slots, documents)
        if self.ref_logps is not None:
            sides = [_placed(self.ref_logps[:, side], slots, documents) for side in (0, 1)]
            batch["ref_logps"] = np.stack(sides, axis=1)
        return batch

    def digest(self) -> str:
        """32 hex digits that change when any token, mask, border, picture or margin does."""
        digest = hashlib.blake2b(self.documents.digest().encode(), digest_size=16)
        if self.margin is not None:
            digest.update(self.margin.data)
        return digest.hexdigest()

    def report(self) -> str:
        """What became of the rows, for people."""
        told = self.documents
        learned, total = int(told.mask.sum()), len(told.tokens)
        alike = sum(
            np.array_equal(pair.chosen.tokens, pair.rejected.tokens)
            for pair in map(self.example, range(len(self)))
        )
        notes = [
            (int(told.truncated.reshape(-1, 2).any(axis=1).sum()), "truncated"),
            (told.nothing_to_learn, "dropped: too long for max_length"),
            (alike, "with the same tokens on both sides"),
            (told.bad, "bad rows passed over"),
        ]
        said = "; ".join(f"{count} {what}" for count, what in notes if count)
        share = f"{learned} of {total} tokens learned ({learned / total:.0%})"
        lines = [
            f"{len(self)} pairs of {told.read} rows, {share}",
            told.seen(sharing=2),
            said,
            *told.complaints,
        ]
        return "\n".join(line for line in lines if line)


@dataclass(frozen=True)
class PairEncoder:
    """row, place -> pairs: one, or as many as `formatting_func` makes of the row.

    `encode` is `encode_dpo` or `encode_reward` but for the row, the tokenizer, the place and `vision`, which is
    that of a model that can see images.
    """

    encode: Callable[..., Pair]
    tokenizer: Tokenizer
    fields: DatasetConfig
    formatting_func: Callable[[Row], Any] | None = None
    vision: Vision | None = None

    def __call__(self, row: Row, where: str) -> list[Pair]:
        function = self.formatting_func
        rows = [row] if function is None else formatted(row, function, where, self.fields.text_field)
        shaped = (preference(one, self.fields, where, self._placing) for one in rows)
        return [self.encode(one, self.tokenizer, where=where, vision=self.vision) for one in shaped]

    @cached_property
    def _placing(self) -> Placing:
        return Placing.of(self.vision, self.tokenizer, self.fields)


def encode_pairs(rows: Rows, encoder: PairEncoder, **options: Any) -> EncodedPairs:
    """Every pair of every row, in order; those with nothing to learn in either document are dropped.

    Options and errors are `gather`'s. Raises InputMissing where the columns aren't those of preferences, and
    BadData where some rows have a margin and others don't.
    """
    if encoder.formatting_func is None:
        with suppress(BadData):  # a first row that can't be read is counted with the others
            check_columns(rows[0], encoder.fields, rows.where(0))
    gathered = gather(rows, encoder, **options)
    margins = [pair.margin for pair in gathered.kept]
    if all(margin is None for margin in margins):
        return EncodedPairs(gathered.encoded(encoder.vision))
    if None in margins:
        place = rows.where(gathered.sources[margins.index(None)])
        raise BadData(
            "no margin, and other rows have one", where=place, fix="give every row a margin, or none"
        )
    return EncodedPairs(gathered.encoded(encoder.vision), np.array(margins, np.float32))


def encode_dpo(
    row: Canonical,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    keep_end: bool = False,
    where: str = "row",
    vision: Vision | None = None,
) -> Pair:
    """Prompt and answer, twice; what comes after the prompt that both share is learned.

    The first `max_length` tokens are kept, or with `keep_end` the last; see `cut`. Where that leaves one of the two a
    picture which the other has lost, they can't be compared, and nothing is learned.
    """
    row = split_prompt(row, where)
    prompt = asked(row, tokenizer, where)
    answers = [answered(row, row[side], tokenizer, where) for side in ("chosen", "rejected")]
    shared = min(agreeing(prompt, tokens) for tokens in answers)
    pictures = row.get("pictures", ())
    chosen, rejected = (
        cut(tokens, np.arange(len(tokens)) >= shared, pictures, max_length, vision, where, keep_end=keep_end)
        for tokens in answers
    )
    if chosen.pictures != rejected.pictures:
        chosen, rejected = (replace(side, mask=np.zeros_like(side.mask)) for side in (chosen, rejected))
    return Pair(chosen, rejected)


def encode_reward(
    row: Canonical,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    pad_id: int,
    where: str = "row",
    vision: Vision | None = None,
) -> Pair:
    """Both conversations whole, in each the mark on the token that is scored: the last that isn't the padding token.

    transformers' sequence classifiers score that one, also where documents end with the padding token. A cut
    conversation has no end to be judged at: a pair with an answer too long has no marks.
    """
    row = {"prompt": row["chosen"][:0], **row}
    documents = [answered(row, row[side], tokenizer, where) for side in ("chosen", "rejected")]
    pictures = row.get("pictures", ())
    sides = [
        cut(tokens, np.zeros(len(tokens), np.bool_), pictures, max_length, vision, where)
        for tokens in documents
    ]
    fits = not any(side.truncated for side in sides)
    chosen, rejected = (replace(side, mask=_last(side.tokens, pad_id) & fits) for side in sides)
    return Pair(chosen, rejected, row.get("margin"))


def _in_common(chosen: Example, rejected: Example) -> int:
    """Tokens that both begin with, before the first that is learned or scored in either."""
    count = min(_unlearned(chosen), _unlearned(rejected))
    differ = chosen.tokens[:count] != rejected.tokens[:count]
    return int(differ.argmax()) if differ.any() else count


def _unlearned(document: Example) -> int:
    return int(document.mask.argmax()) if document.mask.any() else len(document.tokens)


def _last(tokens: np.ndarray, pad: int) -> np.ndarray:
    """The mark on the last token that isn't padding, the first if all are."""
    return np.arange(len(tokens)) == max(np.flatnonzero(tokens != pad), default=0)


def _placed(values: np.ndarray, slots: Sequence[Sequence[int]], documents: int) -> np.ndarray:
    """[slots, documents] float32: the value of each pair at its place, 0 in the others."""
    placed = np.zeros((len(slots), documents), np.float32)
    for row, slot in enumerate(slots):
        placed[row, : len(slot)] = values[list(slot)]
    return placed
