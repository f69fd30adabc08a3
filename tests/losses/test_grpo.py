"""GRPO's losses beside TRL 1.16's own `_compute_loss`, on the same log-probs: values, gradients and metrics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl import GRPOTrainer

from ntjax.losses.grpo import Grpo, grpo_metrics

ROWS, TIME = 6, 9
LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
TOLERANCE = 1e-5


def numbers(seed: int = 0) -> dict[str, np.ndarray]:
    """Log-probs that moved enough for ratios to be clipped on both sides, of completions of several lengths."""
    dice = np.random.default_rng(seed)
    lengths = np.array([9, 4, 1, 7, 9, 5])
    logp = dice.uniform(-3, -0.1, (ROWS, TIME))
    return {
        "logp": logp,
        "old_logps": logp + dice.normal(0, 0.3, logp.shape),
        "ref_logps": logp + dice.normal(0, 0.3, logp.shape),
        "entropy": dice.uniform(0.1, 3, logp.shape),
        "mask": np.arange(TIME) < lengths[:, None],
        "advantages": np.array([1.2, -0.7, 0.0, -1.1, 0.4, 2.0]),
    }


class Accelerator:
    """One process."""

    num_processes = 1
    sync_gradients = True

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x

    gather_for_metrics = gather

    def reduce(self, x: torch.Tensor, reduction: str) -> torch.Tensor:
        return x

    def pad_across_processes(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        return x


def by_trl(given: dict[str, np.ndarray], settings: Grpo) -> tuple[float, np.ndarray, dict[str, float]]:
    """Loss, its gradient with respect to the log-probs, and metrics."""
    tensors = {name: torch.tensor(array) for name, array in given.items()}
    logp = tensors["logp"].float().requires_grad_()
    mask = tensors["mask"].int()
    trainer: Any = SimpleNamespace(
        **asdict(settings),
        args=SimpleNamespace(**asdict(settings), steps_per_generation=1),
        epsilon_low=settings.epsilon,
        accelerator=Accelerator(),
        model=SimpleNamespace(training=True),
        use_vllm=False,
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, tensors["entropy"].float(), None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )
    trainer.epsilon_high = settings.high
    trainer.get_high_entropy_mask = lambda *rest: GRPOTrainer.get_high_entropy_mask(trainer, *rest)
    inputs = {
        "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.int),
        "prompt_mask": torch.ones(ROWS, 1, dtype=torch.int),
        "completion_ids": torch.zeros(ROWS, TIME, dtype=torch.int),
        "completion_mask": mask,
        "advantages": tensors["advantages"].float(),
        "num_items_in_batch": mask.sum(),
        "ref_per_token_logps": tensors["ref_logps"].float(),
    }
    if "old_logps" in given:
        inputs["old_per_token_logps"] = tensors["old_logps"].float()
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    means = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return loss.item(), logp.grad.numpy(), means


def by_us(given: dict[str, np.ndarray], settings: Grpo) -> tuple[float, np.ndarray, dict[str, float]]:
    arrays = {
        name: jnp.asarray(array, None if name == "mask" else jnp.float32) for name, array in given.items()
    }
    more = {name: arrays[name] for name in ("old_logps", "ref_logps") if name in arrays}

    def loss(logp: jax.Array) -> Any:
        found = grpo_metrics(logp, arrays["entropy"], arrays["mask"], arrays["advantages"], settings, **more)
        return found["loss"].total / found["loss"].weight, found

    (value, found), gradient = jax.value_and_grad(loss, has_aux=True)(arrays["logp"])
    return float(value), np.asarray(gradient), {k: float(m.total / m.weight) for k, m in found.items()}


def assert_same(given: dict[str, np.ndarray], settings: Grpo) -> None:
    ours, theirs = by_us(given, settings), by_trl(given, settings)
    assert abs(ours[0] - theirs[0]) <= TOLERANCE
    assert np.abs(theirs[1]).max() > 1e-3, "nothing to compare"
    np.testing.assert_allclose(ours[1], theirs[1], rtol=0, atol=TOLERANCE)
    for name, value in theirs[2].items():
        assert abs(ours[2][name] - value) <= TOLERANCE, name


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_gradient_and_metrics(kind: str, level: str) -> None:
    assert_same(
        numbers(), Grpo(loss_type=kind, importance_sampling_level=level, beta=0.1, max_completion_length=20)
    )


@pytest.mark.parametrize("kind", LOSSES)
def test_on_policy_without_old_log_probs(kind: str) -> None:
    given = numbers(1)
    del given["old_logps"]
    assert_same(given, Grpo(loss_type=kind, max_completion_length=20))


@pytest.mark.parametrize(
    "options",
    [
        {"epsilon_high": 0.28},
        {"delta": 1.3},
        {"beta": 0.2, "use_bias_correction_kl": False},
        {"top_entropy_quantile": 0.3},
        {"off_policy_mask_threshold": 0.01},
        {"top_entropy_quantile": 0.5, "importance_sampling_level": "sequence", "beta": 0.1},
    ],
)
@pytest.mark.parametrize("kind", ["dapo", "grpo", "luspo"])
def test_options(kind: str, options: dict[str, Any]) -> None:
    assert_same(numbers(2), Grpo(loss_type=kind, **options))


@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_completions_that_are_masked_out_whole(kind: str) -> None:
    given = numbers(3)
    given["mask"][2:4] = False
    settings = Grpo(loss_type=kind, beta=0.1)
    ours, theirs = by_us(given, settings), by_trl(given, settings)
    assert abs(ours[0] - theirs[0]) <= TOLERANCE
    np.testing.assert_allclose(ours[1], theirs[1], rtol=0, atol=TOLERANCE)
    assert all(np.isfinite(value) for value in ours[2].values())


def mean_of_halves(given: dict[str, np.ndarray], compute: Callable[..., Any]) -> float:
    return sum(compute({name: array[half] for name, array in given.items()}) for half in HALVES) / 2


HALVES = slice(0, 3), slice(3, 6)


@pytest.mark.parametrize("kind", LOSSES)
def test_microbatches_add_up_to_the_step_of_trl(kind: str) -> None:
    """TRL adds up microbatches' losses, each over the number of them or over the window's tokens."""
    given = numbers(4)
    settings = Grpo(loss_type=kind)
    totals = np.zeros(2)
    for half in HALVES:
        part = {name: jnp.asarray(array[half]) for name, array in given.items()}
        found = grpo_metrics(
            part["logp"],
            part["entropy"],
            part["mask"],
            part["advantages"],
            settings,
            old_logps=part["old_logps"],
        )["loss"]
        totals += float(found.total), float(found.weight)
    if kind in ("dapo", "cispo", "vespo"):
        wanted = by_trl(given, settings)[0]
    else:
        global ROWS
        ROWS, kept = 3, ROWS
        try:
            wanted = mean_of_halves(given, lambda half: by_trl(half, settings)[0])
        finally:
            ROWS = kept
    assert abs(totals[0] / totals[1] - wanted) <= TOLERANCE


def test_a_window_of_several_steps_divides_each_by_its_share() -> None:
    given = {name: jnp.asarray(array) for name, array in numbers(5).items()}
    found = grpo_metrics(
        *(given[name] for name in ("logp", "entropy", "mask", "advantages")),
        Grpo(),
        items=jnp.full(ROWS, 4.0),
    )
    assert float(found["loss"].weight) == 24


def test_the_sampler_s_log_probs_are_compared_over_completions() -> None:
    given = {name: jnp.asarray(array) for name, array in numbers(6).items()}
    off = given["logp"].at[0, 0].add(0.5).at[1, 8].add(9.0)  # the second is padding
    found = grpo_metrics(
        *(given[name] for name in ("logp", "entropy", "mask", "advantages")), Grpo(), sampler_logps=off
    )
    assert float(found["sampler/logprob_diff"].total) == pytest.approx(0.5)
    assert float(found["sampler/logprob_diff_max"].total) == pytest.approx(0.5)
