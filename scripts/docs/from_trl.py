"""Writes the tables of docs/from-trl.md: what becomes of each option of TRL 1.16's trainers.

    python scripts/docs/from_trl.py

The options are read from the sources of trl and transformers, what becomes of them from the declared settings, so that
the tables say what the config reader does. A test compares the file with what this would write.
"""

from __future__ import annotations

import ast
import fnmatch
import functools
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from ntjax import lookup
from ntjax.config.schema import Config, DatasetConfig, ModelConfig
from ntjax.config.settings import Declared, Table, names_of, settings_of

PAGE = Path(__file__).parents[2] / "docs" / "from-trl.md"
TRAINERS = {
    "sft": ("trl", "trainer/sft_config.py", "SFTConfig"),
    "reward": ("trl", "trainer/reward_config.py", "RewardConfig"),
    "dpo": ("trl", "trainer/dpo_config.py", "DPOConfig"),
    "grpo": ("trl", "trainer/grpo_config.py", "GRPOConfig"),
}
TRAINING_ARGUMENTS = ("transformers", "training_args.py", "TrainingArguments")
TRL_BASE = ("trl", "trainer/base_config.py", "_BaseConfig")
MODEL_ARGUMENTS = ("trl", "trainer/model_config.py", "ModelConfig")
SCRIPT_ARGUMENTS = ("trl", "scripts/utils.py", "ScriptArguments")
UNKNOWN = object()

# TRL's `trl sft` reads these beside a trainer's options: where they are said here.
ELSEWHERE = {
    "lora_r": "`r` in `[model.lora_config]`",
    "lora_target_modules": "`target_modules` in `[model.lora_config]`",
    "lora_target_parameters": "no: layers of experts are not among the models yet",
    "lora_task_type": "`task_type` in `[model.lora_config]`; nothing asks for it",
    "use_bnb_nested_quant": "`use_double_quant` in `[model.bnb_config]`",
    "bnb_4bit_quant_type": "`quant_type` in `[model.bnb_config]`",
    "bnb_4bit_quant_storage": "no: codes are stored as they are",
    "dataset_config": "no: a data set is files or a repository of one configuration",
    "dataset_train_split": "`dataset_split` in `[datasets.NAME]`",
    "dataset_test_split": "`eval_split` in `[datasets.NAME]`",
    "dataset_streaming": "`streaming` in `[datasets.NAME]`",
    "ignore_bias_buffers": "no: it steers PyTorch",
}


@functools.cache
def declared(package: str, file: str, name: str) -> dict[str, Any]:
    """Options of a dataclass and their defaults, read from its source: importing trl takes seconds."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    tree = ast.parse((Path(str(spec.origin)).parent / file).read_text())
    (found,) = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)
    fields = [node for node in found.body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: _default(node.value) for node in fields if isinstance(node.target, ast.Name)}


def _default(value: ast.expr | None) -> Any:
    given = (
        [k.value for k in value.keywords if k.arg == "default"] if isinstance(value, ast.Call) else [value]
    )
    return given[0].value if given and isinstance(given[0], ast.Constant) else UNKNOWN


def trainer_options(stage_type: str) -> dict[str, Any]:
    """Every option of a trainer, those of TrainingArguments too, and its default (`UNKNOWN` where it is computed)."""
    return declared(*TRAINING_ARGUMENTS) | declared(*TRL_BASE) | declared(*TRAINERS[stage_type])


def fate(name: str, default: Any, table: type[Table]) -> str:
    """What becomes of an option in a table of ours, in words."""
    names = names_of(table)
    if name in names:
        setting = settings_of(table)[names[name]]
        return ", ".join(_said(name, default, setting))
    if name in table.inherent:
        return f"always {_value(table.inherent[name])}"
    for pattern, why in table.absent.items():
        if fnmatch.fnmatchcase(name, pattern):
            return f"no: {why}"
    raise KeyError(name)


def _said(name: str, default: Any, setting: Declared) -> Iterator[str]:
    later = setting.rules.later
    if isinstance(later, str) and later:
        yield f"not yet: {later}"
        return
    yield "same" if name == setting.name else f"same; its name here is `{setting.name}`"
    if setting.default is not MISSING and default is not UNKNOWN and default != setting.default:
        yield f"default {_value(setting.default)} (TRL: {_value(default)})"
    if later:
        yield "not yet " + ", ".join(_value(value) for value in later)


def _value(value: Any) -> str:
    if value is None or value == "":
        return "none"
    return f"`{json.dumps(value, default=str)}`"


def model_fate(name: str, default: Any) -> str:
    """What becomes of an option that `trl sft` has of the model and the data."""
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    for table, place in (
        (ModelConfig, "[model]"),
        (DatasetConfig, "[datasets.NAME]"),
        (Config, "the top level"),
    ):
        if name in names_of(table):
            return fate(name, default, table) + f", in `{place}`".replace("`the top level`", "the top level")
    lora = settings_of(settings_of(ModelConfig)["lora_config"].kind)
    if name.removeprefix("lora_") in lora or name in lora:
        return f"`{name if name in lora else name.removeprefix('lora_')}` in `[model.lora_config]`"
    return fate(name, default, ModelConfig)


def _table(rows: dict[str, str]) -> str:
    """Markdown of option -> what becomes of it; options that are refused for one reason share a row."""
    together: dict[str, list[str]] = {}
    for name, said in rows.items():
        together.setdefault(said if said.startswith("no") else name, []).append(name)
    lines = [
        f"| {', '.join(f'`{name}`' for name in names)} | {rows[names[0]]} |" for names in together.values()
    ]
    return "\n".join(["| option | here |", "| --- | --- |", *lines])


def tables() -> dict[str, str]:
    """Marker -> table: what no trainer says anew of TrainingArguments, each trainer's own, the model's of `trl sft`."""
    stages = {kind: lookup.stage_options(kind) for kind in TRAINERS}
    own = {kind: declared(*TRL_BASE) | declared(*TRAINERS[kind]) for kind in TRAINERS}
    shared = {
        name: default
        for name, default in declared(*TRAINING_ARGUMENTS).items()
        if not any(name in options for options in own.values())
    }
    written = {"all": _table({name: fate(name, value, stages["sft"]) for name, value in shared.items()})}
    for kind, options in own.items():
        written[kind] = _table({name: fate(name, value, stages[kind]) for name, value in options.items()})
    command = declared(*MODEL_ARGUMENTS) | declared(*SCRIPT_ARGUMENTS)
    written["model"] = _table({name: model_fate(name, value) for name, value in command.items()})
    return written


def filled(page: str) -> str:
    """The page with what stands between each `<!-- options: NAME -->` and `<!-- end -->` written anew."""
    made = tables()

    def table(found: re.Match[str]) -> str:
        return f"{found[1]}\n{made[found[2]]}\n<!-- end -->"

    return re.sub(r"(<!-- options: (\w+) -->).*?<!-- end -->", table, page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
