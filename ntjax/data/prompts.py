"""Prompts: the rows of stages that draw the answers themselves.

A row's prompt is text, or messages that end with someone else's turn than the assistant's; its other columns go to
the rewards as they are. Token ids are those of TRL 1.16 (`GRPOTrainer._tokenize_prompts`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ntjax.data.batch import Example, collate
from ntjax.data.chat import (
    TALKS,
    Message,
    carried,
    check_order,
    formatted,
    messages,
    missing_columns,
    string,
    system_turn,
)
from ntjax.data.encode import asked
from ntjax.data.encoded import gather
from ntjax.data.files import Row, Rows
from ntjax.data.pictures import Picture, Vision, counted
from ntjax.data.placeholders import Found, Placing, expanded
from ntjax.data.spans import Tokenizer
from ntjax.errors import BadData

if TYPE_CHECKING:
    from ntjax.config import DatasetConfig

Said = str | list[Message]
OWN = {"prompt", "completion", "completion_ids"}  # what rewards are given under these names isn't the row's


@dataclass(frozen=True)
class Prompt:
    """A prompt as tokens and as rewards are given it (text or messages, see `Placing.told`), and the row's other
    columns.

    `pictures` are those that the tokens are expanded by, in order.
    """

    tokens: Sequence[int]
    said: Said = ""
    columns: Mapping[str, Any] = ()  # type: ignore[assignment]
    pictures: tuple[Picture, ...] = ()
    too_long: bool = False

    @property
    def documents(self) -> tuple[Example, ...]:
        """The tokens, all of them looked at; none of a prompt that is too long."""
        tokens = np.asarray(self.tokens, np.int32)
        return (Example(tokens, np.full(len(tokens), not self.too_long), self.too_long, self.pictures),)


@dataclass(frozen=True, eq=False)
class Prompts:
    """The prompts of a data set. `read` rows were read; `dropped` prompts were too long, `bad` rows passed over.

    `image_id` is the token that stands for pictures.
    """

    kept: Sequence[Prompt]
    read: int
    dropped: int = 0
    bad: int = 0
    complaints: Sequence[str] = ()
    image_id: int = -1

    def __len__(self) -> int:
        return len(self.kept)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each prompt."""
        return np.array([len(prompt.tokens) for prompt in self.kept])

    @property
    def sizes(self) -> np.ndarray:
        """The same: a prompt is one document."""
        return self.lengths

    @cached_property
    def names(self) -> list[str]:
        """The columns that any row has, in the order in which they turn up."""
        return list(dict.fromkeys(name for prompt in self.kept for name in prompt.columns))

    def example(self, index: int) -> Example:
        """Prompt `index`; none of it is learned."""
        tokens = np.asarray(self.kept[index].tokens, np.int32)
        return Example(tokens, np.zeros(len(tokens), np.bool_), pictures=self.kept[index].pictures)

    def batch(
        self, slots: Sequence[Sequence[int]], length: int, documents: int, pad_id: int
    ) -> dict[str, np.ndarray]:
        """`collate` of the prompts of each slot."""
        return collate([[self.example(index) for index in slot] for slot in slots], length, pad_id)

    def columns(self, numbers: Sequence[int]) -> dict[str, list[Any]]:
        """The values of every column in the rows `numbers`, None where a row hasn't got it."""
        rows = [self.kept[number].columns for number in numbers]
        return {name: [row.get(name) for row in rows] for name in self.names}

    def digest(self) -> str:
        """32 hex digits that change when any token, picture or column does."""
        digest = hashlib.blake2b(digest_size=16)
        for prompt in self.kept:
            digest.update(np.asarray(prompt.tokens, np.int32).tobytes())
            digest.update(b"".join(picture.digest() for picture in prompt.pictures))
            digest.update(json.dumps(dict(prompt.columns), sort_keys=True, default=_named).encode())
        return digest.hexdigest()

    def report(self) -> str:
        """What became of the rows, for people."""
        lengths = self.lengths
        notes = [(self.dropped, "longer than max_length dropped"), (self.bad, "bad rows passed over")]
        said = "; ".join(f"{count} {what}" for count, what in notes if count)
        first = f"{len(self)} prompts of {self.read} rows, {lengths.min()} to {lengths.max()} tokens"
        count = sum(len(prompt.pictures) for prompt in self.kept)
        shown = sum(list(prompt.tokens).count(self.image_id) for prompt in self.kept if prompt.pictures)
        seen = f"{counted(count, 'image')}, {counted(shown, 'image token')}" if count else ""
        return "\n".join(line for line in [first, seen, said, *self.complaints] if line)


@dataclass(frozen=True)
class PromptEncoder:
    """row, place -> its prompt, or those of what `formatting_func` makes of it.

    `template` is passed to the chat template with every row; `vision` is that of a model that can see images.
    """

    tokenizer: Tokenizer
    fields: DatasetConfig
    max_length: int
    formatting_func: Callable[[Row], Any] | None = None
    template: Mapping[str, Any] = ()  # type: ignore[assignment]
    vision: Vision | None = None

    def __call__(self, row: Row, where: str) -> list[Prompt]:
        function = self.formatting_func
        rows = [row] if function is None else formatted(row, function, where, "prompt")
        return [self._encode(one, where) for one in rows]

    def _encode(self, row: Row, where: str) -> Prompt:
        column = prompt_column(row, self.fields)
        if column is None:
            raise BadData(f"no prompt; columns: {', '.join(map(repr, row))}", where=where)
        said, asking, found = self._said(row, column, where)
        extra, pictures = carried(row, where), found.get("pictures", ())
        kwargs = {**dict(self.template), **extra.get("chat_template_kwargs", {})}
        tokens = asked({"prompt": asking, **extra, "chat_template_kwargs": kwargs}, self.tokenizer, where)
        if not tokens:
            raise BadData("an empty prompt has no token to go on from", where=f"{where} {column}")
        if self.vision is not None:
            tokens = expanded(tokens, np.zeros(len(tokens), np.bool_), pictures, self.vision, where)[
                0
            ].tolist()
        columns = {name: value for name, value in row.items() if name not in OWN}
        return Prompt(tokens, said, columns, pictures, too_long=len(tokens) > self.max_length)

    @cached_property
    def _placing(self) -> Placing:
        return Placing.of(self.vision, self.tokenizer, self.fields)

    def _said(self, row: Row, column: str, where: str) -> tuple[Said, Said, Found]:
        """The prompt for rewards, for the tokenizer, and its pictures."""
        place = f"{where} {column}"
        if not isinstance(row[column], list):
            text, found = self._placing.text(string(row[column], place), row, where)
            return text, text, found
        turns = [*system_turn(row), *messages(row[column], place)]
        check_order(turns, place)
        if turns[-1]["role"] == "assistant":
            raise BadData(
                "the last turn is the assistant's, which is what is to be drawn",
                where=place,
                fix="leave the last turn out, or give it in another column for the rewards",
            )
        turns, found = self._placing.turns(turns, row, where)
        return self._placing.told(turns), turns, found


def prompt_column(row: Mapping[str, Any], fields: DatasetConfig) -> str | None:
    """The column a row's prompt is in: the one that the config names, else "prompt", else a conversation."""
    named = fields.prompt_field or fields.messages_field
    wanted = (named,) if named else ("prompt", *TALKS)
    return next((column for column in wanted if column in row), None)


def encode_prompts(rows: Rows, encoder: PromptEncoder, **options: Any) -> Prompts:
    """Every prompt that isn't too long; options and errors are `gather`'s, and InputMissing for unknown columns."""
    if encoder.formatting_func is None:
        with suppress(BadData):  # a first row that can't be read is counted with the others
            row = rows[0]
            if prompt_column(row, encoder.fields) is None:
                fields = encoder.fields
                missing = [fields.prompt_field or fields.messages_field or "prompt"]
                raise missing_columns(row, missing, rows.where(0), fix="name it with prompt_field")
    made = gather(rows, encoder, too_long="the prompt is longer than max_length", **options)
    vision = encoder.vision
    image_id = -1 if vision is None else vision.image_id
    return Prompts(made.kept, made.read, made.empty, made.bad, made.complaints, image_id)


def _named(value: Any) -> str:
    """What JSON has no word for, in words that are the same in every process."""
    if isinstance(value, bytes):
        return hashlib.blake2b(value, digest_size=16).hexdigest()
    if hasattr(value, "tobytes"):  # an image or an array
        return f"{getattr(value, 'size', '')} {_named(value.tobytes())}"
    return repr(value)
