"""Canonical rows to tokens and masks.

Token ids and masks of prompt/completion rows are those of TRL 1.16 (`SFTTrainer._prepare_dataset`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ntjax.data.batch import Example
from ntjax.data.chat import Canonical, canonical, check_layout, formatted
from ntjax.data.encoded import Encoded, gather
from ntjax.data.files import Row, Rows
from ntjax.data.pictures import Picture, Vision
from ntjax.data.placeholders import Placing, borders, expanded
from ntjax.data.spans import Tokenizer, marks_assistant, rendered, spans, token_mask
from ntjax.errors import BadData, ConfigError

if TYPE_CHECKING:
    from ntjax.config import DatasetConfig
    from ntjax.data.loader import Examples


@dataclass(frozen=True)
class SftEncoder:
    """row, place -> examples: one, or as many as `formatting_func` makes of the row.

    `vision` is that of a model which can see images.
    """

    tokenizer: Tokenizer
    fields: DatasetConfig
    max_length: int
    whole_pairs: bool = False  # learn prompts as well as completions
    whole_messages: bool = False  # learn every turn of messages
    formatting_func: Callable[[Row], Any] | None = None
    vision: Vision | None = None

    def __call__(self, row: Row, where: str) -> list[Example]:
        chat = self.tokenizer.chat_template is not None
        function = self.formatting_func
        rows = [row] if function is None else formatted(row, function, where, self.fields.text_field)
        shaped = (canonical(one, self.fields, where, chat=chat, placing=self._placing) for one in rows)
        return [self._encode(one, where) for one in shaped]

    @cached_property
    def _placing(self) -> Placing:
        return Placing.of(self.vision, self.tokenizer, self.fields)

    def _encode(self, row: Canonical, where: str) -> Example:
        whole = self.whole_messages if "messages" in row else self.whole_pairs
        return encode_sft(
            row,
            self.tokenizer,
            max_length=self.max_length,
            train_on_prompt=whole,
            where=where,
            vision=self.vision,
        )


def encode_sft_rows(rows: Rows, encoder: SftEncoder, **options: Any) -> Encoded:
    """Every row's examples; options and errors are `gather`'s, and InputMissing for columns of no known layout."""
    if encoder.formatting_func is None:
        with suppress(BadData):  # a first row that can't be read is counted with the others
            check_layout(rows[0], encoder.fields, rows.where(0))
    return gather(rows, encoder, **options).encoded(encoder.vision)


def encode_sft(
    row: Canonical,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    train_on_prompt: bool = False,
    where: str = "row",
    vision: Vision | None = None,
) -> Example:
    """Tokens of a canonical row and which of them are learned, the first `max_length` of both; see `cut`.

    Text: all are learned, an end of sequence added where there is none. Prompt and completion: those after
    the longest prefix that the prompt's tokens share with the whole's; in conversations, the template's text
    after the last turn included. Messages: those of every assistant turn. With `train_on_prompt`, all. Those
    in place of a picture never are.
    """
    if "text" in row:
        tokens = _tokens(tokenizer, _closed(row["text"], tokenizer))
        mask = np.ones(len(tokens), np.bool_)
    elif "messages" in row:
        tokens, mask = _messages(row, tokenizer, where)
    else:
        tokens, mask = _completion(row, tokenizer, where)
    if train_on_prompt:
        mask = np.ones(len(tokens), np.bool_)
    return cut(tokens, mask, row.get("pictures", ()), max_length, vision, where)


def cut(
    tokens: Sequence[int],
    mask: np.ndarray,
    pictures: tuple[Picture, ...],
    max_length: int,
    vision: Vision | None,
    where: str,
    *,
    keep_end: bool = False,
) -> Example:
    """The first `max_length` tokens, or with `keep_end` the last, after pictures have taken their places in them.

    A picture is kept whole or not at all: where one would be cut, less than `max_length` is kept.
    """
    found, mask = expanded(tokens, mask, pictures, vision, where)
    first = max(0, len(found) - max_length) if keep_end else 0
    end = min(first + max_length, len(found))
    if vision is not None and pictures:
        places = borders(found, pictures, vision)
        first = next((b for a, b in places if a < first < b), first)
        end = next((a for a, b in places if a < end < b), end)
        pictures = tuple(p for p, (a, b) in zip(pictures, places, strict=True) if first <= a and b <= end)
    learned = mask[first:end]
    learned[:1] = False  # nothing predicts the first token
    return Example(found[first:end], learned, end - first < len(found), pictures)


def learned_stops(encoded: Examples, tokenizer: Tokenizer, rows: int = 100) -> list[int] | None:
    """The special tokens that the first rows learn as their last one; None if all of these rows are cut off.

    Of pairs, what was chosen is looked at.
    """
    examples = [encoded.example(i).documents[0] for i in range(min(rows, len(encoded)))]
    whole = [example for example in examples if not example.truncated]
    special = tokenizer.all_special_ids
    learned = [example.tokens[example.mask & np.isin(example.tokens, special)] for example in whole]
    return sorted({int(ends[-1]) for ends in learned if len(ends)}) if whole else None


def check_stop_token(encoded: Examples, tokenizer: Tokenizer) -> str | None:
    """A warning when none of the first rows learns to stop, or to stop with another token than eos."""
    stops = learned_stops(encoded, tokenizer)
    if stops is None or tokenizer.eos_token_id in stops:
        return None
    if stops:
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(stops)))
        return f"turns end with {names}, but the tokenizer's eos_token is {tokenizer.eos_token!r}"
    return "no stop token is learned in the first whole rows: the model will not learn to stop"


def _messages(row: Canonical, tokenizer: Tokenizer, where: str) -> tuple[list[int], np.ndarray]:
    turns, options = row["messages"], _options(row)
    answers = [k for k, turn in enumerate(turns) if turn["role"] == "assistant"]
    if answers == [len(turns) - 1] and not marks_assistant(tokenizer, options):
        return _completion({**row, "prompt": turns[:-1], "completion": turns[-1:]}, tokenizer, where)
    text = rendered(tokenizer, turns, options, where)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.asarray(encoding["offset_mapping"], np.int64).reshape(-1, 2)
    return encoding["input_ids"], token_mask(offsets, spans(tokenizer, text, turns, options, where))


def _completion(row: Canonical, tokenizer: Tokenizer, where: str) -> tuple[list[int], np.ndarray]:
    whole = answered(row, row["completion"], tokenizer, where)
    return whole, np.arange(len(whole)) >= agreeing(asked(row, tokenizer, where), whole)


def asked(row: Canonical, tokenizer: Tokenizer, where: str) -> list[int]:
    """Tokens of a row's prompt: its text, or its turns and the header of the answer."""
    if isinstance(row["prompt"], str):
        return _tokens(tokenizer, row["prompt"])
    text = rendered(tokenizer, row["prompt"], _options(row), where, ask=True)
    return _tokens(tokenizer, text, special=False)


def answered(row: Canonical, answer: Any, tokenizer: Tokenizer, where: str) -> list[int]:
    """Tokens of a row's prompt and an answer to it; text ends with the end of sequence."""
    if isinstance(answer, str):
        return _tokens(tokenizer, row["prompt"] + _closed(answer, tokenizer))
    text = rendered(tokenizer, [*row["prompt"], *answer], _options(row), where)
    return _tokens(tokenizer, text, special=False)


def agreeing(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _tokens(tokenizer: Tokenizer, text: str, special: bool = True) -> list[int]:
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def _closed(text: str, tokenizer: Tokenizer) -> str:
    """The text with the end of sequence at its end."""
    if tokenizer.eos_token is None:
        raise ConfigError(
            f"the tokenizer {tokenizer.name_or_path or 'of the model'} has no eos_token, so no row can end",
            fix="set eos_token in its tokenizer_config.json",
        )
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token


def _options(row: Canonical) -> dict[str, Any]:
    """What a row passes to the chat template."""
    return {"tools": row.get("tools"), **row.get("chat_template_kwargs", {})}
