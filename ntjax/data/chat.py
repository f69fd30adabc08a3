"""Rows as people write them, to the three shapes that are encoded.

    {"messages": [...]}                        every assistant turn is learned
    {"prompt": ..., "completion": ...}         both text or both messages; the completion is learned
    {"text": "..."}                            all of it is learned

A row that shows images has `pictures`, in the order of their places in its text or its turns. `tools` and
`chat_template_kwargs` are carried along where a row has them.
"""

from __future__ import annotations

import difflib
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ntjax.data.files import Row
from ntjax.data.placeholders import PART_KEYS, WORDS, Placing
from ntjax.errors import BadData, InputMissing, UserCodeError

if TYPE_CHECKING:
    from ntjax.config import DatasetConfig

Message = dict[str, Any]
Canonical = dict[str, Any]
Layout = tuple[str, tuple[str, ...]]

ROLES = {"human": "user", "gpt": "assistant", **{r: r for r in ("system", "user", "assistant", "tool")}}
TALKS = ("messages", "conversations")
RESPONSES = ("completion", "response")
INSTRUCTION = ("instruction", "output")
CARRIED = (("tools", list), ("chat_template_kwargs", dict))


def layout(row: Mapping[str, Any], fields: DatasetConfig) -> Layout:
    """How a row is read ("messages", "prompt", "instruction", "text") and from which columns, or ("", ()).

    A column that the config calls by a name of its own must be there: usual names are no substitute for it.
    """
    prompt, text = fields.prompt_field or "prompt", fields.text_field or "text"
    talks = (fields.messages_field,) if fields.messages_field else TALKS
    answers = RESPONSES if fields.response_field in (None, *RESPONSES) else (fields.response_field,)
    read: list[Layout] = [("messages", (talk,)) for talk in talks]
    pairs: list[Layout] = [("prompt", (prompt, answer)) for answer in answers]
    if (prompt, *answers) == INSTRUCTION:
        pairs = [("instruction", INSTRUCTION)]
    named = [
        *(read if talks not in (TALKS, ("messages",)) else []),
        *(pairs if (prompt, answers) != ("prompt", RESPONSES) else []),
        *([("text", (text,))] if text != "text" else []),
    ]
    wanted = named or [*read, *pairs, ("instruction", INSTRUCTION), ("text", (text,))]
    return next((one for one in wanted if all(column in row for column in one[1])), ("", ()))


def check_layout(row: Mapping[str, Any], fields: DatasetConfig, where: str) -> None:
    """Raises InputMissing, with the columns there are, when the first row can't be read as anything."""
    if layout(row, fields)[0]:
        return
    names = [fields.messages_field, fields.prompt_field, fields.response_field, fields.text_field]
    raise missing_columns(
        row,
        [name for name in names if name and name not in row],
        where,
        fix="name them with messages_field, prompt_field and response_field, or text_field; known names are "
        "messages, conversations, prompt + completion or response, instruction + input + output, text",
    )


def missing_columns(row: Mapping[str, Any], missing: Sequence[str], where: str, *, fix: str) -> InputMissing:
    """The error for a first row without the columns that are wanted, with those that it has."""
    close = [match for name in missing for match in difflib.get_close_matches(name, row, n=1)]
    message = f"no column {', '.join(map(repr, missing))}" if missing else "no known columns"
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return InputMissing(f"{message}{hint} There is {', '.join(map(repr, row))}", where=where, fix=fix)


def canonical(
    row: Mapping[str, Any], fields: DatasetConfig, where: str, *, chat: bool, placing: Placing = WORDS
) -> Canonical:
    """One of the three shapes above; raises BadData at `where` for a row that is none of them.

    Roles must be known and in order: one system turn at most, first; then user and assistant in turn, tool
    turns after an assistant's. `chat` says that the tokenizer has a chat template: then an instruction row is
    a user turn and an assistant turn, else plain text under headings. `placing` says how images are shown.
    """
    kind, columns = layout(row, fields)
    extra = carried(row, where)
    if kind == "messages":
        place = f"{where} {columns[0]}"
        system, turns = system_turn(row), messages(row[columns[0]], place)
        check_order([*system, *turns], place, first=-len(system))
        turns, found = placing.turns([*system, *turns], row, where)
        return {"messages": turns, **found, **extra}
    if kind == "prompt":
        return {**_placed(_pair(row, columns, where), row, where, placing), **extra}
    if kind == "instruction":
        return _placed(_instruction(row, where, chat), row, where, placing)
    if kind == "text":
        text, found = placing.text(string(row[columns[0]], f"{where} {columns[0]}"), row, where)
        return {"text": text, **found}
    raise BadData(
        f"nothing to train on; columns: {', '.join(map(repr, row))}",
        where=where,
        fix="give the row the columns that the first one has, or pass over it with max_bad_rows = 1",
    )


def _pair(row: Mapping[str, Any], columns: Sequence[str], where: str) -> Canonical:
    prompt, completion = (row[column] for column in columns)
    asked_at, answered_at = (f"{where} {column}" for column in columns)
    if isinstance(prompt, list) and isinstance(completion, list):
        before, after = messages(prompt, asked_at), messages(completion, answered_at)
        check_order(before, asked_at)
        check_order(after, answered_at, follows=before[-1]["role"])
        return {"prompt": before, "completion": after}
    return {"prompt": string(prompt, asked_at), "completion": string(completion, answered_at)}


def _placed(pair: Canonical, row: Mapping[str, Any], where: str, placing: Placing) -> Canonical:
    """Prompt and completion with the row's images in them."""
    asked, answered = pair["prompt"], pair["completion"]
    if isinstance(asked, str):
        text, found = placing.text(asked, row, where)
        return {"prompt": text, "completion": placing.answer(answered, where), **found}
    turns, found = placing.turns([*asked, *answered], row, where)
    return {"prompt": turns[: len(asked)], "completion": turns[len(asked) :], **found}


def messages(value: Any, where: str) -> list[Message]:
    """Turns with `role` and `content`, from those or ShareGPT's `from` and `value`; roles are mapped.

    A content is text, or where it has images a list of parts as `Placing.turns` takes them.
    """
    if not isinstance(value, list) or not value:
        raise BadData(f"{shown(value)} isn't a list of messages", where=where)
    return [_message(turn, f"{where}[{i}]") for i, turn in enumerate(value)]


def formatted(row: Row, function: Callable[[Row], Any], where: str, text_field: str | None) -> list[Row]:
    """What a user's `formatting_func` makes of a row: a text, a row, or a list of those."""
    try:
        made = function(row)
    except Exception as error:
        calls = traceback.extract_tb(error.__traceback__)[1:2]  # the function's own, if it was reached
        place = "".join(f" at {call.filename}:{call.lineno}" for call in calls)
        raise UserCodeError(
            f"formatting_func raised {type(error).__name__}{place}: {error}", where=where
        ) from error
    rows = [{text_field or "text": one} if isinstance(one, str) else one for one in _listed(made)]
    for one in rows:
        if not isinstance(one, dict):
            raise UserCodeError(
                f"formatting_func returned {shown(one)}; allowed: a string, a dict, or a list of those",
                where=where,
            )
    return rows


def _listed(made: Any) -> Sequence[Any]:
    return made if isinstance(made, list) else [made]


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise BadData(f"{shown(turn)} isn't a message", where=where)
    role_key = "from" if "from" in turn and "role" not in turn else "role"
    content_key = "value" if "value" in turn and "content" not in turn else "content"
    turn = {k: v for k, v in turn.items() if v is not None}  # tables fill absent keys with null
    role, content = turn.pop(role_key, None), turn.pop(content_key, None)
    if not isinstance(role, str) or role not in ROLES:
        raise BadData(f"{shown(role)} isn't a role; allowed: {', '.join(ROLES)}", where=f"{where}.{role_key}")
    if content is None and role == "assistant" and "tool_calls" in turn:
        return {"role": "assistant", **turn}
    return {"role": ROLES[role], "content": _content(content, f"{where}.{content_key}"), **turn}


def _content(value: Any, where: str) -> str | list[dict[str, Any]]:
    """Text, also where it is in parts; with an image among them, the parts."""
    if not isinstance(value, list) or not value:
        return string(value, where)
    parts = [_part(part, where) for part in value]
    if any(part["type"] == "image" for part in parts):
        return parts
    return "".join(part["text"] for part in parts)


def _part(part: Any, where: str) -> dict[str, Any]:
    """A text, the place of an image, or an image of its own."""
    if not isinstance(part, Mapping):
        raise BadData(f"{shown(part)} isn't text or a part of a content", where=where)
    kind = part.get("type")
    if kind == "text":
        return {"type": "text", "text": string(part.get("text"), where)}
    if kind not in ("image", "image_url"):
        raise BadData(f"{shown(kind)} isn't a type of part; allowed: text, image, image_url", where=where)
    own = next((part[key] for key in PART_KEYS if part.get(key) is not None), None)
    return {"type": "image"} if own is None else {"type": "image", "image": own}


def check_order(turns: Sequence[Message], where: str, *, first: int = 0, follows: str | None = None) -> None:
    """Raises unless roles follow one another as templates expect.

    `first` is the number of the first turn, `follows` the role of the turn before it.
    """
    allowed = {
        "system": (None,),
        "user": (None, "system", "assistant"),
        "assistant": ("user", "tool"),
        "tool": ("assistant", "tool"),
    }
    for index, turn in enumerate(turns, first):
        if follows not in allowed[turn["role"]]:
            place = f"follows {follows!r}" if follows else "comes first"
            raise BadData(
                f"{turn['role']!r} {place}; allowed: system first if at all, then user and assistant in turn",
                where=f"{where}[{index}].role",
            )
        follows = turn["role"]


def carried(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a row passes to the chat template; it may be written as JSON text, as tables often must."""
    found = {}
    for name, kind in CARRIED:
        if value := row.get(name):
            try:
                found[name] = json.loads(value) if isinstance(value, str) else value
            except json.JSONDecodeError as error:
                raise BadData(f"not JSON: {error}", where=f"{where} {name}") from error
            if not isinstance(found[name], kind):
                raise BadData(f"{shown(value)} isn't a {kind.__name__}", where=f"{where} {name}")
    return found


def system_turn(row: Mapping[str, Any]) -> list[Message]:
    """The system turn that some rows keep in a column of its own."""
    text = row.get("system")
    return [{"role": "system", "content": text}] if isinstance(text, str) and text else []


def _instruction(row: Mapping[str, Any], where: str, chat: bool) -> Canonical:
    """An Alpaca row (instruction, input, output)."""
    instruction = string(row["instruction"], f"{where} instruction")
    more = string(row.get("input") or "", f"{where} input")
    output = string(row["output"], f"{where} output")
    if chat:
        question = {"role": "user", "content": f"{instruction}\n{more}" if more else instruction}
        return {
            "prompt": [*system_turn(row), question],
            "completion": [{"role": "assistant", "content": output}],
        }
    parts = [
        "### Instruction:\n" + instruction,
        *(["### Input:\n" + more] if more else []),
        "### Response:\n",
    ]
    return {"prompt": "\n\n".join(parts), "completion": output}


def string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadData(f"{shown(value)} isn't text", where=where)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"{ascii(value[error.start])} at character {error.start}"
        raise BadData(f"{half} is half of one, as of an emoji cut in two", where=where) from None
    return value


def shown(value: Any) -> str:
    """A value as JSON people know it, short."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
