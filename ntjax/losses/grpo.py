"""The losses of group relative policy optimization, as TRL 1.16 has them.

Axes: B completions of a microbatch, C their time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ntjax.metrics import Mean, Metrics

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


@dataclass(frozen=True)
class Grpo:
    """TRL's options of its GRPO loss, under its names."""

    loss_type: str = "dapo"
    importance_sampling_level: str = "token"
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    use_bias_correction_kl: bool = True
    top_entropy_quantile: float = 1.0
    off_policy_mask_threshold: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    max_completion_length: int = 512

    @property
    def high(self) -> float:
        """How far above 1 a ratio may count."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


def grpo_metrics(
    logp: jax.Array,
    entropy: jax.Array,
    mask: jax.Array,
    advantages: jax.Array,
    settings: Grpo,
    *,
    old_logps: jax.Array | None = None,
    ref_logps: jax.Array | None = None,
    sampler_logps: jax.Array | None = None,
    items: jax.Array | None = None,
) -> Metrics:
    """The loss and TRL's metrics: `logp`, `entropy` and the other log-probs [B, C], `mask` [B, C], `advantages` [B].

    Without `old_logps` the policy that drew is the one that is trained. The loss of a step is the sum of its
    microbatches' totals over that of their weights: completions for grpo, sapo and luspo; 1 for bnpo, a mean over
    the microbatch's tokens; completions times `max_completion_length` for dr_grpo; tokens for dapo, cispo and
    vespo. There, `items` [B] are each completion's share of a window's tokens, where a window is several steps:
    the same in all of them, as in TRL. A completion whose mask is all false is still counted where completions are.
    """
    # Before any exp: what padding would get may be so unlikely that it overflows.
    logp = jnp.where(mask, logp, 0)
    old_logps, ref_logps, sampler_logps = (
        None if each is None else jnp.where(mask, each, 0) for each in (old_logps, ref_logps, sampler_logps)
    )
    mask = mask.astype(jnp.float32)
    advantage = advantages[:, None]
    old = jax.lax.stop_gradient(logp) if old_logps is None else old_logps
    log_ratio = logp - old
    weight = log_ratio
    if settings.importance_sampling_level == "sequence":  # GSPO, arXiv:2507.18071
        weight = _sequence_mean(log_ratio, mask)[:, None]
    ratio = jnp.exp(weight)
    loss, metrics = _policy_loss(logp, log_ratio, ratio, mask, advantage, settings)
    if settings.off_policy_mask_threshold is not None:  # DeepSeek-V3.2, arXiv:2512.02556
        drift = jax.lax.stop_gradient(_sequence_mean(old - logp, mask))[:, None]
        loss *= (advantage >= 0) | (drift <= settings.off_policy_mask_threshold)
    if settings.top_entropy_quantile < 1:
        loss = loss * _uncertain(entropy, mask, 1 - settings.top_entropy_quantile)
    tokens = mask.sum()
    if settings.beta:
        assert ref_logps is not None
        gap = ref_logps - logp
        kl = jnp.exp(gap) - gap - 1  # k3 of joschu.net/blog/kl-approx.html
        if settings.use_bias_correction_kl:
            kl = kl * ratio
        loss = loss + settings.beta * kl
        metrics["kl"] = Mean((kl * mask).sum(), tokens)
    metrics["entropy"] = Mean((entropy * mask).sum(), tokens)
    if sampler_logps is not None:
        gap = jnp.abs(logp - sampler_logps)
        metrics["sampler/logprob_diff"] = Mean(gap.sum(), tokens)
        metrics["sampler/logprob_diff_max"] = Mean(gap.max(), jnp.ones(()))
    share = tokens if items is None else items.sum()
    return {"loss": _reduced(loss * mask, mask, share, settings), **metrics}


def _policy_loss(
    logp: jax.Array,
    log_ratio: jax.Array,
    ratio: jax.Array,
    mask: jax.Array,
    advantage: jax.Array,
    settings: Grpo,
) -> tuple[jax.Array, Metrics]:
    """What each token costs [B, C], or [B, 1] where a sequence has one ratio, and the metrics of the loss type."""
    kind = settings.loss_type
    if kind == "cispo":  # arXiv:2506.13585
        clipped = jax.lax.stop_gradient(jnp.minimum(ratio, settings.high))
        above = (ratio > settings.high) & (advantage > 0)
        return -clipped * advantage * logp, {"cispo_clip_ratio": _mean(above, mask)}
    if kind == "sapo":  # arXiv:2511.20347
        hot = jnp.where(advantage > 0, settings.sapo_temperature_pos, settings.sapo_temperature_neg)
        return -jax.nn.sigmoid(hot * (ratio - 1)) * 4 / hot * advantage, {}
    if kind == "vespo":  # arXiv:2602.10693
        phi = jax.lax.stop_gradient(_gamma_weight(log_ratio, mask, advantage, settings))
        return -phi * advantage * logp, {"vespo/phi_seq_mean": Mean(phi.sum(), jnp.float32(len(phi)))}
    assert kind in CLIPPED, kind
    clipped = jnp.clip(ratio, 1 - settings.epsilon, 1 + settings.high)
    if settings.delta is not None:  # two-sided clipping, arXiv:2505.07291
        ratio = jnp.minimum(ratio, settings.delta)
    low = (ratio < 1 - settings.epsilon) & (advantage < 0)
    high = (ratio > 1 + settings.high) & (advantage > 0)
    metrics = {
        "clip_ratio/low_mean": _mean(low, mask),
        "clip_ratio/high_mean": _mean(high, mask),
        "clip_ratio/region_mean": _mean(low | high, mask),
        "clip_ratio/low_min": _extreme(low, mask, jnp.min, 1.0),
        "clip_ratio/high_max": _extreme(high, mask, jnp.max, 0.0),
    }
    return -jnp.minimum(ratio * advantage, clipped * advantage), metrics


def _reduced(loss: jax.Array, mask: jax.Array, items: jax.Array, settings: Grpo) -> Mean:
    """The microbatch's part of the step's loss [B, C], and what the step's sum of them is divided by."""
    count = jnp.float32(len(mask))
    match settings.loss_type:
        case "grpo" | "sapo":
            return Mean((loss.sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)).sum(), count)
        case "luspo":
            return Mean(loss.sum(), count)
        case "bnpo":
            return Mean(loss.sum() / jnp.maximum(mask.sum(), 1), jnp.ones(()))
        case "dr_grpo":
            return Mean(loss.sum(), count * settings.max_completion_length)
    return Mean(loss.sum(), items)


def _gamma_weight(log_ratio: jax.Array, mask: jax.Array, advantage: jax.Array, settings: Grpo) -> jax.Array:
    """VESPO's weight of a sequence [B, 1]: e^l w^k e^(-l w) of its ratio w, 1 at w = 1; 0 where that overflows."""
    log_w = (jnp.clip(log_ratio, -20, 20) * mask).sum(axis=1, keepdims=True)
    log_w = jnp.clip(log_w, math.log(1e-8), 20)
    good = advantage >= 0
    k = jnp.where(good, settings.vespo_k_pos, settings.vespo_k_neg)
    scale = jnp.maximum(jnp.where(good, settings.vespo_lambda_pos, settings.vespo_lambda_neg), 1e-4)
    return jnp.nan_to_num(jnp.exp(scale + k * log_w - scale * jnp.exp(log_w)), posinf=0.0)


def _uncertain(entropy: jax.Array, mask: jax.Array, quantile: float) -> jax.Array:
    """Tokens [B, C] whose entropy is at least the quantile of all in the mask (arXiv:2506.01939)."""
    there = jnp.where(mask > 0, entropy, jnp.inf).reshape(-1)
    at = quantile * jnp.maximum(mask.sum() - 1, 0)
    ordered, below = jnp.sort(there), jnp.floor(at).astype(jnp.int32)
    low, high = ordered[below], ordered[jnp.minimum(below + 1, len(ordered) - 1)]
    between = at - below
    threshold = jnp.where(between > 0, low + between * (high - low), low)
    return (entropy * mask >= threshold) & (mask > 0)


def _sequence_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """[B]"""
    return (x * mask).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)


def _extreme(x: jax.Array, mask: jax.Array, of: Callable[..., jax.Array], none: float) -> Mean:
    """The least or the greatest of the sequences' means; sequences without tokens have none, but of [B, 1] a value."""
    x = x.astype(jnp.float32)
    if x.shape[1] == 1:
        return Mean(of(x), jnp.ones(()))
    some = mask.any(axis=1)
    extreme = of(jnp.where(some, _sequence_mean(x, mask), none))
    return Mean(extreme * some.any(), some.any().astype(jnp.float32))


def _mean(x: jax.Array, mask: jax.Array) -> Mean:
    """Over tokens; of [B, 1], over sequences."""
    x = x.astype(jnp.float32)
    if x.shape[1] == 1:
        return Mean(x.sum(), jnp.float32(len(x)))
    return Mean((x * mask).sum(), mask.sum())
