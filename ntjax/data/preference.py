"""Rows of preferences as people write them, to one shape.

    {"prompt": ..., "chosen": ..., "rejected": ...}      all text, or all messages

Where `prompt` is left out, `chosen` and `rejected` begin with it: `split_prompt` finds it as TRL 1.16 does
(`extract_prompt`). A row that shows images has `pictures`, the same for both. `margin`, `tools` and
`chat_template_kwargs` are carried along where a row has them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ntjax.data.chat import (
    Canonical,
    Message,
    carried,
    check_order,
    messages,
    missing_columns,
    shown,
    string,
    system_turn,
)
from ntjax.data.encode import agreeing
from ntjax.data.placeholders import WORDS, Found, Placing
from ntjax.errors import BadData

if TYPE_CHECKING:
    from ntjax.config import DatasetConfig


def columns(fields: DatasetConfig) -> tuple[str, str, str]:
    """The columns of the prompt, of what was chosen and of what was rejected."""
    return (
        fields.prompt_field or "prompt",
        fields.chosen_field or "chosen",
        fields.rejected_field or "rejected",
    )


def check_columns(row: Mapping[str, Any], fields: DatasetConfig, where: str) -> None:
    """Raises InputMissing, with the columns there are, when the first row has none to compare."""
    if missing := _missing(row, fields):
        raise missing_columns(
            row,
            missing,
            where,
            fix="name them with prompt_field, chosen_field and rejected_field; rows have prompt, chosen and "
            "rejected, or chosen and rejected that both begin with the prompt",
        )


def preference(
    row: Mapping[str, Any], fields: DatasetConfig, where: str, placing: Placing = WORDS
) -> Canonical:
    """The shape above, `prompt` left out where `chosen` and `rejected` begin with it.

    Beside messages, a prompt may be text: the user's turn before answers that are one assistant's turn each;
    else it repeats what the conversations begin with, and they are taken at their word. `placing` says how
    images are shown. Raises BadData at `where` for a row that is none of this.
    """
    if missing := _missing(row, fields):
        there = ", ".join(map(repr, row))
        raise BadData(f"no column {', '.join(map(repr, missing))}; columns: {there}", where=where)
    names = columns(fields)
    asked_at, chosen_at, rejected_at = (f"{where} {name}" for name in names)
    extra = {**carried(row, where), **_margin(row, where)}
    chosen, rejected = row[names[1]], row[names[2]]
    if isinstance(chosen, str) or isinstance(rejected, str):
        answers = string(chosen, chosen_at), string(rejected, rejected_at)
        if names[0] not in row:
            return {**_both([placing.text(answer, row, where) for answer in answers], where), **extra}
        prompt, found = placing.text(string(row[names[0]], asked_at), row, where)
        chosen, rejected = (placing.answer(answer, where) for answer in answers)
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **found, **extra}
    better, worse = _turns(chosen, chosen_at), _turns(rejected, rejected_at)
    turns = _prompt_turns(row[names[0]], better, asked_at) if names[0] in row else []
    before = [*system_turn(row), *turns]
    follows = before[-1]["role"] if before else None
    check_order(before, asked_at, first=len(turns) - len(before))
    check_order(better, chosen_at, follows=follows)
    check_order(worse, rejected_at, follows=follows)
    both = _both([placing.turns([*before, *answer], row, where) for answer in (better, worse)], where)
    if turns:
        sides = {side: both[side][len(before) :] for side in ("chosen", "rejected")}
        return {**both, "prompt": both["chosen"][: len(before)], **sides, **extra}
    return {**both, **extra}


def split_prompt(row: Canonical, where: str) -> Canonical:
    """The row with its prompt apart: the turns, or characters, that `chosen` and `rejected` begin with alike.

    A space before the answers is theirs, and so is the last turn or character of an answer that is all there
    is of the other's beginning. Raises BadData for conversations that differ from the first turn on.
    """
    if "prompt" in row:
        return row
    chosen, rejected = row["chosen"], row["rejected"]
    shared = agreeing(chosen, rejected)
    if shared and shared == min(len(chosen), len(rejected)) or chosen[shared - 1 : shared] == " ":
        shared -= 1
    if not shared and not isinstance(chosen, str):
        raise BadData("chosen and rejected differ from their first turn on: there is no prompt", where=where)
    return {**row, "prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _missing(row: Mapping[str, Any], fields: DatasetConfig) -> list[str]:
    """Columns that must be there and aren't: the prompt's only where the config names it."""
    prompt, chosen, rejected = columns(fields)
    wanted = [prompt, chosen, rejected] if fields.prompt_field else [chosen, rejected]
    return [name for name in wanted if name not in row]


def _both(sides: Sequence[tuple[Any, Found]], where: str) -> Canonical:
    """What was chosen and what was rejected, and the images that both show."""
    (chosen, found), (rejected, others) = sides
    if found != others:
        raise BadData(
            "chosen and rejected show different images",
            where=where,
            fix="show images in what both begin with, the prompt",
        )
    return {"chosen": chosen, "rejected": rejected, **found}


def _turns(value: Any, where: str) -> list[Message]:
    """Messages; a lone one may stand without a list around it."""
    return messages([value] if isinstance(value, Mapping) else value, where)


def _prompt_turns(prompt: Any, answer: list[Message], where: str) -> list[Message]:
    """The turns before an answer that begins with its own, or none if it begins with the prompt's."""
    if not isinstance(prompt, str):
        return messages(prompt, where)
    return [{"role": "user", "content": prompt}] if answer[0]["role"] == "assistant" else []


def _margin(row: Mapping[str, Any], where: str) -> dict[str, float]:
    """By how much the chosen answer is better, where the data say; tables write it as text."""
    if "margin" not in row:
        return {}
    try:
        margin = float(row["margin"])
    except (TypeError, ValueError):
        margin = math.nan
    if not math.isfinite(margin):
        raise BadData(f"{shown(row['margin'])} isn't a number", where=f"{where} margin")
    return {"margin": margin}
