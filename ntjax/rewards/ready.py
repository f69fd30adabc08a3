"""Rewards that are there already, by name, with arguments where they take any: "length(1, 16)".

Each is a function that makes a reward of TRL's form. Columns of the data hold what is right.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ntjax.errors import ConfigError, InputMissing

# A sign after a letter, a digit or a bracket is an operator: 7-5.
NUMBER = r"(?:(?<![\w)\]])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
Reward = Callable[..., list[float | None]]


def find(name: str, folder: Path, where: str | None = None) -> Reward:
    """The reward that `name`, perhaps a call with plain values, means; files are seen from `folder`."""
    word, opened, rest = name.partition("(")
    word = SAME.get(word.strip(), word.strip())
    if word not in READY:
        close = difflib.get_close_matches(word, READY, n=1)
        raise ConfigError(
            f"{name!r} is no reward; there is {', '.join(READY)}",
            where=where,
            fix=f"write {close[0]!r}"
            if close
            else "a function of yours is module:function or file.py:function",
        )
    given, named = _arguments(name, where) if opened else ((), {})
    try:
        made = READY[word](*given, **named, **({"folder": folder} if word == "json_schema" else {}))
    except (TypeError, ValueError, re.error) as error:
        raise ConfigError(f"{name}: {error}", where=where) from None
    made.__name__ = name.partition("(")[0].strip()
    return made


def _arguments(name: str, where: str | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    try:
        called = ast.parse(name, mode="eval").body
        assert isinstance(called, ast.Call)
        given = tuple(ast.literal_eval(argument) for argument in called.args)
        return given, {str(word.arg): ast.literal_eval(word.value) for word in called.keywords}
    except (SyntaxError, ValueError, AssertionError):
        raise ConfigError(
            f"{name!r} can't be read", where=where, fix='write it like "length(1, 16)"'
        ) from None


def exact_match(column: str = "answer") -> Reward:
    """1 where the completion is the column's text, white space around both aside."""
    return _compared(column, lambda text, right: float(text.strip() == str(right).strip()))


def numeric(column: str = "answer", tolerance: float = 1e-6) -> Reward:
    """1 where the last number of the completion is the last of the column; None where the column has none."""

    def same(text: str, right: Any) -> float | None:
        wanted, found = _last_number(str(right)), _last_number(text)
        if wanted is None:
            return None
        return float(found is not None and abs(found - wanted) <= tolerance)

    return _compared(column, same)


def boxed_math(column: str = "solution") -> Reward:
    r"""1 where the completion's answer in LaTeX, \boxed{} first, equals the column's as mathematics (math-verify);
    None where the column can't be read. As TRL's accuracy_reward."""
    try:
        from latex2sympy2_extended import NormalizationConfig
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError:
        raise ConfigError("boxed_math needs math-verify", fix='pip install "ntjax[rewards]"') from None

    latex = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True),
        boxed_match_priority=0,
        try_extract_without_anchor=False,
    )

    def same(text: str, right: Any) -> float | None:
        wanted = parse(str(right))
        if not wanted:
            return None
        return float(verify(wanted, parse(text, extraction_config=[latex], extraction_mode="first_match")))

    return _compared(column, same)


def format_(pattern: str) -> Reward:
    """1 where the whole completion matches a regular expression; its dots match line ends."""
    wanted = re.compile(pattern, re.DOTALL | re.MULTILINE)

    def reward(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        return [float(wanted.fullmatch(_text(completion)) is not None) for completion in completions]

    return reward


def length(least: int, most: int) -> Reward:
    """1 where the completion has from `least` to `most` tokens, else 0."""

    def reward(completions: Sequence[Any], completion_ids: Sequence[Any], **_: Any) -> list[float | None]:
        return [float(least <= len(ids) <= most) for ids in completion_ids]

    return reward


def overlong(most: int, cache: int) -> Reward:
    """0 up to `most - cache` tokens, then falling to -1 at `most` (arXiv:2503.14476, eq. 13)."""

    def reward(completions: Sequence[Any], completion_ids: Sequence[Any], **_: Any) -> list[float | None]:
        return [-min(max((len(ids) - most + cache) / cache, 0.0), 1.0) for ids in completion_ids]

    return reward


def json_schema(path: str, *, folder: Path) -> Reward:
    """1 where the completion, or the ```json block in it, is JSON that a schema in a file allows."""
    try:
        from jsonschema.validators import validator_for
    except ImportError:
        raise ConfigError("json_schema needs jsonschema", fix='pip install "ntjax[rewards]"') from None

    file = next((f for f in (folder / path, Path(path)) if f.is_file()), None)
    if file is None:
        raise InputMissing(f"there is no schema {path}: looked in {folder} and the working folder")
    schema = json.loads(file.read_text())
    validator = validator_for(schema)(schema)

    def valid(text: str) -> float:
        block = re.search(r"```(?:json)?\s*(.*?)```", text, re.DOTALL)
        try:
            return float(validator.is_valid(json.loads(block[1] if block else text)))
        except ValueError:
            return 0.0

    def reward(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        return [valid(_text(completion)) for completion in completions]

    return reward


def think() -> Reward:
    """1 where the completion is a thought between <think> tags and then an answer."""
    return format_(r"<think>(?!.*<think>)(.*?)</think>.*")


READY: dict[str, Callable[..., Reward]] = {
    "exact_match": exact_match,
    "numeric": numeric,
    "boxed_math": boxed_math,
    "format": format_,
    "length": length,
    "overlong": overlong,
    "json_schema": json_schema,
    "think": think,
}
# TRL's names of the same rewards.
SAME = {
    "accuracy_reward": "boxed_math",
    "think_format_reward": "think",
    "get_soft_overlong_punishment": "overlong",
}


def _compared(column: str, same: Callable[[str, Any], float | None]) -> Reward:
    def reward(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        if column not in columns:
            known = ", ".join(sorted(name for name in columns if isinstance(columns[name], list)))
            raise KeyError(f"the data have no column {column!r}; there is {known}")
        return [same(_text(text), right) for text, right in zip(completions, columns[column], strict=True)]

    return reward


def _last_number(text: str) -> float | None:
    found = re.findall(NUMBER, text)
    return float(found[-1].replace(",", "")) if found else None


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
