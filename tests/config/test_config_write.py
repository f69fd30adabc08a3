"""A resolved config written out is the same config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ntjax.config import Config, differences, load_config, to_toml

Load = Callable[..., Config]
EXAMPLE = Path(__file__).parents[2] / "configs" / "llm_training_example.toml"


def again(config: Config, folder: Path) -> Config:
    path = folder / "written.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    return load_config(path)


def test_the_example_survives_being_written(tmp_path: Path) -> None:
    config = load_config(EXAMPLE)
    assert again(config, tmp_path) == config


AWKWARD = {
    "task_name": "a.b",
    "deepspeed": {"zero": {"stage": 2, "auto": True}, "list": [1, {"x": "y"}]},
    "model": {
        "model_name_or_path": 'C:\\models\\"tiny" \u00e9\n\x7f\U0001f600',
        "lora_config": {"target_modules": "all-linear", "rank_pattern": {"^q.*\\.proj": 3, "plain": 1}},
    },
    "datasets": {
        "a b.c": {"dataset_path": "x", "txt_field_names": ["a", "b"], "txt_delimiter": "\t"},
        "sft": {"dataset_name": "y", "dataset_kwargs": {"name": "main", "data_files": ["a", "b"]}},
        "dpo": {"dataset_path": "x", "max_length": 64},
        "grpo": {"dataset_path": "x"},
    },
    "stages": [
        {"stage_type": "sft", "learning_rate": 1e-30, "adam_epsilon": 1e22, "pad_to_multiple_of": None},
        {"stage_type": "grpo", "reward_function": ["a:b"], "scale_rewards": False, "stage_name": "g"},
        {"stage_type": "dpo", "loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.5]},
    ],
}


def test_awkward_values_survive_being_written(load_tables: Load, tmp_path: Path) -> None:
    config = load_tables(**AWKWARD)
    assert config.stages[0].pad_to_multiple_of is None
    assert again(config, tmp_path) == config


@pytest.mark.parametrize(
    ("model", "stage", "remat"),
    [
        ({"remat": "dots"}, {}, "dots"),
        ({}, {"remat": ["attention"]}, ("attention",)),
        ({"remat": "none"}, {"gradient_checkpointing": True}, "full"),
        ({"remat": "full"}, {"gradient_checkpointing": False}, "none"),
        ({"remat": "minimal"}, {"gradient_checkpointing": True}, "minimal"),
        ({"gradient_checkpointing": True}, {}, "full"),
    ],
)
def test_what_is_kept_for_the_backward_pass_survives_too(
    model: dict[str, object], stage: dict[str, object], remat: object, load_tables: Load, tmp_path: Path
) -> None:
    tables = {"model": {"model_name_or_path": "m", **model}, "stages": [{"stage_type": "sft", **stage}]}
    config = load_tables(**tables)
    assert config.stages[0].remat == remat
    assert again(config, tmp_path).stages == config.stages


def test_a_written_config_gives_the_same_text(load_tables: Load, tmp_path: Path) -> None:
    config = load_tables(**AWKWARD)
    assert to_toml(again(config, tmp_path)) == to_toml(config)


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("stages.0.learning_rate=1e-3", {"stages.0.learning_rate": (2e-5, 1e-3)}),
        ("datasets.sft.num_samples=5", {"datasets.sft.num_samples": (None, 5)}),
        ("seed=1", {"seed": (42, 1), "stages.0.seed": (42, 1)}),
        ("seed=42", {}),
    ],
)
def test_differences_name_the_settings_that_changed(
    load_stage: Load, override: str, changed: dict[str, tuple[object, object]]
) -> None:
    assert differences(load_stage(""), load_stage("", override)) == changed
