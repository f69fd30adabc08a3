"""Completions in rows behind their prompt: how they lie, and that scores, losses and gradients stay what they were."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntjax.data.grouped import joined
from ntjax.data.prompts import Prompt
from ntjax.metrics import finish
from ntjax.models import Model, build
from ntjax.ops import blocked as module
from ntjax.params import Params
from ntjax.sampler import Completion
from ntjax.stages import grpo
from ntjax.stages.rollout import completion_scores
from ntjax.step import initial_state, train_step
from ntjax.window import window_arrays
from tests.cases import some
from tests.models.test_logits import VARIANTS
from tests.test_step import TINY, assert_close, constant, random_params, recorder

GROUP, PROMPTS, MICROBATCHES, EXACT = 4, (1, 17, 30, 30), 2, 1e-5
Arrays = dict[str, np.ndarray]


def window(seed: int = 0) -> Arrays:
    """Arrays [16, ...]: four completions of 1 to 10 tokens to each of four prompts, one of them of a single token."""
    rng = np.random.default_rng(seed)
    asked = [Prompt(rng.integers(1, 61, count).tolist()) for count in PROMPTS]
    prompts = [prompt for prompt in asked for _ in range(GROUP)]
    counts = [1, 10, *rng.integers(1, 11, len(prompts) - 2)]
    drawn = [
        Completion(rng.integers(1, 61, count).tolist(), [-1.0] * count, "stop" if count % 3 else "length")
        for count in counts
    ]
    arrays = window_arrays(prompts, drawn, 32, 16, 0)
    mask = arrays["mask"] & arrays["stopped"][:, None]  # as mask_truncated_completions has it
    arrays |= {"mask": mask, "advantages": rng.standard_normal(len(prompts)).astype(np.float32)}
    for name in ("old_logps", "ref_logps"):
        arrays[name] = (rng.uniform(-6, -2, mask.shape) * mask).astype(np.float32)
    return {name: x for name, x in arrays.items() if name not in ("stopped", "lengths", "sampler_logps")}


def batch(order: Any = None) -> Arrays:
    """A step's arrays [2, 8, ...] of the window in that order."""
    rows = np.arange(len(PROMPTS) * GROUP) if order is None else order
    return {name: x[rows].reshape(MICROBATCHES, -1, *x.shape[1:]) for name, x in window().items()}


def shuffled() -> Arrays:
    return batch(np.random.default_rng(5).permutation(len(PROMPTS) * GROUP))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 16)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("given", [batch(), shuffled()], ids=["grouped", "shuffled"])
def test_every_completion_is_behind_its_prompt(given: Arrays, groups: int) -> None:
    found = joined(given, groups, 0)
    assert found["tokens"].size < given["tokens"].size
    assert found["tokens"].shape[1] % groups == 0
    assert found["wanted"].sum() == given["mask"].sum()
    lengths = (given["segments"] > 0).sum(axis=-1)
    for micro, number in np.ndindex(given["start"].shape):
        row, at = found["row"][micro, number], found["start"][micro, number]
        start, length = given["start"][micro, number], lengths[micro, number]
        tokens, segments, positions, prefixes = (
            found[name][micro, row] for name in ("tokens", "segments", "positions", "prefixes")
        )
        own = slice(at - 1, at - 1 + length - (start - 1))  # from the prompt's last token on
        assert len(set(segments[own])) == 1
        read = segments == prefixes[own][0]
        before = positions[read] if start > 1 else np.zeros(0)
        assert [*before, *positions[own]] == list(range(length))
        whole = [*(tokens[read] if start > 1 else ()), *tokens[own]]
        assert whole == given["tokens"][micro, number, :length].tolist()
        mask = found["wanted"][micro, row, at - 1 :][: length - start]
        assert mask.tolist() == given["mask"][micro, number, : length - start].tolist()


def test_other_arrays_stay_and_what_saves_little_is_left() -> None:
    given = batch()
    found = joined(given, 1, 0)
    assert all(found[name] is given[name] for name in ("mask", "advantages", "old_logps", "ref_logps"))
    one = {name: x[:1, :1] for name, x in given.items()}
    assert joined(one, 1, 0) == one


def model_of(**hf: Any) -> tuple[Model, Params]:
    model = build({**TINY, **hf}, attention="blocked")
    return model, random_params(model)


@pytest.mark.parametrize("variant", ["grouped-query", "mistral, window", "llama3", "dynamic, within"])
def test_scores_are_the_same(variant: str) -> None:
    model, params = model_of(**VARIANTS[variant])
    score = jax.jit(lambda batch: completion_scores(model, params, batch, 0.7)[:2])
    given, found = shuffled(), []
    for each in (given, joined(given, 1, 0)):
        found += [
            jax.tree.map(np.asarray, [score({k: x[micro] for k, x in each.items()}) for micro in (0, 1)])
        ]
    for micro in range(MICROBATCHES):
        for apart, together in zip(found[0][micro], found[1][micro], strict=True):
            mask = given["mask"][micro]
            np.testing.assert_allclose(together * mask, apart * mask, rtol=1e-5, atol=1e-5)


STAGES: dict[str, dict[str, Any]] = {
    "dapo": {},
    "bnpo": {"loss_type": "bnpo", "top_entropy_quantile": 0.5},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "temperature": 0.7},
}


@pytest.mark.parametrize("order", ["grouped", "shuffled"])
@pytest.mark.parametrize("name", some(STAGES, ["dapo"]))
def test_a_step_is_the_same(name: str, order: str) -> None:
    options = {"beta": 0.1, "epsilon": 0.1, "max_completion_length": 10, **STAGES[name]}
    stage = grpo.Options(stage_type="grpo", num_generations=GROUP, reward_function=("f",), **options)
    (model, params), found = model_of(), []
    given = shuffled() if order == "shuffled" else batch()
    step = jax.jit(train_step(stage.loss(model), recorder(), constant(0.5), 0.0))
    for each in (given, joined(given, 1, 0)):
        state, metrics = step(initial_state(params, recorder()), {}, jax.tree.map(jnp.asarray, each))
        found.append((state.opt_state, finish(metrics)))
    (gradient, metrics), (other, others) = found
    assert_close(other, gradient, EXACT)
    assert others == pytest.approx(metrics, rel=EXACT, abs=EXACT)


def test_who_may_be_regrouped() -> None:
    def stage(**options: Any) -> grpo.Options:
        return grpo.Options(stage_type="grpo", num_generations=GROUP, **options)

    assert stage().regroups
    assert stage(num_iterations=2, loss_type="cispo").regroups
    assert not stage(num_iterations=2).regroups  # TRL logs the extremes of a microbatch's clipped ratios
    assert not stage(loss_type="bnpo").regroups
    assert not stage(top_entropy_quantile=0.5).regroups
