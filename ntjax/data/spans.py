"""Which characters of a rendered conversation the assistant wrote.

The end of a turn counts as written: the model must learn to stop. So a turn is all the text that rendering
adds when the turn is added, after the header that asks for it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ntjax.data.chat import Message
from ntjax.errors import BadData, ConfigError

Span = tuple[int, int]
Tokenizer = Any  # a transformers.PreTrainedTokenizerFast


def rendered(
    tokenizer: Tokenizer,
    turns: Sequence[Message],
    options: Mapping[str, Any],
    where: str,
    *,
    ask: bool = False,
) -> str:
    """The text of `turns`; with `ask`, followed by the header of the assistant's next turn."""
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise ConfigError(
            f"the tokenizer {tokenizer.name_or_path or 'of the model'} has no chat template, and the data is "
            "conversations",
            where=where,
            fix="start from an instruct model, put a chat_template.jinja beside the tokenizer, "
            "or give rows of text or of prompt and completion text",
        )
    try:
        return tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=ask, **options
        )
    except TemplateError as error:
        raise BadData(f"the chat template refuses this conversation: {error}", where=where) from error


def marks_assistant(tokenizer: Tokenizer, options: Mapping[str, Any]) -> bool:
    """Whether the chat template says itself what the assistant wrote."""
    return (
        tokenizer.chat_template is not None
        and re.search(r"{%-?\s*generation\s*-?%}", tokenizer.get_chat_template(tools=options.get("tools")))
        is not None
    )


def spans(
    tokenizer: Tokenizer, text: str, turns: Sequence[Message], options: Mapping[str, Any], where: str
) -> list[Span]:
    """The (first, end) characters of `text`, the rendered `turns`, that are learned.

    A template that marks the assistant's text with `{% generation %}` is taken at its word. For others, turn
    k is what `turns[:k+1]` has after the header that ends `turns[:k]`. Where that is no beginning of the
    whole (a template that renders a turn otherwise once others follow it), turns are found in the whole by a
    mark put in place of their content.
    """
    if marks_assistant(tokenizer, options):
        return _marked_by_template(tokenizer, turns, options)
    found = []
    for k in (k for k, turn in enumerate(turns) if turn["role"] == "assistant"):
        whole = rendered(tokenizer, turns[: k + 1], options, where)
        if text.startswith(whole):
            asked = rendered(tokenizer, turns[:k], options, where, ask=True)
            found.append((_agreeing(asked, whole), len(whole)))
        else:
            found.append(_found(tokenizer, text, turns, k, options, where))
    return found


def token_mask(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Which tokens have a character in a span; `offsets` [t, 2] are the (first, end) characters of each.

    A token across the border of a span is in it, as in TRL's longest common prefix.
    """
    firsts, ends = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
    mask = np.zeros(len(offsets), np.bool_)
    for first, end in spans:
        mask |= (firsts < end) & (ends > first)
    return mask


def _marked_by_template(
    tokenizer: Tokenizer, turns: Sequence[Message], options: Mapping[str, Any]
) -> list[Span]:
    from transformers.utils.chat_template_utils import render_jinja_template

    result: Any = render_jinja_template(
        conversations=[list(turns)],
        chat_template=tokenizer.get_chat_template(tools=options.get("tools")),
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **options},
    )
    return [(first, end) for first, end in result[1][0]]


def _found(
    tokenizer: Tokenizer, text: str, turns: Sequence[Message], k: int, options: Mapping[str, Any], where: str
) -> Span:
    """Turn k in `text`: from the end of turn k - 1 and the header after it, to what closes turn k."""
    mark = next(chr(c) for c in range(0xE000, 0xF900) if chr(c) not in text)
    lists = any(isinstance(turn.get("content"), list) for turn in turns)
    content = [{"type": "text", "text": mark}] if lists else mark

    def split(shown: Sequence[Message], at: int, ask: bool = False) -> tuple[str, str]:
        marked = [{**turn, "content": content} if i == at else turn for i, turn in enumerate(shown)]
        pieces = rendered(tokenizer, marked, options, where, ask=ask).split(mark)
        if len(pieces) != 2:
            raise ConfigError(
                f"the chat template shows turn {at} {len(pieces) - 1} times, so what is learned is unclear",
                where=where,
                fix="mark the assistant's text with {% generation %} in the template",
            )
        return pieces[0], pieces[1]

    header_at = len(text) - len(split(turns, k - 1)[1])
    close_at = len(text) - len(split(turns, k)[1])
    header = split(turns[:k], k - 1, ask=True)[1]
    close = split(turns[: k + 1], k)[1]
    return header_at + _agreeing(header, text[header_at:]), close_at + _agreeing(close, text[close_at:])


def _agreeing(a: str, b: str) -> int:
    """Length of the longest common prefix."""
    return len(os.path.commonprefix([a, b]))
