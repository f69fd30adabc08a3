"""Settings from the command line: `stages.dpo.dpo_beta=0.2`."""

from __future__ import annotations

import tomllib
from typing import Any

from ntjax.config.tables import COMMAND_LINE
from ntjax.errors import ConfigError

_PYTHON_WORDS = {"True": True, "False": False, "None": "none"}


def apply(override: str, data: dict[str, Any], places: dict[str, str]) -> None:
    """Puts `KEY=VALUE` into `data` and its place into `places`.

    The value is a TOML literal, or the text as it stands. A stage goes by its index, its name or its type.
    """
    place = COMMAND_LINE + override
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError("a setting is given as KEY=VALUE", where=place, fix="stages.0.learning_rate=1e-4")
    container: Any = data
    for depth, part in enumerate(parts):
        parent = ".".join(parts[:depth])
        if isinstance(container, list):
            parts[depth] = str(_index(part, container, parent, place))
        elif not isinstance(container, dict):
            raise ConfigError(f"{parent} is not a table, so it has no {part}", where=place)
        if depth < len(parts) - 1:
            container = _inside(container, parts[depth])
            places.setdefault(".".join(parts[: depth + 1]), place)
    if isinstance(container, list):
        container[int(parts[-1])] = literal(text)
    else:
        container[parts[-1]] = literal(text)
    path = ".".join(parts)
    for inner in [known for known in places if known.startswith(f"{path}.")]:
        del places[inner]
    places[path] = place


def literal(text: str) -> Any:
    """What `text` means as a TOML value; text that isn't one stands for itself."""
    text = text.strip()
    if text in _PYTHON_WORDS:
        return _PYTHON_WORDS[text]
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    is_ours = list(parsed) == ["value"] and isinstance(
        parsed["value"], bool | int | float | str | list | dict
    )
    return parsed["value"] if is_ours else text


def _inside(container: Any, part: str) -> Any:
    if isinstance(container, list):
        return container[int(part)]
    if container.get(part) is None:
        container[part] = {}
    return container[part]


def _index(part: str, items: list[Any], parent: str, place: str) -> int:
    """The place of an item in a list: by number, or a stage by its name or its type."""
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    tables = [item if isinstance(item, dict) else {} for item in items]
    names = [str(table.get("stage_name") or table.get("stage_type")) for table in tables]
    wanted = part.removesuffix("_stage")
    found = [index for index, name in enumerate(names) if name.removesuffix("_stage") == wanted]
    found = found or [index for index, table in enumerate(tables) if table.get("stage_type") == part]
    if len(found) == 1:
        return found[0]
    known = ", ".join(f"{index} ({name})" for index, name in enumerate(names))
    problem = f"several of {parent} are {part}" if found else f"{parent} has no {part}"
    raise ConfigError(f"{problem}; there are {known}", where=place, fix="use the number")
