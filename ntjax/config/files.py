"""Config files as written: TOML, YAML, JSON, or Python with a `get_config()`.

YAML and JSON are read more strictly than their usual parsers do: a key given twice, NaN in JSON and YAML
aliases are errors, and `1e-5` in YAML is a number. A byte order mark is skipped in all of them.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ntjax import lookup
from ntjax.config.lines import Lines, json_lines, toml_lines
from ntjax.errors import ConfigError, InputMissing


@dataclass(frozen=True)
class Source:
    """A config file: its settings as nested dicts and lists, and the line of each dotted key."""

    path: Path
    data: dict[str, Any]
    lines: Lines


def read(path: str | Path) -> Source:
    """The file's settings, unchecked.

    Raises `InputMissing` where there is no file, `ConfigError` where it can't be parsed.
    """
    path = Path(path)
    if not path.is_file():
        raise InputMissing(f"there is no config file {path}", fix=_neighbours(path))
    if path.suffix == ".py":
        return Source(path, _from_python(path), {})
    if path.suffix not in _READERS:
        raise ConfigError(
            f"config files end in {', '.join(_READERS)} or .py, not {path.suffix!r}",
            where=str(path),
            fix="rename the file to what it holds",
        )
    text = _text(path)
    try:
        data, lines = _READERS[path.suffix](text, path)
    except RecursionError:
        raise ConfigError("nested too deep to be read", where=str(path)) from None
    if not data:
        raise ConfigError("the file is empty", where=str(path), fix="start from a file in configs/")
    if not isinstance(data, dict):
        raise ConfigError("expected settings by name, found a list or a lone value", where=f"{path}:1")
    return Source(path, data, lines)


def _neighbours(path: Path) -> str:
    files = sorted(file.name for file in path.parent.glob("*") if file.suffix in (*_READERS, ".py"))
    return f"{path.parent} has {', '.join(files)}" if files else f"{path.parent} has no config file"


def _text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError("the file is not UTF-8", where=f"{path}:{line}", fix="save it as UTF-8") from None


def _from_toml(text: str, path: Path) -> tuple[Any, Lines]:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _toml_error(str(error), text, path) from None
    return data, toml_lines(text)


def _toml_error(problem: str, text: str, path: Path) -> ConfigError:
    at = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", problem)
    assert at, problem
    line = int(at[1] or text.rstrip().count("\n") + 1)
    reason = problem[: at.start()]
    if reason.startswith(("Cannot overwrite", "Cannot declare", "Cannot mutate")):
        return ConfigError(
            f"this key or table is given twice: {text.splitlines()[line - 1].strip()}",
            where=f"{path}:{line}",
            fix="keep one of the two",
        )
    return ConfigError(f"not TOML: {reason[0].lower()}{reason[1:]}", where=f"{path}:{line}")


def _from_json(text: str, path: Path) -> tuple[Any, Lines]:
    if not text.strip():
        return None, {}
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"not JSON: {error.msg[0].lower()}{error.msg[1:]}"
        raise ConfigError(reason, where=f"{path}:{error.lineno}") from None
    lines, faults = json_lines(text)
    for key, line in faults:
        if key in ("NaN", "Infinity", "-Infinity"):
            raise ConfigError(
                f"{key} is not a JSON number", where=f"{path}:{line}", fix="write a finite number"
            )
        raise _given_twice(key, path, line)
    return data, lines


def _given_twice(key: str, path: Path, line: int) -> ConfigError:
    return ConfigError(f"{key} is given twice", where=f"{path}:{line}", fix="keep one of the two")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with YAML 1.2's numbers, without dates and aliases."""

    yaml_implicit_resolvers = {
        first: [rule for rule in rules if rule[0] != "tag:yaml.org,2002:timestamp"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # a few nested aliases expand without bound
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases are not read: write the value out", problem_mark=mark)
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _from_yaml(text: str, path: Path) -> tuple[Any, Lines]:
    lines: Lines = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None if node is None else _yaml_value(loader, node, "", path, lines)), lines
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"not YAML: {error.reason}", where=f"{path}:{line}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        fix = "indent with spaces" if "'\\t'" in str(error.problem) else None
        raise ConfigError(
            f"not YAML: {error.problem}", where=f"{path}:{mark.line + 1 if mark else 1}", fix=fix
        ) from None


def _yaml_value(loader: _Loader, node: Any, path: str, file: Path, lines: Lines) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return loader.construct_object(node)
    if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
        raise yaml.MarkedYAMLError(problem=f"the tag {node.tag} is not read", problem_mark=node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            at = f"{path}.{index}"
            lines[at] = item.start_mark.line + 1
            items.append(_yaml_value(loader, item, at, file, lines))
        return items
    table = {}
    for key_node, value_node in node.value:
        key, line = loader.construct_object(key_node), key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise ConfigError(f"the key {key!r} is not text", where=f"{file}:{line}", fix="put it in quotes")
        at = f"{path}.{key}" if path else key
        if key in table:
            raise _given_twice(at, file, line)
        lines[at] = line
        table[key] = _yaml_value(loader, value_node, at, file, lines)
    return table


def _from_python(path: Path) -> dict[str, Any]:
    """What the file's `get_config()` returns: a dict or an `ml_collections.ConfigDict`."""
    import ml_collections

    module = lookup.load_file(path)
    get_config = vars(module).get("get_config")
    if not callable(get_config):
        raise ConfigError("there is no function get_config()", where=str(path), fix="define get_config()")
    with lookup.blaming(path, "get_config()"):
        data = get_config()
    if isinstance(data, ml_collections.ConfigDict):
        data = data.to_dict()
    if not isinstance(data, dict) or not data:
        raise ConfigError(
            f"get_config() returned {type(data).__name__}",
            where=str(path),
            fix="return a dict or a ConfigDict",
        )
    return data


_READERS: dict[str, Callable[[str, Path], tuple[Any, Lines]]] = {
    ".toml": _from_toml,
    ".yaml": _from_yaml,
    ".yml": _from_yaml,
    ".json": _from_json,
}
