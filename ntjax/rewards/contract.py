"""What a reward function is given and what it may give back.

    f(prompts: list[str], responses: list[str]) -> list[float]
    f(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns) -> list[float | None]

The second is TRL's: arguments by keyword, every other column of the data by its name. A function is told by the names
of its parameters, and may be a coroutine, an object that can be called, or a class of such objects.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ntjax import lookup
from ntjax.errors import ConfigError, UserCodeError

OWN, TRL = "responses", "completions"
# Frames in these are not where a person's mistake is; those of installed packages are told by their folder's name.
NOT_THEIRS = (Path(__file__).parents[1], Path(sysconfig.get_path("stdlib")))
# One loop for all calls, as in TRL: a client that a coroutine keeps belongs to the loop it was made in.
LOOP = asyncio.Runner()


@dataclass(frozen=True)
class Batch:
    """Completions to be judged: text or messages, as their prompts are; `columns` of the data by name; `state` of
    the run (global_step, max_steps, epoch, num_train_epochs)."""

    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    def first(self, count: int) -> Batch:
        """The first rows of it."""
        return Batch(
            self.prompts[:count],
            self.completions[:count],
            self.completion_ids[:count],
            {name: values[:count] for name, values in self.columns.items()},
            self.state,
        )


@dataclass(frozen=True)
class Answer:
    """A reward a row, NaN where it abstains; what the function logged beside; or, in `wrong`, what it did wrong.

    `late` where that is to take too long, `astray` where it is to ask for what there isn't.
    """

    scores: list[float] = field(default_factory=list)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    wrong: str = ""
    late: bool = False
    astray: bool = False


def find(name: str, folder: Path, where: str | None) -> Callable[..., Any]:
    """The reward that `name` means: "module:function", "path/to/file.py:function", or one of `ready`, which may have
    arguments: "length(1, 16)". Raises ConfigError where it isn't there or takes neither form's arguments."""
    from ntjax.rewards import ready

    own = ":" in name.split("(")[0]
    found: Any = lookup.function(name, folder, where) if own else ready.find(name, folder, where)
    if inspect.isclass(found):
        found = _made(found, name, where)
    names = taken(found)
    if not {OWN, TRL} & set(names) and not _open(names):
        raise ConfigError(
            f"{name} takes {', '.join(names) or 'nothing'}",
            where=where,
            fix="write f(prompts, responses), or f(prompts, completions, **kwargs) as for TRL",
        )
    return found


def _made(kind: type, name: str, where: str | None) -> Callable[..., Any]:
    """An object of a class, which is to need nothing to be made and to be callable."""
    asked = [key for key, value in inspect.signature(kind).parameters.items() if _required(value)]
    wrong = f"needs {', '.join(asked)} to be made" if asked else "has no __call__"
    if asked or not any("__call__" in vars(each) for each in kind.__mro__):
        raise ConfigError(
            f"{name} is a class that {wrong}", where=where, fix="name a function, or an object that is called"
        )
    try:
        return kind()
    except Exception as error:
        raise UserCodeError(f"{name}: {blame(error)}", where=where) from None


def taken(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters that a function has, by name."""
    return inspect.signature(function).parameters


def label(function: Any) -> str:
    """A reward's name in logs, by TRL's rule: the function's, or the class's of an object without one."""
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__name__", None) or type(function).__name__


def call(function: Callable[..., Any], names: Mapping[str, inspect.Parameter], batch: Batch) -> Answer:
    """The answer of a function that takes `names`; what it raises or gives back wrong is told, not raised."""
    extra: dict[str, list[Any]] = {}
    metrics: dict[str, list[float]] = {}
    given = {
        "prompts": batch.prompts,
        "completions": batch.completions,
        "completion_ids": batch.completion_ids,
        "trainer_state": SimpleNamespace(**batch.state),
        "log_extra": lambda column, values: extra.setdefault(column, []).extend(values),
        "log_metric": lambda name, value: metrics.setdefault(name, []).append(float(value)),
    }
    given = {**batch.columns, **given}
    if OWN in names:
        given |= {"prompts": [_text(p) for p in batch.prompts], OWN: [_text(c) for c in batch.completions]}
    if not _open(names):
        given = {name: value for name, value in given.items() if name in names}
    elif OWN in names:
        del given["completions"]
    absent = [name for name, parameter in names.items() if _required(parameter) and name not in given]
    if absent:
        there = ", ".join(batch.columns) or "no other"
        wrong = f"it takes {', '.join(absent)}, which the data don't have; their columns: {there}"
        return Answer(wrong=wrong, astray=True)
    try:
        back = function(**given)
        if inspect.isawaitable(back):
            back = LOOP.run(_awaited(back))
        scores = _scores(back, len(batch.prompts))
    except _WrongError as error:
        return Answer(wrong=str(error))
    except (Exception, SystemExit) as error:
        return Answer(wrong=blame(error))
    short = {name: values for name, values in extra.items() if len(values) != len(scores)}
    if short:
        name, values = next(iter(short.items()))
        return Answer(wrong=f"log_extra({name!r}) has {len(values)} values for {len(scores)} completions")
    return Answer(scores, extra, metrics)


class _WrongError(Exception):
    """A function gave back what is no list of rewards."""


def _scores(back: Any, count: int) -> list[float]:
    allowed = f"allowed is a list of {count} numbers, None where it abstains"
    if isinstance(back, str | bytes | Mapping | Set) or not isinstance(back, Iterable):
        raise _WrongError(f"it returned {_shown(back)}; {allowed}")
    if getattr(back, "ndim", 1) == 0:
        raise _WrongError(f"it returned a single number, {_shown(back)}; {allowed}")
    values = list(back)
    if len(values) != count:
        raise _WrongError(f"it returned {len(values)} rewards for {count} completions; {allowed}")
    return [_number(value, row, allowed) for row, value in enumerate(values)]


def _number(value: Any, row: int, allowed: str) -> float:
    if value is None:
        return math.nan
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise _WrongError(f"row {row}: its reward is {_shown(value)}; {allowed}")
    return number


def blame(error: BaseException) -> str:
    """Type, message and the line of user code: the innermost that isn't ours, Python's or a library's."""
    frames = traceback.extract_tb(error.__traceback__)
    last = ([frame for frame in frames if _is_theirs(frame.filename)] or frames)[-1]
    return f"it raised {type(error).__name__} at {last.filename}:{last.lineno}: {error}"


def _is_theirs(file: str) -> bool:
    path = Path(file)
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return (
        not installed and not file.startswith("<") and not any(path.is_relative_to(own) for own in NOT_THEIRS)
    )


def _required(parameter: inspect.Parameter) -> bool:
    variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not variable


def _open(names: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a function takes any keyword."""
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in names.values())


def _text(said: Any) -> str:
    """The text of a prompt or a completion; of messages, that of the last, images left out."""
    content = said if isinstance(said, str) else said[-1]["content"]
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return str(content)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


async def _awaited(back: Any) -> Any:
    return await back
