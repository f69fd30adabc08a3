"""Attention. One call site for every model; a backend is one function here.

Axes: B batch, T query time, S key time, K key/value heads, G query heads a key/value head, h head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tokens(NamedTuple):
    """Where tokens stand: `positions` and `segments`, each [B, T] int32.

    Positions restart at 0 in every document of a packed row; segment 0 is padding. Within one segment,
    comparing positions is comparing time, so the same rule serves packed rows, left padding and a cache.
    """

    positions: jax.Array
    segments: jax.Array


def visible(queries: Tokens, keys: Tokens, window: int | None) -> jax.Array:
    """[B, T, S] bool: a query sees the keys of its own document, not after it, at most `window - 1` before it."""
    ahead = queries.positions[:, :, None] - keys.positions[:, None, :]
    seen = (queries.segments[:, :, None] == keys.segments[:, None, :]) & (ahead >= 0)
    return seen if window is None else seen & (ahead < window)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(h)) v over the keys that are `seen`.

    q [B, T, K*G, h], k and v [B, S, K, h], seen [B, T, S] -> [B, T, K*G, h]. Scores and softmax are fp32.
    A padding query sees the padding, so no row is empty and nothing is NaN.
    """
    batch, time, heads, head_dim = q.shape
    grouped = q.reshape(batch, time, k.shape[2], -1, head_dim)
    scores = jnp.einsum("BTKGh,BSKh->BKGTS", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(seen[:, None, None], scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BKGTS,BSKh->BTKGh", probs, v).reshape(batch, time, heads, head_dim)
