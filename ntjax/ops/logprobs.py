"""Per-token log-probabilities from hidden states, never holding [batch, time, vocab].

Axes: B batch, T time, D embed, V vocab.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ntjax.weights import einsum

CHUNK_BYTES = 2**27  # of fp32 logits alive at a time


class TokenLogprobs(NamedTuple):
    """Of each token given those before it: log-probability, the distribution's entropy (nats), was it the mode."""

    logp: jax.Array  # [B, T] fp32
    entropy: jax.Array  # [B, T] fp32, no gradient
    correct: jax.Array  # [B, T] bool


def token_logprobs(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> TokenLogprobs:
    """log p(targets | hidden): hidden [B, T, D], head [V, D], targets [B, T] int32.

    Runs over chunks of time; the backward pass forms each chunk's logits again.
    """
    batch, time, _ = hidden.shape
    size = max(1, min(time, CHUNK_BYTES // (4 * batch * head.shape[0])))
    chunks = -(-time // size)
    if chunks == 1:
        return _scores(hidden, head, targets)

    def by_chunk(x: jax.Array) -> jax.Array:
        pad = [(0, 0), (0, chunks * size - time), *[(0, 0)] * (x.ndim - 2)]
        return jnp.pad(x, pad).reshape(batch, chunks, size, *x.shape[2:]).swapaxes(0, 1)

    _, scores = jax.lax.scan(
        jax.checkpoint(lambda carry, chunk: (carry, _scores(chunk[0], head, chunk[1])), prevent_cse=False),
        None,
        (by_chunk(hidden), by_chunk(targets)),
    )
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, -1)[:, :time], scores)


def _scores(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> TokenLogprobs:
    logits = einsum("BTD,VD->BTV", hidden, head).astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    fixed = jax.lax.stop_gradient(logits - log_z[..., None])
    entropy = -jnp.sum(jnp.exp(fixed) * fixed, axis=-1)
    return TokenLogprobs(chosen - log_z, entropy, jnp.argmax(fixed, axis=-1) == targets)
