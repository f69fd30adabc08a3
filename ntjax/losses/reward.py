"""The loss of a reward model: Bradley-Terry on pairs of answers. Axes: N places for pairs, of which some are empty."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ntjax.metrics import Mean, Metrics


def reward_metrics(
    chosen: jax.Array,
    rejected: jax.Array,
    valid: jax.Array,
    margin: jax.Array | None = None,
    center: float | None = None,
) -> Metrics:
    """-log sigmoid(chosen - rejected - margin) of the pairs, with TRL's metrics; all [N].

    `center` times (chosen + rejected)^2 is added (arXiv:2312.09244). min_reward and max_reward are of a microbatch,
    and means over microbatches when several are added.
    """
    chosen, rejected = (jnp.where(valid, each, 0.0) for each in (chosen, rejected))
    gap = chosen - rejected
    losses = -jax.nn.log_sigmoid(gap if margin is None else gap - margin)
    if center is not None:
        losses += center * (chosen + rejected) ** 2
    count = valid.sum(dtype=jnp.float32)
    some = valid.any()
    lowest = jnp.where(valid, jnp.minimum(chosen, rejected), jnp.inf).min()
    highest = jnp.where(valid, jnp.maximum(chosen, rejected), -jnp.inf).max()
    return {
        "loss": Mean(jnp.where(valid, losses, 0).sum(), count),
        "min_reward": Mean(jnp.where(some, lowest, 0), some.astype(jnp.float32)),
        "mean_reward": Mean((chosen + rejected).sum(), 2 * count),
        "max_reward": Mean(jnp.where(some, highest, 0), some.astype(jnp.float32)),
        "accuracy": Mean((gap > 0).sum(dtype=jnp.float32), count),
        "margin": Mean(gap.sum(), count),
    }
