"""The losses of proximal policy optimization, by the formulas of TRL 1.12.

Axes: B completions, C their time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ntjax.metrics import Mean, Metrics


def token_rewards(
    scores: np.ndarray,
    logps: np.ndarray,
    ref_logps: np.ndarray,
    mask: np.ndarray,
    kl_coef: float,
    kl_estimator: str = "k1",
) -> tuple[np.ndarray, np.ndarray]:
    """Rewards [B, C]: each token's penalty for leaving the reference, and the score [B] at the last one; and the KL
    divergence of each completion [B], by the estimator k1 or k3 of joschu.net/blog/kl-approx.html.

    TRL puts the score one token later where the batch is padded that far; here the last token has it always.
    """
    gap = (ref_logps - logps) * mask
    kl = -gap if kl_estimator == "k1" else np.exp(gap) - 1 - gap
    rewards = -kl_coef * kl
    lengths = mask.sum(axis=1)
    rows = np.flatnonzero(lengths)
    rewards[rows, lengths[rows] - 1] += scores[rows]
    return rewards, kl.sum(axis=1)


def adaptive_kl(coef: float, kl: float, target: float, horizon: int, episodes: int) -> float:
    """The next coefficient: up where the divergence was above the target, down where it was below
    (arXiv:1909.08593, section 2.2)."""
    error = float(np.clip(kl / target - 1, -0.2, 0.2))
    return coef * (1 + error * episodes / horizon)


def ppo_metrics(
    logp: jax.Array,
    entropy: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    *,
    old_logps: jax.Array,
    old_values: jax.Array,
    advantages: jax.Array,
    returns: jax.Array,
    cliprange: float,
    cliprange_value: float,
    vf_coef: float,
) -> Metrics:
    """The clipped losses of policy and values (arXiv:1707.06347, eq. 7 and 9), means over the tokens of a step, with
    TRL's metrics; all [B, C].

    Metrics are of tokens: TRL's means of the KL divergence, entropies and ratios count padding too, and its
    val/ratio_var is that of microbatches' means.
    """
    mask = mask.astype(jnp.float32)
    tokens = mask.sum()
    gap = (logp - old_logps) * mask
    ratio = jnp.exp(gap)
    plain, clipped = -advantages * ratio, -advantages * jnp.clip(ratio, 1 - cliprange, 1 + cliprange)
    policy = jnp.maximum(plain, clipped)
    near = jnp.clip(values, old_values - cliprange_value, old_values + cliprange_value)
    error, near_error = jnp.square(values - returns), jnp.square(near - returns)
    value = 0.5 * jnp.maximum(error, near_error)

    def mean(x: jax.Array) -> Mean:
        return Mean((x * mask).sum(), tokens)

    spread = jnp.square(ratio - _masked_mean(ratio, mask))
    return {
        "loss": mean(policy + vf_coef * value),
        "loss/policy_avg": mean(policy),
        "loss/value_avg": mean(value),
        "policy/approxkl_avg": mean(0.5 * jnp.square(gap)),
        "policy/clipfrac_avg": mean(clipped > plain),
        "policy/entropy_avg": mean(entropy),
        "val/clipfrac_avg": mean(near_error > error),
        "val/ratio": mean(ratio),
        "val/ratio_var": mean(spread),
    }


def _masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    return (x * mask).sum() / jnp.maximum(mask.sum(), 1)
