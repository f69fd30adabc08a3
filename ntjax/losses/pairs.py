"""Pairs of answers, from the scores of their tokens.

Axes: B slots, 2 the chosen and the rejected row of a slot, T time, S pairs of a slot, N = B * S places for pairs, of
which some are empty.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ntjax.losses.documents import completion_weights, document_sums
from ntjax.ops.logprobs import TokenLogprobs


class Targets(NamedTuple):
    """Of the token that each position predicts: is it learned, and whose is it; and which pairs there are."""

    mask: jax.Array  # [B, 2, T] bool
    inside: jax.Array  # [B, 2, T] bool: it is of the position's own document, learned or not
    segments: jax.Array  # [B, 2, T]
    pairs: jax.Array  # [B, S] bool

    @classmethod
    def of(cls, mask: jax.Array, segments: jax.Array, pairs: jax.Array) -> Targets:
        """Of the mask and the segments of the tokens [B, 2, T]. The last position predicts nothing."""
        following, learned = (jnp.pad(x[..., 1:], ((0, 0), (0, 0), (0, 1))) for x in (segments, mask))
        return cls(learned, (following == segments) & (following > 0), following, pairs)


def apart(mask: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mask and segments of tokens [B, 1, T], whose rows hold both documents of each pair, as those of either [B, 2, T].

    What pair k's documents begin with is segment 3k + 1, what was chosen 3k + 2, what was rejected 3k + 3. They become
    segment k + 1 on the side whose document they belong to, the beginning on both, and nothing on the other.
    """
    pair, part = (segments + 2) // 3, (segments + 2) % 3
    owned = jnp.concatenate([part != 2, part != 1], axis=1)
    return mask & owned, jnp.where(owned, pair, 0)


class Pairs(NamedTuple):
    """Sums of log-probabilities over completions and numbers of their tokens, [N] fp32 each.

    An empty place holds -1 four times: a pair at which every loss and its gradient are finite.
    """

    chosen: jax.Array
    rejected: jax.Array
    ref_chosen: jax.Array
    ref_rejected: jax.Array
    chosen_count: jax.Array  # at least 1
    rejected_count: jax.Array
    valid: jax.Array  # [N] bool
    nll: jax.Array  # [], a token of the chosen completions
    document_nll: jax.Array  # [], a token of the chosen documents, prompts included
    weight: jax.Array  # [N], WPO's

    @property
    def chosen_ratio(self) -> jax.Array:
        """log pi(chosen) - log pi_ref(chosen)."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> jax.Array:
        """log pi(rejected) - log pi_ref(rejected)."""
        return self.rejected - self.ref_rejected

    def averages(self) -> tuple[jax.Array, jax.Array]:
        """Mean log-probability of a token, chosen and rejected."""
        return self.chosen / self.chosen_count, self.rejected / self.rejected_count


def completion_sums(logp: jax.Array, targets: Targets, ld_alpha: float | None) -> jax.Array:
    """Log-probabilities of completions [B, 2, S] from those of tokens [B, 2, T]."""
    documents = targets.pairs.shape[1]
    weights = completion_weights(targets.mask, targets.segments, documents, ld_alpha)
    return document_sums(weights * logp, targets.mask, targets.segments, documents)


def gather_pairs(
    scores: TokenLogprobs,
    ref_logps: jax.Array | None,
    targets: Targets,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
) -> Pairs:
    """The pairs of a microbatch: scores [B, 2, T]; ref_logps [B, 2, S], None where no loss looks at the reference."""
    documents = targets.pairs.shape[1]
    valid = targets.pairs.reshape(-1)

    def flat(x: jax.Array, empty: float) -> tuple[jax.Array, jax.Array]:
        chosen, rejected = (jnp.where(valid, x[:, side].reshape(-1), empty) for side in (0, 1))
        return chosen, rejected

    def token_mean(where: jax.Array) -> jax.Array:
        return -jnp.where(where, scores.logp[:, 0], 0).sum() / jnp.maximum(where.sum(), 1)

    sums = completion_sums(scores.logp, targets, ld_alpha)
    counts = document_sums(targets.mask.astype(jnp.float32), targets.mask, targets.segments, documents)
    weight = jnp.ones(valid.shape)
    if use_weighting:
        excess = jax.lax.stop_gradient(scores.logp - scores.log_collision)
        excess = document_sums(excess, targets.mask, targets.segments, documents)
        weight = jnp.exp(sum(flat(excess / jnp.maximum(counts, 1), 0.0)))
    return Pairs(
        *flat(sums, -1.0),
        *flat(jnp.zeros_like(sums) if ref_logps is None else ref_logps, -1.0),
        *flat(jnp.maximum(counts, 1), 1.0),
        valid,
        token_mean(targets.mask[:, 0]),
        token_mean(targets.inside[:, 0]),
        weight,
    )
