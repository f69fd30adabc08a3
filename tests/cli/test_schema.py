"""schema: it allows every config there is, and refuses what the config would refuse."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from ntjax import lookup
from ntjax.config import load_config, meanings
from ntjax.config import schema as tables
from ntjax.config.files import read
from ntjax.config.settings import settings_of
from ntjax.schema import schema
from tests.cli.process import Result

ROOT = Path(__file__).parents[2]
FILES = [
    path for ending in ("toml", "yaml", "json") for path in sorted((ROOT / "configs").rglob(f"*.{ending}"))
]
CONFIGS = [path for path in FILES if "stages" in read(path).data]
LEAST: dict[str, Any] = {
    "model": {"model_name_or_path": "m"},
    "datasets": {"sft": {"dataset_path": "d.jsonl"}},
    "stages": [{"stage_type": "sft"}],
}


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    made = schema()
    Draft202012Validator.check_schema(made)
    return Draft202012Validator(made)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_there_is_fits(path: Path, validator: Draft202012Validator) -> None:
    validator.validate(read(path).data)


def changed(path: str, value: Any) -> dict[str, Any]:
    """The smallest config with one thing changed: the setting at a dotted path."""
    config = copy.deepcopy(LEAST)
    at: Any = config
    *tables, name = path.split(".")
    for key in tables:
        at = at[int(key)] if key.isdigit() else at.setdefault(key, {})
    at[name] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "fits"),
    [
        ("task_name", "a", True),
        ("task_nam", "a", False),
        ("seed", "none", False),
        ("seed", 7, True),
        ("model.dtype", "bf16", True),  # another word for bfloat16
        ("model.dtype", "int8", False),
        ("model.dtype", "float16", False),  # not built yet
        ("model.lora_config.r", 0, False),
        ("model.lora_config.lora_r", 4, True),  # an alias
        ("model.lora_config.target_modules", "all-linear", True),
        ("model.lora_config.target_modules", ["q_proj"], True),
        ("model.model_kwargs", {"dtype": "float32"}, True),
        ("model.model_kwargs", {"dtyp": "float32"}, False),
        ("model.low_cpu_mem_usage", True, True),  # always so
        ("model.low_cpu_mem_usage", False, False),
        ("datasets.sft.max_length", "long", False),
        ("datasets.sft.maxlength", 7, False),
        ("stages", [], False),
        ("stages.0.stage_type", "sfft", False),
        ("stages.0.learning_rate", 1e-4, True),
        ("stages.0.learning_rate", "fast", False),
        ("stages.0.learning_rate", -1, False),
        ("stages.0.learn_rate", 1e-4, False),
        ("stages.0.stage_kwargs", {"packing": True}, True),
        ("stages.0.stage_kwargs", {"pack": True}, False),
        ("stages.0.dpo_beta", 0.1, False),  # another stage's
        ("stages.0.push_to_hub", False, True),  # asks for nothing
        ("stages.0.push_to_hub", True, False),
        ("stages.0.fsdp_config", None, True),
        ("stages.0.fp16", False, True),
        ("stages.0.fp16", True, False),  # not built yet
        ("mesh.zero_stage", 3, True),
        ("mesh.zero_stage", 4, False),
        ("zero_stage", 3, True),
        ("$schema", "./ntjax.schema.json", True),
    ],
)
def test_it_allows_what_runs(
    path: str, value: Any, fits: bool, validator: Draft202012Validator, tmp_path: Path
) -> None:
    """As the loader does, and as far as a schema can say it."""
    from ntjax.config import refuse_unbuilt
    from ntjax.errors import ConfigError

    config = changed(path, value)
    assert validator.is_valid(config) == fits
    file = tmp_path / "run.json"
    file.write_text(json.dumps(config))
    if fits:
        refuse_unbuilt(load_config(file))
    else:
        with pytest.raises(ConfigError):
            refuse_unbuilt(load_config(file))


def test_a_table_must_have_what_a_run_needs(validator: Draft202012Validator) -> None:
    assert validator.is_valid(LEAST)
    for name in LEAST:
        assert not validator.is_valid({key: value for key, value in LEAST.items() if key != name})
    assert not validator.is_valid({**LEAST, "model": {}})


def declared() -> dict[str, Any]:
    """Every table by the name that its meanings have."""
    named: dict[str, Any] = {"": tables.Config, "model": tables.ModelConfig, "datasets": tables.DatasetConfig}
    named |= {"lora_config": tables.LoraConfig, "bnb_config": tables.BnbConfig, "mesh": tables.MeshConfig}
    named["timeouts"] = tables.TimeoutsConfig
    return named | {kind: lookup.stage_options(kind) for kind in lookup.stage_types()}


def test_every_setting_has_a_meaning_and_every_meaning_a_setting() -> None:
    used: set[tuple[str, str]] = set()
    for table, options in declared().items():
        for name, setting in settings_of(options).items():
            assert meanings.meaning(table, setting)
            used |= {(home, name) for home in (table, "stage")}
            used |= {("rollout", name)} if table in ("grpo", "ppo") else set()
    told = {(home, name) for home, texts in {**meanings.TABLES, **meanings.STAGES}.items() for name in texts}
    assert told <= used


def test_the_command_prints_it(ntjax: Callable[..., Result]) -> None:
    ended = ntjax("schema")
    assert ended.code == 0, ended.err
    printed = json.loads(ended.out)
    assert printed == json.loads(json.dumps(schema()))
    rate = printed["$defs"]["sft"]["properties"]["learning_rate"]
    assert rate == {"description": rate["description"], "default": 2e-5, "type": "number", "minimum": 0}
