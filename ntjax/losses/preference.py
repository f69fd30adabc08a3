"""Losses on pairs of answers, of which one is preferred: DPO and its relatives, under TRL's names.

Axes: B slots, 2 the chosen and the rejected row of a slot, T time, S pairs of a slot, N = B * S places for pairs, of
which some are empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid

from ntjax.losses.pairs import Pairs, Targets, gather_pairs
from ntjax.metrics import Mean, Metrics
from ntjax.ops.logprobs import TokenLogprobs


@dataclass(frozen=True)
class Preference:
    """What is minimised: losses by name, their weights (1 each if None) and their parameters, as `stages.dpo` has them.

    `rpo_alpha` times the NLL of a token of the chosen completions is added to the whole, as TRL did before 1.0.
    """

    losses: tuple[str, ...] = ("sigmoid",)
    weights: tuple[float, ...] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0
    rpo_alpha: float | None = None
    ld_alpha: float | None = None
    use_weighting: bool = False


def per_pair(name: str, pairs: Pairs, preference: Preference) -> jax.Array:
    """The loss `name` of each pair [N]; of an empty place, a finite number."""
    return LOSSES[name](pairs, preference)


def preference_loss(pairs: Pairs, preference: Preference) -> Mean:
    """The weighted sum of the losses over the pairs, and the number of pairs.

    Losses of tokens (sft, the NLLs of rpo_alpha, cpo and orpo) are means over the microbatch's tokens, as in TRL.
    """
    weights = preference.weights or (1.0,) * len(preference.losses)
    total = jnp.zeros(pairs.valid.shape)
    for name, weight in zip(preference.losses, weights, strict=True):
        total += weight * per_pair(name, pairs, preference) * pairs.weight
    if preference.rpo_alpha is not None:
        total += preference.rpo_alpha * pairs.nll
    return _mean(total, pairs.valid)


def preference_metrics(
    scores: TokenLogprobs,
    mean_logits: jax.Array,
    ref_logps: jax.Array | None,
    targets: Targets,
    preference: Preference,
) -> Metrics:
    """The loss with TRL's DPO metrics; scores and mean_logits [B, 2, T], ref_logps [B, 2, S] or None.

    Rewards are beta (log pi - log pi_ref), or without a reference beta log pi, averaged over the tokens for the losses
    that do so, as TRL's CPO and ORPO trainers have it.
    """
    pairs = gather_pairs(scores, ref_logps, targets, preference.ld_alpha, preference.use_weighting)
    chosen, rejected = pairs.averages() if set(preference.losses) <= AVERAGED else pairs[:2]
    # An empty place has -1 for a reference too.
    ratios = (chosen, rejected) if ref_logps is None else (pairs.chosen_ratio, pairs.rejected_ratio)
    rewards = [preference.beta * ratio for ratio in ratios]
    chosen_mask, rejected_mask = targets.mask[:, 0], targets.mask[:, 1]
    metrics = {
        "loss": preference_loss(pairs, preference),
        "entropy": _mean(scores.entropy, targets.mask),
        "mean_token_accuracy": _mean(scores.correct[:, 0], chosen_mask),
        "logits/chosen": _mean(mean_logits[:, 0], chosen_mask),
        "logits/rejected": _mean(mean_logits[:, 1], rejected_mask),
        "rewards/chosen": _mean(rewards[0], pairs.valid),
        "rewards/rejected": _mean(rewards[1], pairs.valid),
        "rewards/accuracies": _mean(rewards[0] > rewards[1], pairs.valid),
        "rewards/margins": _mean(rewards[0] - rewards[1], pairs.valid),
        "logps/chosen": _mean(chosen, pairs.valid),
        "logps/rejected": _mean(rejected, pairs.valid),
    }
    if set(preference.losses) & LEARNS_CHOSEN:
        learned = pairs.document_nll if "orpo" in preference.losses else pairs.nll
        metrics["nll_loss"] = _mean(jnp.broadcast_to(learned, pairs.valid.shape), pairs.valid)
    if "orpo" in preference.losses:
        odds = _log_odds(pairs)
        metrics["log_odds_chosen"] = _mean(odds, pairs.valid)
        metrics["log_odds_ratio"] = _mean(log_sigmoid(odds), pairs.valid)
    return metrics


def _mean(values: jax.Array, mask: jax.Array) -> Mean:
    return Mean(jnp.where(mask, values, 0).sum(dtype=jnp.float32), mask.sum(dtype=jnp.float32))


def _divergence(ratio: jax.Array, preference: Preference) -> jax.Array:
    """f'(t) of the log-ratio log t (arXiv:2309.16240), without the constants that cancel between the answers."""
    power = preference.f_alpha - 1
    name = preference.f_divergence
    if name == "forward_kl":
        return 1 - jnp.exp(-ratio)
    if name == "js_divergence":
        return math.log(2) + log_sigmoid(ratio)
    if name == "alpha_divergence" and abs(power) >= 1e-6:
        return (jnp.exp(jnp.minimum(power * ratio, 80.0)) - 1) / power  # e^80 is within fp32
    return ratio


def _scores(p: Pairs, s: Preference) -> tuple[jax.Array, jax.Array]:
    return _divergence(p.chosen_ratio, s), _divergence(p.rejected_ratio, s)


def _logit(p: Pairs, s: Preference) -> jax.Array:
    """The log-odds that the chosen answer is preferred."""
    chosen, rejected = _scores(p, s)
    return s.beta * (chosen - rejected)


def _average_gap(p: Pairs, s: Preference) -> jax.Array:
    chosen, rejected = _scores(p, s)
    return chosen / p.chosen_count - rejected / p.rejected_count


def _smoothed(logit: jax.Array, s: Preference) -> jax.Array:
    """Logistic loss where a share `label_smoothing` of the labels is taken to be flipped."""
    return -(1 - s.label_smoothing) * log_sigmoid(logit) - s.label_smoothing * log_sigmoid(-logit)


def _sigmoid(p: Pairs, s: Preference) -> jax.Array:
    """DPO (arXiv:2305.18290)."""
    return -log_sigmoid(_logit(p, s))


def _hinge(p: Pairs, s: Preference) -> jax.Array:
    """SLiC (arXiv:2305.10425)."""
    return jax.nn.relu(1 - _logit(p, s))


def _ipo(p: Pairs, s: Preference) -> jax.Array:
    """IPO (arXiv:2310.12036, eq. 17), a token's share of the scores as its authors advise."""
    return (_average_gap(p, s) - 1 / (2 * s.beta)) ** 2


def _exo_pair(p: Pairs, s: Preference) -> jax.Array:
    """EXO (arXiv:2402.00856, eq. 16) for two answers: KL(softmax of the rewards || smoothed label)."""
    logit, flipped = _logit(p, s), s.label_smoothing
    won = sigmoid(logit) * (log_sigmoid(logit) - math.log1p(-flipped))
    return won + sigmoid(-logit) * (log_sigmoid(-logit) - math.log(flipped))


def _nca_pair(p: Pairs, s: Preference) -> jax.Array:
    """NCA (arXiv:2402.05369)."""
    chosen, rejected = s.beta * p.chosen_ratio, s.beta * p.rejected_ratio
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


def _robust(p: Pairs, s: Preference) -> jax.Array:
    """Robust DPO (arXiv:2403.00409): unbiased when a share `label_smoothing` of the labels is flipped."""
    logit, flipped = _logit(p, s), s.label_smoothing
    return (flipped * log_sigmoid(-logit) - (1 - flipped) * log_sigmoid(logit)) / (1 - 2 * flipped)


def _bco_pair(p: Pairs, s: Preference) -> jax.Array:
    """BCO (arXiv:2404.04656) without its reward shift."""
    return -log_sigmoid(s.beta * p.chosen_ratio) - log_sigmoid(-s.beta * p.rejected_ratio)


def _sppo_hard(p: Pairs, s: Preference) -> jax.Array:
    """SPPO (arXiv:2405.00675, eq. 4.7), the chosen answer winning with probability 1."""
    return (p.chosen_ratio - 0.5 / s.beta) ** 2 + (p.rejected_ratio + 0.5 / s.beta) ** 2


def _aot(p: Pairs, s: Preference) -> jax.Array:
    """AOT (arXiv:2406.05882): the policy's k-th smallest gap of the microbatch against the reference's k-th."""
    gap, ref_gap = p.chosen - p.rejected, p.ref_chosen - p.ref_rejected
    return _smoothed(s.beta * (gap - _of_equal_rank(gap, ref_gap, p.valid)), s)


def _aot_unpaired(p: Pairs, s: Preference) -> jax.Array:
    """AOT (arXiv:2406.05882): the k-th smallest chosen ratio of the microbatch against the k-th rejected one."""
    return _smoothed(s.beta * (p.chosen_ratio - _of_equal_rank(p.chosen_ratio, p.rejected_ratio, p.valid)), s)


def _of_equal_rank(x: jax.Array, y: jax.Array, valid: jax.Array) -> jax.Array:
    """For each of x [N] the element of y that has its rank, among the valid ones."""
    order_x, order_y = (jnp.argsort(jnp.where(valid, each, jnp.inf)) for each in (x, y))
    return y[order_y][jnp.argsort(order_x)]


def _apo_zero(p: Pairs, s: Preference) -> jax.Array:
    """APO-zero (arXiv:2408.06266, eq. 7): for chosen answers better than the model's."""
    return sigmoid(-s.beta * p.chosen_ratio) + sigmoid(s.beta * p.rejected_ratio)


def _apo_down(p: Pairs, s: Preference) -> jax.Array:
    """APO-down (arXiv:2408.06266, eq. 8): for chosen answers worse than the model's."""
    return sigmoid(s.beta * p.chosen_ratio) + sigmoid(-s.beta * (p.chosen_ratio - p.rejected_ratio))


def _discopop(p: Pairs, s: Preference) -> jax.Array:
    """DiscoPOP (arXiv:2406.08414, eq. 5): logistic and exponential, blended by the logit."""
    logit = _logit(p, s)
    blend = sigmoid(logit / s.discopop_tau)
    return -log_sigmoid(logit) * (1 - blend) + jnp.exp(-logit) * blend


def _sft(p: Pairs, s: Preference) -> jax.Array:
    """The NLL of a token of the chosen completions, the same for every pair."""
    return jnp.broadcast_to(p.nll, p.valid.shape)


def _sigmoid_norm(p: Pairs, s: Preference) -> jax.Array:
    """DPO on a token's share of the scores (arXiv:2411.15124, sec. 5)."""
    return -log_sigmoid(s.beta * _average_gap(p, s))


def _simpo(p: Pairs, s: Preference) -> jax.Array:
    """SimPO (arXiv:2405.14734), and cpo_alpha times the NLL of the chosen completions."""
    chosen, rejected = p.averages()
    return _smoothed(s.beta * (chosen - rejected) - s.simpo_gamma, s) + s.cpo_alpha * p.nll


def _cpo(p: Pairs, s: Preference) -> jax.Array:
    """CPO (arXiv:2401.08417, eq. 3), the NLL of the chosen completions weighed by cpo_alpha."""
    return _smoothed(s.beta * (p.chosen - p.rejected), s) + s.cpo_alpha * p.nll


def _orpo(p: Pairs, s: Preference) -> jax.Array:
    """ORPO (arXiv:2403.07691, eq. 6): the NLL of whole chosen documents, as TRL has it, and the odds ratio."""
    return p.document_nll - s.beta * log_sigmoid(_log_odds(p))


def _log_odds(p: Pairs) -> jax.Array:
    """log of odds(chosen) / odds(rejected), of mean log-probabilities of a token."""
    # The odds of a certain answer are infinite.
    chosen, rejected = (jnp.minimum(each, -1e-6) for each in p.averages())
    return (chosen - rejected) - (jnp.log(-jnp.expm1(chosen)) - jnp.log(-jnp.expm1(rejected)))


LOSSES: dict[str, Callable[[Pairs, Preference], jax.Array]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sft": _sft,
    "sigmoid_norm": _sigmoid_norm,
    "simpo": _simpo,
    "cpo": _cpo,
    "orpo": _orpo,
}
AVERAGED = {"simpo", "orpo"}  # take mean log-probabilities of a token, not sums
LEARNS_CHOSEN = {"simpo", "cpo", "orpo"}  # have an NLL in them, which is logged
