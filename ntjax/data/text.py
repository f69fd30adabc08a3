"""Rows of raw text to tokens, all of them learned."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ntjax.data.batch import Example
from ntjax.data.chat import formatted, missing_columns, string
from ntjax.data.encode import encode_sft
from ntjax.data.encoded import Encoded, encode_rows
from ntjax.data.files import Row, Rows
from ntjax.data.pictures import Vision
from ntjax.data.spans import Tokenizer
from ntjax.errors import BadData

if TYPE_CHECKING:
    from ntjax.config import DatasetConfig


@dataclass(frozen=True)
class TextEncoder:
    """row, place -> documents: one, or as many as `formatting_func` makes of the row.

    A document is the text's tokens, with those that the tokenizer puts around a text, and an end of sequence.
    `max_length` cuts its end off; None leaves it whole. To a model with `vision` a text can't show an image: the
    token that stands for one is refused.
    """

    tokenizer: Tokenizer
    fields: DatasetConfig
    max_length: int | None = None
    formatting_func: Callable[[Row], Any] | None = None
    vision: Vision | None = None

    @property
    def column(self) -> str:
        """The column that holds the text."""
        return self.fields.text_field or "text"

    def __call__(self, row: Row, where: str) -> list[Example]:
        function = self.formatting_func
        rows = [row] if function is None else formatted(row, function, where, self.column)
        return [self._encode(one, where) for one in rows]

    def check(self, row: Row, where: str) -> None:
        """Raises InputMissing, with the columns there are, when the first row has no text."""
        if self.formatting_func is None and self.column not in row:
            raise missing_columns(
                row, [self.column], where, fix="name the column of the text with text_field"
            )

    def _encode(self, row: Row, where: str) -> Example:
        if self.column not in row:
            raise BadData(
                f"no column {self.column!r}; there is {', '.join(map(repr, row)) or 'nothing'}", where=where
            )
        text = string(row[self.column], f"{where} {self.column}")
        length = sys.maxsize if self.max_length is None else self.max_length
        return encode_sft({"text": text}, self.tokenizer, max_length=length, where=where, vision=self.vision)


def encode_text_rows(rows: Rows, encoder: TextEncoder, **options: Any) -> Encoded:
    """`encode_rows` for text; raises InputMissing where the column isn't there."""
    with suppress(BadData):  # a first row that can't be read is counted with the others
        encoder.check(rows[0], rows.where(0))
    return encode_rows(rows, encoder, **options)
