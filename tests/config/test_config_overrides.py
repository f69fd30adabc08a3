"""KEY=VALUE on the command line."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ntjax.config import Config
from ntjax.config.overrides import literal
from ntjax.errors import ConfigError

Load = Callable[..., Config]

TWO_STAGES = """\
seed = 1
[model]
model_name_or_path = "tiny"
[datasets.all]
dataset_path = "rows.jsonl"
[[stages]]
stage_type = "sft"
stage_name = "warm"
learning_rate = 1e-3
[[stages]]
stage_type = "dpo"
beta = 0.5
[stages.stage_kwargs]
ld_alpha = 0.3
"""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-4", 1e-4),
        ("true", True),
        ("True", True),
        ('"3"', "3"),
        ("[1, 2]", [1, 2]),
        ("{a = 1}", {"a": 1}),
        ("bfloat16", "bfloat16"),
        ("runs/a b", "runs/a b"),
        ("2024-01-01", "2024-01-01"),
        ("a=b", "a=b"),
        ("", ""),
        ("1\nseed = 2", "1\nseed = 2"),
    ],
)
def test_a_value_is_a_toml_literal_or_stands_for_itself(text: str, value: object) -> None:
    assert literal(text) == value
    assert type(literal(text)) is type(value)


@pytest.mark.parametrize(
    "override",
    [
        "stages.1.dpo_beta=0.2",
        "stages.dpo.dpo_beta=0.2",
        "stages.dpo_stage.dpo_beta=0.2",
        "stages.dpo.beta=0.2",
    ],
)
def test_a_stage_goes_by_its_number_its_name_or_its_type(load: Load, override: str) -> None:
    config = load(TWO_STAGES, override)
    assert config.stages[1].dpo_beta == 0.2
    assert config.where("stages.1.dpo_beta") == f"command line: {override}"


@pytest.mark.parametrize("name", ["0", "warm", "warm_stage", "sft"])
def test_a_named_stage_goes_by_its_type_as_well(load: Load, name: str) -> None:
    assert load(TWO_STAGES, f"stages.{name}.learning_rate=1e-4").stages[0].learning_rate == 1e-4


def test_overrides_reach_every_table_and_the_last_one_counts(load: Load) -> None:
    config = load(
        TWO_STAGES, "seed=2", "seed=3", "model.dtype=bfloat16", "model.lora_config.r=4", "zero_stage=2",
        "datasets.all.num_samples=7", "stages.warm.save_total_limit=none", "mesh.fsdp=2",
    )  # fmt: skip
    assert (config.seed, config.model.dtype, config.model.lora_config.r) == (3, "bfloat16", 4)
    assert (config.datasets["all"].num_samples, config.mesh.fsdp, config.mesh.zero_stage) == (7, 2, 2)
    assert config.stages[0].save_total_limit is None


def test_the_last_of_two_names_counts(load: Load) -> None:
    assert load(TWO_STAGES, "stages.0.optim=lion", "stages.0.optimizer=sgd").stages[0].optimizer == "sgd"


def test_an_override_wins_over_stage_kwargs(load: Load) -> None:
    assert load(TWO_STAGES, "stages.dpo.ld_alpha=0.7").stages[1].ld_alpha == 0.7


WRONG = {
    "seed": "command line: seed: a setting is given as KEY=VALUE",
    "=3": "a setting is given as KEY=VALUE",
    "stages..x=3": "a setting is given as KEY=VALUE",
    "sead=3": "command line: sead=3: sead = 3: there is no such setting; did you mean seed?",
    "modle.dtype=x": "command line: modle.dtype=x: modle",
    "stages.0.save_steps=many": 'save_steps=many: stages.0.save_steps = "many": expected a whole number',
    "stages.0.beta=1": "it belongs to dpo stages",
    "stages.5.bf16=true": "stages has no 5; there are 0 (warm), 1 (dpo)",
    "stages.ppo.bf16=true": "stages has no ppo; there are 0 (warm), 1 (dpo)",
    "mesh.x.y=1": 'command line: mesh.x.y=1: mesh.x = {"y": 1}: there is no such setting',
    "seed.x=1": "command line: seed.x=1: seed is not a table, so it has no x",
    "model=tiny": 'command line: model=tiny: model = "tiny": expected a table of settings',
}


@pytest.mark.parametrize(("override", "message"), WRONG.items())
def test_a_wrong_override_is_quoted(load: Load, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(TWO_STAGES, override)
    assert str(caught.value).startswith("command line: ")
    assert message in str(caught.value)


def test_a_type_that_two_stages_share_is_ambiguous(load: Load) -> None:
    text = TWO_STAGES + '[[stages]]\nstage_type = "dpo"\nstage_name = "again"\n'
    assert load(text, "stages.dpo.beta=0.2").stages[1].dpo_beta == 0.2
    text = (
        TWO_STAGES.replace('"dpo"', '"sft"\nstage_name = "b"')
        .replace("beta = 0.5", "")
        .replace("ld_alpha = 0.3", "")
    )
    with pytest.raises(ConfigError, match=r"several of stages are sft; there are 0 \(warm\), 1 \(b\)"):
        load(text, "stages.sft.bf16=true")
