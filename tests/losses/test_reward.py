"""The reward model's loss is TRL's on the same scores, and a document's score is that at its last token."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ntjax.losses.reward import reward_metrics
from ntjax.metrics import add, finish
from ntjax.stages.reward import Options

CHOSEN = np.array([0.3, -1.2, 2.5, 0.7], np.float32)
REJECTED = np.array([-0.4, 0.9, 2.4, 0.7], np.float32)
MARGIN = np.array([0.0, 1.0, 0.5, 2.0], np.float32)


def by_trl(margin: np.ndarray | None, center: float | None) -> tuple[dict[str, float], np.ndarray]:
    """Loss and metrics of TRL's RewardTrainer, and the loss's gradient to the scores [2, N]."""
    from trl import RewardTrainer

    logits = torch.tensor(np.concatenate([CHOSEN, REJECTED])[:, None], requires_grad=True)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=center),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )
    inputs: dict[str, Any] = {} if margin is None else {"margin": torch.tensor(margin)}
    loss = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=logits), inputs)
    loss.backward()
    metrics = {name: values[0] for name, values in trainer._metrics["eval"].items() if name != "num_tokens"}
    assert logits.grad is not None
    return {"loss": loss.item(), **metrics}, logits.grad.numpy().reshape(2, -1)


def mean_loss(scores: jax.Array, *arguments: Any) -> Any:
    metrics = reward_metrics(scores[0], scores[1], *arguments)
    return metrics["loss"].total / metrics["loss"].weight, metrics


@pytest.mark.parametrize("center", [None, 0.01])
@pytest.mark.parametrize("margin", [None, MARGIN], ids=["plain", "margins"])
def test_loss_gradient_and_metrics_are_trls(margin: np.ndarray | None, center: float | None) -> None:
    theirs, gradient = by_trl(margin, center)
    scores = jnp.stack([CHOSEN, REJECTED])
    ours, metrics = jax.grad(mean_loss, has_aux=True)(scores, jnp.ones(4, bool), margin, center)
    assert finish(metrics) == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(ours, gradient, atol=1e-6)


def test_empty_places_change_nothing_and_have_no_gradient() -> None:
    scores = jnp.stack([CHOSEN, REJECTED])
    valid = jnp.arange(6) < 4
    padded = jnp.pad(scores, ((0, 0), (0, 2)), constant_values=jnp.inf)
    margin = jnp.pad(MARGIN, (0, 2), constant_values=7.0)
    whole = jax.grad(mean_loss, has_aux=True)(scores, jnp.ones(4, bool), MARGIN, 0.1)
    gradient, metrics = jax.grad(mean_loss, has_aux=True)(padded, valid, margin, 0.1)
    assert finish(metrics) == pytest.approx(finish(whole[1]), rel=1e-6)
    np.testing.assert_allclose(gradient, jnp.pad(whole[0], ((0, 0), (0, 2))), atol=1e-7)


def test_extremes_of_microbatches_are_averaged_and_empty_ones_left_out() -> None:
    one = reward_metrics(jnp.array([1.0, 5.0]), jnp.array([0.0, 2.0]), jnp.array([True, False]))
    two = reward_metrics(jnp.array([4.0]), jnp.array([-2.0]), jnp.array([True]))
    none = reward_metrics(jnp.array([9.0]), jnp.array([9.0]), jnp.array([False]))
    metrics = finish(add(add(one, two), none))
    assert (metrics["min_reward"], metrics["max_reward"]) == (-1.0, 2.5)


def test_a_document_is_scored_at_its_marked_token() -> None:
    """Hidden states are (token, position); the head counts tokens 1 and positions 10."""
    model: Any = SimpleNamespace(
        hidden=lambda params, ids, tokens: jnp.stack([ids, tokens.positions], -1).astype(jnp.float32),
        head=lambda params: params["score"],
    )
    batch = {
        "tokens": jnp.array([[[7, 2, 5, 3, 9], [4, 4, 4, 1, 9]]]),
        "positions": jnp.array([[[0, 1, 0, 1, 0], [0, 1, 2, 0, 0]]]),
        "segments": jnp.array([[[1, 1, 2, 2, 0], [1, 1, 1, 2, 0]]]),
        "mask": jnp.array([[[0, 1, 0, 1, 0], [0, 0, 1, 1, 0]]], bool),
        "pairs": jnp.array([[True, True, False]]),
        "margin": jnp.array([[1.0, 2.0, 0.0]]),
    }
    metrics = Options(stage_type="reward").loss(model)({"score": jnp.array([[1.0, 10.0]])}, batch)
    # Chosen 2 + 10 and 3 + 10, rejected 4 + 20 and 1 + 0.
    assert finish(metrics)["margin"] == (12 - 24 + 13 - 1) / 2
    losses = [np.log1p(np.exp(12 + 1)), np.log1p(np.exp(-12 + 2))]
    assert finish(metrics)["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
