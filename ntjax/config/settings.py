"""How a setting is declared, and how values written by people become values of its type.

    learning_rate: float = setting(2e-5, at_least=0)

The annotation is the type, the rules are the arguments, and nothing else needs to know of the setting.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

NoneType = type(None)


@dataclass(frozen=True)
class Rules:
    """What is allowed of a setting.

    `aliases` are other names of the setting, `synonyms` other words for its values. `later` names the feature
    that a value other than the default would need and that is not built yet: a phrase, or a phrase a value.
    """

    choices: tuple[Any, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    aliases: tuple[str, ...] = ()
    synonyms: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    later: str | Mapping[Any, str] = ""


def setting(
    default: Any = dataclasses.MISSING,
    *,
    choices: tuple[Any, ...] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    aliases: tuple[str, ...] = (),
    synonyms: Mapping[str, Any] | None = None,
    later: str | Mapping[Any, str] = "",
) -> Any:
    """A dataclass field that a config may set; without a default it must. See `Rules`."""
    rules = Rules(choices, at_least, above, at_most, aliases, synonyms or {}, later)
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata={"rules": rules})
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata={"rules": rules})
    return dataclasses.field(default=default, metadata={"rules": rules})


class Table:
    """The base of every dataclass whose fields are settings.

    `absent` are names (or patterns) known from other trainers that have no counterpart here, and why: asking
    for none of it (false, null, 0, "") is granted. `inherent` are settings that always hold here, with their
    one value. `merged` names a table of further settings, checked as if they stood beside it.
    """

    absent: ClassVar[Mapping[str, str]] = {}
    inherent: ClassVar[Mapping[str, Any]] = {}
    merged: ClassVar[str | None] = None

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """(setting, what is wrong with it) for settings that can't stand together."""
        yield from ()


@dataclass(frozen=True)
class Declared:
    """One setting of a table: its name, type, default and rules."""

    name: str
    kind: Any
    default: Any  # MISSING where it must be given
    rules: Rules


def settings_of(table: type[Any]) -> dict[str, Declared]:
    """The settings of a table by name, in order."""
    # Config speaks of the stages' base class, which sits above this package.
    kinds = get_type_hints(table, localns={"StageConfig": object})
    found = {}
    for field in dataclasses.fields(table):
        if "rules" in field.metadata:
            made = field.default_factory
            default = field.default if made is dataclasses.MISSING else made()
            found[field.name] = Declared(field.name, kinds[field.name], default, field.metadata["rules"])
    return found


def names_of(table: type[Any]) -> dict[str, str]:
    """Every name that a table's settings go by -> the setting's own name."""
    names = {name: name for name in settings_of(table)}
    return names | {alias: name for name, s in settings_of(table).items() for alias in s.rules.aliases}


def place_of(key: str, places: Mapping[str, str], file: str) -> str:
    """Where the setting `key` was written, else the table around it, else the file."""
    while key and key not in places:
        key = key.rpartition(".")[0]
    return places.get(key, file)


class UnfitError(Exception):
    """A value isn't allowed; the message says what is ("expected a number")."""


def check(value: Any, declared: Declared) -> Any:
    """`value` as the setting's type and within its rules. Raises `UnfitError`."""
    rules = declared.rules
    if isinstance(value, str):
        value = rules.synonyms.get(value, value)
    value = convert(value, declared.kind)
    for each in _each(value):
        if rules.choices and each is not None and each not in rules.choices:
            raise UnfitError(f"allowed are {', '.join(map(str, rules.choices))}")
        if isinstance(each, int | float) and not isinstance(each, bool):
            _check_bounds(each, rules)
    return value


def _each(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, tuple) else (value,)


def _check_bounds(value: float, rules: Rules) -> None:
    if rules.at_least is not None and value < rules.at_least:
        raise UnfitError(f"must be at least {rules.at_least}")
    if rules.above is not None and value <= rules.above:
        raise UnfitError(f"must be above {rules.above}")
    if rules.at_most is not None and value > rules.at_most:
        raise UnfitError(f"must be at most {rules.at_most}")


def convert(value: Any, kind: Any) -> Any:
    """`value` as `kind`: bool, int, float, str, tuple, dict, Any or a union of them. Raises `UnfitError`.

    A number may be written as text, and one value may stand for a list of one; "none" is the null that TOML
    lacks, where null is allowed.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return _plain(value)
    if origin in (Union, types.UnionType):
        return _convert_to_any_of(value, arguments)
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert_item(item, arguments[0], kind) for item in items)
    if origin is dict and isinstance(value, dict):
        return {key: _convert_item(item, arguments[1], kind) for key, item in value.items()}
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        return _number(value)
    if (kind is bool or not isinstance(value, bool)) and origin is None and isinstance(value, kind):
        return value
    raise UnfitError(f"expected {_named(kind)}")


def _convert_to_any_of(value: Any, kinds: tuple[Any, ...]) -> Any:
    if NoneType in kinds and (value is None or value == "none"):
        return None
    for kind in kinds:
        try:
            return convert(value, kind)
        except UnfitError:
            continue
    raise UnfitError(f"expected {' or '.join(_named(kind) for kind in kinds if kind is not NoneType)}")


def _convert_item(item: Any, kind: Any, whole: Any) -> Any:
    try:
        return convert(item, kind)
    except UnfitError:
        raise UnfitError(f"expected {_named(whole)}") from None


def _number(value: float | str) -> float:
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise UnfitError("expected a number") from None
    if not math.isfinite(number):
        raise UnfitError("expected a finite number")
    return number


def _plain(value: Any) -> Any:
    """Free-form values: what TOML, YAML and JSON have in common."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float):
        return _number(value)
    if not isinstance(value, bool | int | str):
        raise UnfitError("expected numbers, text, lists and tables of them")
    return value


def _named(kind: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Any: "a value"}
    if kind in names:
        return names[kind]
    arguments = get_args(kind)
    if get_origin(kind) is tuple:
        return f"a list of {_named(arguments[0]).removeprefix('a ')}".replace("whole number", "whole numbers")
    if get_origin(kind) is dict:
        return "a table"
    return " or ".join(_named(argument) for argument in arguments if argument is not NoneType)


def shown(value: Any) -> str:
    """A value as a config would write it, shortened."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
