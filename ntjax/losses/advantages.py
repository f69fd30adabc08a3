"""Rewards to advantages, on the host.

Axes: N completions, F rewards, G completions a prompt, B rows, C time of completions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ntjax.metrics import Mean, Metrics

EPS = 1e-4  # TRL's, added to standard deviations


@dataclass(frozen=True)
class Advantages:
    """`advantages` [N], 0 where nothing is known; `rewards` [N], NaN there; TRL's metrics of both."""

    advantages: np.ndarray
    rewards: np.ndarray
    metrics: Metrics


def group_advantages(
    scores: np.ndarray, weights: np.ndarray, group: int, scale: str, aggregation: str = "sum_then_normalize"
) -> Advantages:
    """How much better each completion is than the others of its prompt (GRPO, arXiv:2402.03300).

    `scores` [N, F], NaN where a reward abstained, `group` neighbours a prompt. Their weighted sum, less the group's
    mean, is divided by the group's standard deviation or the batch's (`scale` "group", "batch") or not at all
    ("none", Dr. GRPO, arXiv:2503.20783). "normalize_then_sum" does so with each reward by itself, and then with
    the sum over the batch (GDPO, arXiv:2601.05242). A completion that no reward judged has no part in either.
    """
    unjudged = np.isnan(scores).all(axis=1)
    rewards = np.where(unjudged, np.nan, np.nansum(scores * weights, axis=1))
    if aggregation == "normalize_then_sum":
        each = scores.reshape(-1, group, scores.shape[1])
        normal = (each - _mean(each, 1)) / (_deviation(each, 1) + EPS)
        summed = np.nansum(normal.reshape(scores.shape) * weights, axis=1)
        summed = np.where(unjudged, np.nan, summed)
        deviation = np.broadcast_to(_deviation(summed, 0), summed.shape)
        advantages = (summed - _mean(summed, 0)) / (deviation + EPS)
    else:
        grouped = rewards.reshape(-1, group)
        deviation = np.repeat(_deviation(grouped, 1), group)
        if scale == "batch":
            deviation = np.broadcast_to(_deviation(rewards, 0), rewards.shape)
        advantages = (grouped - _mean(grouped, 1)).reshape(-1)
        if scale != "none":
            advantages = advantages / (deviation + EPS)
    known = rewards[~unjudged]
    several = len(known) > 1
    metrics = {
        "reward": Mean(float(known.sum()), float(len(known))),
        "reward_std": Mean(float(known.std(ddof=1)) if several else 0.0, float(several)),
        "frac_reward_zero_std": Mean(float(np.isclose(deviation, 0).mean()), 1.0),
    }
    return Advantages(np.nan_to_num(advantages), rewards, metrics)


def overlong_penalty(lengths: np.ndarray, most: int, cache: int) -> np.ndarray:
    """[N] 0 up to `most - cache` tokens, then falling to -1 at `most` (DAPO, arXiv:2503.14476, eq. 13)."""
    return np.clip((most - cache - np.asarray(lengths)) / cache, -1, 0)


def gae(
    rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns [B, C] of rewards and values [B, C] (arXiv:1506.02438, eq. 16); outside `mask`, 0.

    The episode ends with the last token in the mask: nothing is worth anything after it.
    """
    rewards, values = rewards * mask, values * mask
    advantages = np.zeros_like(values)
    following, ahead = np.zeros(len(values)), np.zeros(len(values))
    for t in reversed(range(values.shape[1])):
        error = rewards[:, t] + gamma * following - values[:, t]
        ahead = (error + gamma * lam * ahead) * mask[:, t]
        advantages[:, t], following = ahead, values[:, t]
    return advantages, (advantages + values) * mask


def whiten(x: np.ndarray, mask: np.ndarray, shift_mean: bool = True) -> np.ndarray:
    """x [B, C] with mean 0 (or its own) and variance 1 over the mask, Bessel's correction applied; outside, 0."""
    count = mask.sum()
    mean = (x * mask).sum() / max(count, 1)
    variance = (np.square(x - mean) * mask).sum() / max(count - 1, 1)
    white = (x - mean) / np.sqrt(variance + 1e-8)
    return (white if shift_mean else white + mean) * mask


def _mean(x: np.ndarray, axis: int) -> np.ndarray:
    """The mean of what is known along an axis, which is kept; NaN where nothing is."""
    count = (~np.isnan(x)).sum(axis=axis, keepdims=True)
    return np.where(count > 0, np.nansum(x, axis=axis, keepdims=True) / np.maximum(count, 1), np.nan)


def _deviation(x: np.ndarray, axis: int) -> np.ndarray:
    """The standard deviation of what is known, with Bessel's correction; NaN where fewer than two are, but 0 along
    an axis of one: a group of one has no spread."""
    if x.shape[axis] == 1:
        return np.zeros_like(_mean(x, axis))
    count = (~np.isnan(x)).sum(axis=axis, keepdims=True)
    squares = np.nansum(np.square(x - _mean(x, axis)), axis=axis, keepdims=True)
    return np.where(count > 1, np.sqrt(squares / np.maximum(count - 1, 1)), np.nan)
