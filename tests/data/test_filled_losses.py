"""A step whose examples share rows has the loss, the metrics and the gradient that it has with a row an example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from ntjax.data.batch import Example, Pair
from ntjax.data.encoded import Gathered
from ntjax.data.loader import Examples, Plan, batches
from ntjax.data.pairs import EncodedPairs
from ntjax.metrics import add, finish
from ntjax.models import build, scoring_config
from ntjax.stages import dpo, pretrain, reward, sft
from ntjax.stages.base import StageConfig
from ntjax.step import eval_step, initial_state, train_step
from tests.cases import some
from tests.test_step import TINY, assert_close, constant, random_params, recorder

ROWS, COUNT = 4, 37  # of a microbatch, and of the data: the last step of an epoch is not full
EXACT = 1e-6


def document(rng: np.random.Generator, scored: bool = False) -> Example:
    """3 to 60 tokens, of which the last ones are learned, or the last is scored."""
    count = int(np.clip(rng.lognormal(2.5, 0.7), 3, 60))
    learned = np.arange(count) >= (count - 1 if scored else rng.integers(1, count))
    return Example(rng.integers(1, 61, count).astype(np.int32), learned)


def gathered(kept: list[Any]) -> Any:
    return Gathered(kept, range(len(kept)), len(kept), 0, 0, ()).encoded()


def alone() -> Examples:
    rng = np.random.default_rng(0)
    return gathered([document(rng) for _ in range(COUNT)])


def paired(scored: bool = False) -> Callable[[], Examples]:
    def pairs() -> Examples:
        rng = np.random.default_rng(1)
        made = gathered([Pair(document(rng, scored), document(rng, scored)) for _ in range(COUNT)])
        if scored:
            return EncodedPairs(made, margin=rng.random(COUNT).astype(np.float32))
        return EncodedPairs(made, ref_logps=-20 * rng.random((COUNT, 2)).astype(np.float32))

    return pairs


def dpo_of(*losses: str, **settings: Any) -> tuple[StageConfig, Callable[[], Examples]]:
    return dpo.Options(stage_type="dpo", loss_type=losses, **settings), paired()


CASES: dict[str, tuple[StageConfig, Callable[[], Examples]]] = {
    "sft": (sft.Options(stage_type="sft"), alone),
    "pretrain": (pretrain.Options(stage_type="pretrain", packing=False), alone),
    "reward": (reward.Options(stage_type="reward", center_rewards_coefficient=0.1), paired(scored=True)),
    "dpo": (dpo_of("sigmoid", use_weighting=True, ld_alpha=0.5)),
    "several": (dpo_of("ipo", "sft", rpo_alpha=0.5)),
    "aot": (dpo_of("aot")),
    "orpo": (dpo_of("orpo")),
}

ACROSS = {"sft", "pretrain", "dpo"}  # in which no example's microbatch matters to it


def planned(stage: StageConfig, examples: Examples, accumulation: int) -> tuple[Plan, Plan]:
    """With a row an example, and as the stage fills it."""
    options: dict[str, Any] = {
        "lengths": examples.lengths,
        "max_length": 128,
        "rows_per_microbatch": ROWS,
        "accumulation": accumulation,
    }
    stage = replace(stage, gradient_accumulation_steps=accumulation)
    return Plan(**options), Plan(**options, fills=stage.fills)


def model_of(stage: StageConfig) -> Any:
    return build(scoring_config(TINY), labels=1) if stage.scores else build(TINY)


@pytest.mark.parametrize("accumulation", some([1, 4], [4]))
@pytest.mark.parametrize("name", some(CASES, ["sft", "dpo", "reward"]))
def test_a_step_is_the_same(name: str, accumulation: int) -> None:
    (stage, made), found = CASES[name], []
    examples, model = made(), model_of(stage)
    params = random_params(model)
    step = jax.jit(train_step(stage.loss(model), recorder(), constant(0.5), 0.0))
    for plan in planned(stage, examples, accumulation):
        batch = next(batches(plan, examples, 0, threads=0))
        state, metrics = step(initial_state(params, recorder()), {}, batch)
        found.append((batch["tokens"].size, state.opt_state, finish(metrics)))
    (area, gradient, metrics), (filled, other, others) = found
    assert filled < area if accumulation == 1 or name in ACROSS else filled == area
    assert_close(other, gradient, EXACT)
    assert others == pytest.approx(metrics, rel=EXACT, abs=EXACT)


@pytest.mark.parametrize("name", some(CASES, ["sft", "dpo"]))
def test_an_evaluation_is_the_same(name: str) -> None:
    (stage, made), found = CASES[name], []
    examples, model = made(), model_of(stage)
    params = random_params(model)
    step = jax.jit(eval_step(stage.loss(model)))
    for plan in planned(stage, examples, 1):
        total: Any = {}
        for batch in batches(plan, examples, 0, threads=0):
            total = add(total, jax.device_get(step(params, {}, batch)))
        found.append(finish(total))
    assert found[1] == pytest.approx(found[0], rel=EXACT, abs=EXACT)
