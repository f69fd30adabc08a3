"""How a token is drawn from logits: transformers' processors in transformers' order, then one uniform number a row.

Axes: R rows, V vocabulary, n pieces of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

PIECE = 256  # tokens whose probabilities are summed at once


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Temperature 0 takes the likeliest; top_k 0, top_p 1, min_p 0 and
    repetition_penalty 1 change nothing.

    Tokens that are `never` drawn aren't. A completion ends with one of `stop_ids`, with the token that completes one
    of `stop_strings`, or after `max_new_tokens`.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    never: tuple[int, ...] = ()


class Token(NamedTuple):
    """Ids [R] int32 and their log-probs [R] fp32 under the softmax of logits / temperature (at 0: of logits), whatever
    the penalty and what was cut off."""

    ids: jax.Array
    logprobs: jax.Array


def draw(logits: jax.Array, uniform: jax.Array, sampling: Sampling, seen: jax.Array | None = None) -> Token:
    """A token a row from logits [R, V] fp32 and numbers [R] in [0, 1); `seen` [R, V] are those penalised."""
    scale = 1 / sampling.temperature if sampling.temperature else 1.0
    if sampling.repetition_penalty == 1 or seen is None:
        scaled = kept = logits * scale
    else:
        scaled, kept = logits * scale, penalised(logits, seen, sampling.repetition_penalty) * scale
    if sampling.never:
        kept = kept.at[:, jnp.array(sampling.never)].set(-jnp.inf)
    top = scaled.max(axis=-1, keepdims=True)
    exps = jnp.exp(scaled - top)
    if sampling.temperature == 0:
        ids = jnp.argmax(kept, axis=-1).astype(jnp.int32)
    elif kept is scaled and not _cuts(sampling):
        ids = inverse(exps, uniform)
    else:
        kept = cut(kept, sampling)
        ids = inverse(jnp.exp(kept - kept.max(axis=-1, keepdims=True)), uniform)
    chosen = jnp.take_along_axis(scaled, ids[:, None], axis=-1)
    return Token(ids, (chosen - top)[:, 0] - jnp.log(exps.sum(axis=-1)))


def inverse(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The token at which the running sum of weights [R, V] passes uniform [R] times their total: ids [R].

    Sums of pieces are looked through first and then one piece: no noise and no running sum is as long as the
    vocabulary.
    """
    rows, vocab = weights.shape
    pieces = jnp.pad(weights, ((0, 0), (0, -vocab % PIECE))).reshape(rows, -1, PIECE)
    sums = pieces.sum(axis=-1)
    piece, left = _passed(sums, uniform * sums.sum(axis=-1))
    inside = jnp.take_along_axis(pieces, piece[:, None, None], axis=1)[:, 0]
    token, _ = _passed(inside, left)
    return (piece * PIECE + token).astype(jnp.int32)


def _passed(weights: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where running sums of weights [R, n] pass a target [R], and what is left of it there. Rounding never ends on
    a weight of zero: the largest is taken then."""
    sums = jnp.cumsum(weights, axis=-1)
    at = jnp.minimum((sums <= target[:, None]).sum(axis=-1), weights.shape[1] - 1)
    found = jnp.take_along_axis(weights, at[:, None], axis=-1)[:, 0]
    at = jnp.where(found > 0, at, jnp.argmax(weights, axis=-1))
    before = jnp.take_along_axis(sums - weights, at[:, None], axis=-1)[:, 0]
    return at, jnp.maximum(target - before, 0)


def penalised(logits: jax.Array, seen: jax.Array, penalty: float) -> jax.Array:
    """Logits [R, V], those of tokens seen divided by the penalty, or multiplied where negative (arXiv:1909.05858)."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def cut(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits [R, V] with -inf for all but the top k, then the nucleus (arXiv:1904.09751), then what has at least
    min_p of the likeliest's probability (arXiv:2407.01082)."""
    vocab = logits.shape[-1]
    if sampling.top_k:
        least = jax.lax.top_k(logits, min(sampling.top_k, vocab))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        least = jnp.min(jnp.where(before < sampling.top_p, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.min_p:
        top = logits.max(axis=-1, keepdims=True)
        logits = jnp.where(logits - top < jnp.log(sampling.min_p), -jnp.inf, logits)
    return logits


def _cuts(sampling: Sampling) -> bool:
    return bool(sampling.top_k or sampling.top_p < 1 or sampling.min_p)
