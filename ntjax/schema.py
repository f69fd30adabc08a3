"""`python -m ntjax.schema`: the JSON Schema (draft 2020-12) of a config, for editors.

It is made of the settings as they are declared, and allows what runs: features that are still to come are left at their
defaults. Which settings can't stand together is `load_config`'s business alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin

from ntjax import errors

NOTHING: list[Any] = [False, None, 0, "", "none", [], {}]  # what a name without counterpart may be set to
NONE = [None, "none"]  # the null that TOML lacks
TABLES = ("model", "datasets", "stages", "mesh", "timeouts")
Schema = dict[str, Any]

USE = """\
in an editor:
  TOML  #:schema ./ntjax.schema.json                               first line (Even Better TOML)
  YAML  # yaml-language-server: $schema=./ntjax.schema.json        first line
  JSON  "$schema": "./ntjax.schema.json"                           first key

example:
  ntjax schema > ntjax.schema.json
"""


def main(argv: Sequence[str]) -> None:
    """Prints the schema."""
    parser = argparse.ArgumentParser(
        "ntjax schema",
        description="Prints the JSON Schema of a config: editors complete, explain and check settings by it.",
        epilog=USE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.parse_args(argv)
    print(json.dumps(schema(), indent=1, ensure_ascii=False))


def schema() -> Schema:
    """The schema of a whole config."""
    from ntjax import lookup
    from ntjax.config import schema as tables

    named = {
        "model": tables.ModelConfig,
        "lora_config": tables.LoraConfig,
        "bnb_config": tables.BnbConfig,
        "datasets": tables.DatasetConfig,
        "mesh": tables.MeshConfig,
        "timeouts": tables.TimeoutsConfig,
    } | {kind: lookup.stage_options(kind) for kind in lookup.stage_types()}
    made = {name: table(name, declared) for name, declared in named.items()}
    for name in ("lora_config", "bnb_config"):
        made["model"]["properties"][name] |= _ref(name)
    whole = table("", tables.Config)
    inner: dict[str, Schema] = {
        "model": {**_ref("model"), "required": ["model_name_or_path"]},
        "datasets": {"type": "object", "minProperties": 1, "additionalProperties": _ref("datasets")},
        "stages": {"type": "array", "minItems": 1, "items": _any_stage(made, lookup.stage_types())},
        "mesh": _ref("mesh"),
        "timeouts": _ref("timeouts"),
    }
    for name, rule in inner.items():
        whole["properties"][name] |= rule
    whole["properties"]["zero_stage"] = made["mesh"]["properties"]["zero_stage"]  # the short form
    whole["properties"]["$schema"] = {"type": "string", "description": "where an editor finds this schema"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "ntjax config",
        **whole,
        "required": ["model", "datasets", "stages"],
        "$defs": made,
    }


def _any_stage(made: Mapping[str, Schema], kinds: Sequence[str]) -> Schema:
    """A stage is known by its type; an `if` each would serve as well, but fewer editors complete by it."""
    for kind in kinds:
        made[kind]["properties"]["stage_type"] = {"const": kind, "description": "what the stage does"}
    return {"oneOf": [{**_ref(kind), "required": ["stage_type"]} for kind in kinds]}


def table(name: str, declared: Any) -> Schema:
    """A table of settings: each under its own name and its aliases, and the names that are known but have no meaning
    here, for which nothing may be asked."""
    from ntjax.config.settings import names_of, settings_of

    settings = settings_of(declared)
    own = {alias: _setting(name, settings[target], alias) for alias, target in names_of(declared).items()}
    if declared.merged:
        own[declared.merged] = {
            "description": "further settings, as if they stood beside it",
            "anyOf": [_ref(name), {"type": "null"}],
        }
    others = {one: {"enum": NOTHING, "description": reason} for one, reason in declared.absent.items()}
    others |= {one: {"const": value, "description": "always so"} for one, value in declared.inherent.items()}
    made: Schema = {"type": "object", "properties": own, "additionalProperties": False}
    if others:
        made["patternProperties"] = {_expression(one, own): rule for one, rule in others.items()}
    return made


def _expression(pattern: str, known: Mapping[str, Any]) -> str:
    """A pattern as of `fnmatch` that leaves names alone which are settings."""
    inside = re.escape(pattern).replace(r"\*", ".*")
    shadowed = fnmatch.filter(known, pattern)
    but = f"(?!(?:{'|'.join(map(re.escape, shadowed))})$)" if shadowed else ""
    return f"^{but}{inside}$"


def _setting(of: str, declared: Any, name: str) -> Schema:
    """A setting under one of its names; `schema` says what tables within tables hold."""
    from ntjax.config.meanings import meaning

    text, default, later = meaning(of, declared), declared.default, declared.rules.later
    made: Schema = {"description": text if name == declared.name else f"{declared.name}: {text}"}
    if later and isinstance(later, str):
        return made | ({"enum": NONE} if default is None else {"const": default})
    if not of and name in TABLES or dataclasses.is_dataclass(default):
        return made
    if default is not dataclasses.MISSING and default is not None:
        made["default"] = list(default) if isinstance(default, tuple) else default
    return made | _kind(declared.kind, declared.rules)


def _kind(kind: Any, rules: Any) -> Schema:
    """What `settings.convert` and `settings.check` take for a type and its rules."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        found = [_kind(argument, rules) for argument in arguments]
        distinct = [one for i, one in enumerate(found) if one not in found[:i]]
        return distinct[0] if len(distinct) == 1 else {"anyOf": distinct}
    if origin is tuple:
        item = _kind(arguments[0], rules)
        return {"anyOf": [{"type": "array", "items": item}, item]}  # one value may stand for a list of one
    if origin is dict:
        return {"type": "object", "additionalProperties": _kind(arguments[1], rules)}
    if kind is type(None):
        return {"enum": NONE}
    if kind is Any:
        return {}
    if rules.choices:
        later = rules.later if isinstance(rules.later, Mapping) else {}
        words = [*rules.choices, *rules.synonyms]
        return {"enum": [word for word in words if rules.synonyms.get(word, word) not in later]}
    made: Schema = {"type": {bool: "boolean", str: "string", int: "integer", float: "number"}[kind]}
    if kind in (int, float):
        bounds = {"minimum": rules.at_least, "exclusiveMinimum": rules.above, "maximum": rules.at_most}
        made |= {name: bound for name, bound in bounds.items() if bound is not None}
    return made


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


if __name__ == "__main__":
    errors.run(main)
