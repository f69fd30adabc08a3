"""Every option of TRL 1.16's trainers is a setting here, or is refused with a reason."""

from __future__ import annotations

import dataclasses
import fnmatch
import sys
from pathlib import Path

import pytest

from ntjax import lookup
from ntjax.config.schema import LoraConfig
from ntjax.config.settings import Table, names_of, settings_of

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "docs"))

import from_trl  # noqa: E402
from from_trl import TRAINERS, UNKNOWN, declared, trainer_options  # noqa: E402

# Where the default differs on purpose: the contract's, one for all stages; rows are filled, which changes no result.
CONTRACT_DEFAULTS = {
    "per_device_train_batch_size", "per_device_eval_batch_size", "lr_scheduler_type", "lr_scheduler_kwargs",
    "warmup_steps", "optim", "learning_rate", "seed", "do_eval", "gradient_checkpointing",
    "assistant_only_loss", "generation_kwargs", "chat_template_kwargs", "padding_free",
}  # fmt: skip


def is_known(name: str, table: type[Table]) -> bool:
    return (
        name in names_of(table)
        or name in table.inherent
        or any(fnmatch.fnmatchcase(name, pattern) for pattern in table.absent)
    )


@pytest.mark.parametrize("stage_type", TRAINERS)
def test_every_option_of_a_trainer_is_known(stage_type: str) -> None:
    assert [
        name for name in trainer_options(stage_type) if not is_known(name, lookup.stage_options(stage_type))
    ] == []


@pytest.mark.parametrize("stage_type", TRAINERS)
def test_defaults_are_the_trainers_but_for_those_of_the_contract(stage_type: str) -> None:
    table = lookup.stage_options(stage_type)
    names, settings = names_of(table), settings_of(table)
    differing = {
        name
        for name, value in trainer_options(stage_type).items()
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


def test_the_page_for_people_from_trl_says_what_the_settings_do() -> None:
    page = from_trl.PAGE.read_text()
    assert from_trl.filled(page) == page, "python scripts/docs/from_trl.py writes it anew"
    assert page.count("<!-- options: ") == len(from_trl.tables())
