"""When prompts are shared: what `share_prompts` may say, and what it means where it says nothing."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from ntjax.errors import ConfigError
from ntjax.models import Model, build
from ntjax.sharing import shares
from ntjax.stages import dpo, grpo, ppo, reward, sft
from tests.test_step import TINY

DPO, REWARD = dpo.Options(stage_type="dpo"), reward.Options(stage_type="reward")
GRPO = grpo.Options(stage_type="grpo", reward_function=("f",))
STRETCHED = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}


def told(stage: Any, model: Model, vision: Any = None) -> bool:
    config: Any = SimpleNamespace(stages=(stage,), where=lambda name: f"file: {name}")
    return shares(config, stage, model, vision)


@pytest.mark.parametrize("stage", [DPO, REWARD, GRPO], ids=lambda stage: stage.stage_type)
def test_prompts_are_shared_where_no_kernel_is_given_up(stage: Any) -> None:
    kernels = ("blocked", "xla", "splash", "cudnn")
    models = {kernel: build(TINY, attention="xla") for kernel in kernels}
    models = {k: replace(model, config=replace(model.config, attention=k)) for k, model in models.items()}
    assert [told(stage, models[kernel]) for kernel in kernels] == [True, False, False, False]
    assert all(told(replace(stage, share_prompts=True), model) for model in models.values())
    assert not any(told(replace(stage, share_prompts=False), model) for model in models.values())


def test_rows_that_keep_their_places_share_nothing() -> None:
    model = build(TINY, attention="blocked")
    assert not told(replace(DPO, padding_free=False), model)
    assert not told(replace(DPO, packing=True), model)
    assert not told(replace(DPO, loss_type=("aot",), gradient_accumulation_steps=2), model)
    assert not told(replace(REWARD, gradient_accumulation_steps=2), model)
    assert not told(sft.Options(stage_type="sft"), model)
    assert not told(ppo.Options(stage_type="ppo", reward_function=("f",)), model)


@pytest.mark.parametrize(
    ("stage", "vision", "hf", "said"),
    [(DPO, object(), {}, "show images"), (GRPO, None, STRETCHED, "past 64 tokens")],
    ids=["images", "rotations"],
)
def test_what_cannot_be_shared_is_refused(stage: Any, vision: Any, hf: dict[str, Any], said: str) -> None:
    model = build({**TINY, **hf}, attention="blocked")
    assert not told(stage, model, vision)
    with pytest.raises(ConfigError, match=said) as error:
        told(replace(stage, share_prompts=True), model, vision)
    assert error.value.where == "file: stages.0.share_prompts"
    assert not told(replace(stage, share_prompts=False), model, vision)


def test_rotations_that_depend_on_no_length_of_these_rows_are_shared() -> None:
    model = build({**TINY, **STRETCHED}, attention="blocked")
    assert told(replace(DPO, max_length=64), model)


@pytest.mark.parametrize(
    "stage",
    [
        replace(DPO, padding_free=False),
        replace(DPO, packing=True),
        replace(REWARD, gradient_accumulation_steps=2),
    ],
)
def test_asked_for_without_filled_rows(stage: Any) -> None:
    assert "share_prompts" not in dict(stage.conflicts())
    assert "share_prompts" in dict(replace(stage, share_prompts=True).conflicts())
