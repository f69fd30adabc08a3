"""Canonical rows to tokens and masks.

Token ids and masks of prompt/completion rows are those of TRL 1.16 (`SFTTrainer._prepare_dataset`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ntjax.data.batch import Example
from ntjax.data.chat import Canonical, canonical, check_layout, formatted
from ntjax.data.encoded import Encoded, encode_rows
from ntjax.data.files import Row, Rows
from ntjax.data.spans import Tokenizer, marks_assistant, rendered, spans, token_mask
from ntjax.errors import BadData, ConfigError

if TYPE_CHECKING:
    from ntjax.config import DatasetConfig
    from ntjax.data.loader import Examples


@dataclass(frozen=True)
class SftEncoder:
    """row, place -> examples: one, or as many as `formatting_func` makes of the row."""

    tokenizer: Tokenizer
    fields: DatasetConfig
    max_length: int
    whole_pairs: bool = False  # learn prompts as well as completions
    whole_messages: bool = False  # learn every turn of messages
    formatting_func: Callable[[Row], Any] | None = None

    def __call__(self, row: Row, where: str) -> list[Example]:
        chat = self.tokenizer.chat_template is not None
        function = self.formatting_func
        rows = [row] if function is None else formatted(row, function, where, self.fields.text_field)
        return [self._encode(canonical(one, self.fields, where, chat=chat), where) for one in rows]

    def _encode(self, row: Canonical, where: str) -> Example:
        whole = self.whole_messages if "messages" in row else self.whole_pairs
        return encode_sft(row, self.tokenizer, max_length=self.max_length, train_on_prompt=whole, where=where)


def encode_sft_rows(rows: Rows, encoder: SftEncoder, **options: Any) -> Encoded:
    """`encode_rows` for SFT; raises InputMissing where the columns are of no known layout."""
    if encoder.formatting_func is None:
        with suppress(BadData):  # a first row that can't be read is counted with the others
            check_layout(rows[0], encoder.fields, rows.where(0))
    return encode_rows(rows, encoder, **options)


def encode_sft(
    row: Canonical,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    train_on_prompt: bool = False,
    where: str = "row",
) -> Example:
    """Tokens of a canonical row and which of them are learned, the first `max_length` of both.

    Text: all are learned, an end of sequence added where there is none. Prompt and completion: those after
    the longest prefix that the prompt's tokens share with the whole's; in conversations, the template's text
    after the last turn included. Messages: those of every assistant turn. With `train_on_prompt`, all.
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
    mask[:1] = False  # nothing predicts the first token
    return Example(np.asarray(tokens[:max_length], np.int32), mask[:max_length], len(tokens) > max_length)


def check_stop_token(encoded: Examples, tokenizer: Tokenizer, rows: int = 100) -> str | None:
    """A warning when none of the first rows learns to stop, or to stop with another token than eos.

    Of pairs, what was chosen is looked at.
    """
    examples = [encoded.example(i).documents[0] for i in range(min(rows, len(encoded)))]
    whole = [example for example in examples if not example.truncated]
    learned = {int(token) for example in whole for token in example.tokens[example.mask]}
    stops = sorted(learned & set(tokenizer.all_special_ids))
    if not whole or tokenizer.eos_token_id in learned:
        return None
    if stops:
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(stops)))
        return f"turns end with {names}, but the tokenizer's eos_token is {tokenizer.eos_token!r}"
    return f"no stop token is learned in the first {len(whole)} whole rows: the model will not learn to stop"


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
