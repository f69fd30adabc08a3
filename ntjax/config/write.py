"""A resolved config as TOML, and the differences between two."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from ntjax.config.load import tables_of
from ntjax.config.schema import Config
from ntjax.config.settings import Table, settings_of

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def to_toml(config: Config) -> str:
    """The config with every setting written out; `load_config` of it gives an equal config."""
    blocks = []
    for path, table in tables_of(config):
        lines = [_header(path)] if path else []
        lines += [f"{name} = {_value(value)}" for name, value in _own_settings(table)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Setting -> (old value, new value) where two configs differ; None where one lacks the setting."""
    before, after = _flat(old), _flat(new)
    names = dict.fromkeys([*before, *after])
    pairs = {name: (before.get(name), after.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _flat(config: Config) -> dict[str, Any]:
    return {
        f"{path}.{name}".removeprefix("."): value
        for path, table in tables_of(config)
        for name, value in _own_settings(table)
    }


def _own_settings(table: Table) -> Iterator[tuple[str, Any]]:
    """(name, value) of the settings that are not tables; null only where it isn't the default."""
    for name, declared in settings_of(type(table)).items():
        value = getattr(table, name)
        is_table = isinstance(value, Table) or (isinstance(table, Config) and name in ("datasets", "stages"))
        if not is_table and not (value is None and declared.default is None):
            yield name, value


def _header(path: str) -> str:
    first, _, rest = path.partition(".")
    if first == "stages":
        return "[[stages]]"
    keys = [first, rest] if first == "datasets" else path.split(".")  # a data set's name may hold a dot
    return f"[{'.'.join(_key(key) for key in keys)}]"


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _text(key)


def _value(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + "}"
    return _text(value) if isinstance(value, str) else repr(value)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
