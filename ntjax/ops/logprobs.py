"""Per-token log-probabilities from hidden states, never holding [batch, time, vocab].

Axes: B batch, T time, D embed, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ntjax.weights import einsum

CHUNK_BYTES = 2**27  # of fp32 logits alive at a time


class TokenLogprobs(NamedTuple):
    """Of each token given those before it: log-probability, the distribution's entropy (nats), was it the mode.

    `log_collision` is the log of the sum of squared probabilities. What isn't used of them isn't computed.
    """

    logp: jax.Array  # [B, T] fp32
    entropy: jax.Array  # [B, T] fp32, no gradient
    correct: jax.Array  # [B, T] bool
    log_collision: jax.Array  # [B, T] fp32, no gradient


@jax.custom_vjp
def token_logprobs(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> TokenLogprobs:
    """log p(targets | hidden): hidden [B, T, D], head [V, D], targets [B, T] int32.

    Logits exist for a chunk of time at once, and again in the backward pass, which keeps only each position's log of
    the sum of exponentials. The gradient of the chosen logit is taken by comparison: a gather's would be a scatter.
    """
    return _forward(hidden, head, targets)[0]


def _forward(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[TokenLogprobs, tuple]:
    def chunk(carry: None, part: tuple) -> tuple[None, tuple]:
        h, t = part
        logits = _logits(h, head).astype(jnp.float32)
        top = jnp.max(logits, axis=-1, keepdims=True)
        exps = jnp.exp(logits - top)
        total = jnp.sum(exps, axis=-1)
        log_z = top[..., 0] + jnp.log(total)
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        chosen = jnp.sum(jnp.where(ids == t[..., None], logits, 0), axis=-1)
        # The first of the largest, as argmax, which XLA on CPU doesn't vectorise.
        mode = jnp.min(jnp.where(logits == top, ids, logits.shape[-1]), axis=-1)
        entropy = log_z - jnp.sum(exps * logits, axis=-1) / total
        log_collision = jnp.log(jnp.sum(jnp.square(exps), axis=-1)) - 2 * jnp.log(total)
        return None, (TokenLogprobs(chosen - log_z, entropy, mode == t, log_collision), log_z)

    scores, log_z = _over_chunks(chunk, None, (hidden, targets), head)[1]
    return scores, (hidden, head, targets, log_z)


def _backward(kept: tuple, grads: TokenLogprobs) -> tuple[jax.Array, jax.Array, None]:
    hidden, head, targets, log_z = kept

    def chunk(d_head: Any, part: tuple) -> tuple[Any, jax.Array]:
        h, t, z, g = part
        logits, pull = jax.vjp(_logits, h, head)
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        probs = jnp.exp(logits.astype(jnp.float32) - z[..., None])
        d_logits = g[..., None] * ((ids == t[..., None]) - probs)
        d_hidden, d_part = pull(d_logits.astype(logits.dtype))
        return jax.tree.map(jnp.add, d_head, d_part), d_hidden

    zeros = jax.tree.map(jnp.zeros_like, head)
    d_head, d_hidden = _over_chunks(chunk, zeros, (hidden, targets, log_z, grads.logp), head)
    return d_hidden, d_head, None


token_logprobs.defvjp(_forward, _backward)


def _logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    return einsum("BTD,VD->BTV", hidden, head)


def _over_chunks(body: Callable, carry: Any, arrays: tuple, head: jax.Array) -> tuple[Any, Any]:
    """`lax.scan` of `body` over pieces of time of `arrays`, each [B, T, ...], whose logits fit CHUNK_BYTES."""
    batch, time = arrays[0].shape[:2]
    largest = max(1, CHUNK_BYTES // (4 * batch * head.shape[0]))
    chunks = -(-time // largest)
    size = -(-time // chunks)
    if chunks == 1:
        return body(carry, arrays)

    def split(x: jax.Array) -> jax.Array:
        pad = [(0, 0), (0, chunks * size - time), *[(0, 0)] * (x.ndim - 2)]
        return jnp.pad(x, pad).reshape(batch, chunks, size, *x.shape[2:]).swapaxes(0, 1)

    def join(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(batch, chunks * size, *x.shape[3:])[:, :time]

    carry, parts = jax.lax.scan(body, carry, jax.tree.map(split, arrays))
    return carry, jax.tree.map(join, parts)
