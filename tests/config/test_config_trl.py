"""Every option of TRL 1.16's trainers is a setting here, or is refused with a reason."""

from __future__ import annotations

import ast
import dataclasses
import fnmatch
import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from ntjax import lookup
from ntjax.config.schema import LoraConfig
from ntjax.config.settings import Table, names_of, settings_of

SOURCES = {
    "sft": ("trl", "trainer/sft_config.py", "SFTConfig"),
    "reward": ("trl", "trainer/reward_config.py", "RewardConfig"),
    "dpo": ("trl", "trainer/dpo_config.py", "DPOConfig"),
    "grpo": ("trl", "trainer/grpo_config.py", "GRPOConfig"),
}
TRAINING_ARGUMENTS = ("transformers", "training_args.py", "TrainingArguments")
TRL_BASE = ("trl", "trainer/base_config.py", "_BaseConfig")
UNKNOWN = object()

# Where the default differs on purpose: the contract's, one for all stages.
CONTRACT_DEFAULTS = {
    "per_device_train_batch_size", "per_device_eval_batch_size", "lr_scheduler_type", "lr_scheduler_kwargs",
    "warmup_steps", "optim", "learning_rate", "seed", "do_eval", "gradient_checkpointing",
    "assistant_only_loss", "generation_kwargs", "chat_template_kwargs",
}  # fmt: skip


@functools.cache
def declared(package: str, file: str, name: str) -> dict[str, Any]:
    """Options of a dataclass and their defaults, read from its source: importing trl takes seconds."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    tree = ast.parse((Path(str(spec.origin)).parent / file).read_text())
    (found,) = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)
    fields = [node for node in found.body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: default(node.value) for node in fields if isinstance(node.target, ast.Name)}


def default(value: ast.expr | None) -> Any:
    given = (
        [k.value for k in value.keywords if k.arg == "default"] if isinstance(value, ast.Call) else [value]
    )
    return given[0].value if given and isinstance(given[0], ast.Constant) else UNKNOWN


def options(stage_type: str) -> dict[str, Any]:
    return declared(*TRAINING_ARGUMENTS) | declared(*TRL_BASE) | declared(*SOURCES[stage_type])


def is_known(name: str, table: type[Table]) -> bool:
    return (
        name in names_of(table)
        or name in table.inherent
        or any(fnmatch.fnmatchcase(name, pattern) for pattern in table.absent)
    )


@pytest.mark.parametrize("stage_type", SOURCES)
def test_every_option_of_a_trainer_is_known(stage_type: str) -> None:
    assert [
        name for name in options(stage_type) if not is_known(name, lookup.stage_options(stage_type))
    ] == []


@pytest.mark.parametrize("stage_type", SOURCES)
def test_defaults_are_the_trainers_but_for_those_of_the_contract(stage_type: str) -> None:
    table = lookup.stage_options(stage_type)
    names, settings = names_of(table), settings_of(table)
    differing = {
        name
        for name, value in options(stage_type).items()
        if name in names and value is not UNKNOWN and value != settings[names[name]].default
    }
    assert differing - CONTRACT_DEFAULTS == set()


def test_the_settings_of_an_adapter_are_pefts_with_its_defaults() -> None:
    theirs = declared("peft", "tuners/lora/config.py", "LoraConfig")
    ours = {field.name: field for field in dataclasses.fields(LoraConfig)} | {"task_type": None}
    assert set(ours) - set(theirs) == {"task_type"}  # in PEFT a field of the base class
    assert {
        n for n, v in theirs.items() if n in ours and v is not UNKNOWN and v != getattr(LoraConfig(), n)
    } == set()


def test_every_setting_that_is_refused_for_now_has_a_default_that_is_not() -> None:
    for kind in lookup.stage_types():
        for name, setting in settings_of(lookup.stage_options(kind)).items():
            if isinstance(setting.rules.later, dict):
                assert set(setting.rules.later).isdisjoint({setting.default}), name
