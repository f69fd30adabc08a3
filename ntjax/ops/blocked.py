"""Attention anywhere: block by block of queries and of keys (FlashAttention, arXiv:2205.14135, in plain JAX).

Scores are those of one block at a time, formed again in the backward pass from the logarithm of each query's sum of
exponentials. Blocks of which no query sees a key are passed over: half of them in a long row, more in a packed one.

Axes: B batch, T query time, S key time, K key/value heads, G query heads a key/value head, h head_dim; m, n blocks of
queries and of keys, q queries of a block with those of all G heads, s keys of a block.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ntjax.ops.attention import Tokens, visible
from ntjax.ops.remat import named

BLOCK = 128  # queries, and keys, of a block: those whose scores stay in a CPU's cache
LEAST = jnp.finfo(jnp.float32).min


class Blocks(NamedTuple):
    """Queries [m, B, K, q, h], keys and values [n, B, K, s, h], and where they stand [m, B, q / G] and [n, B, s]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    queries: Tokens
    keys: Tokens


def blocked(
    q: jax.Array, k: jax.Array, v: jax.Array, queries: Tokens, keys: Tokens, window: int | None
) -> jax.Array:
    """`attention`. What the backward pass needs, the sums too, is named "attention" (`ops.remat`).

    Rows that fit one block, as when sampling, are left to `plain`.
    """
    batch, time, heads, head_dim = q.shape
    if max(time, k.shape[1]) <= BLOCK:
        raise NotImplementedError("one block is the plain attention")
    group = heads // k.shape[2]
    # What fills the last blocks is of no document: it sees nothing and isn't seen, and is cut off.
    prefixes = None if queries.prefixes is None else _split(queries.prefixes, -1)
    blocks = Blocks(
        _by_heads(_split(q), group),
        _by_heads(_split(k), 1),
        _by_heads(_split(v), 1),
        Tokens(_split(queries.positions), _split(queries.segments, -1), prefixes),
        Tokens(_split(keys.positions), _split(keys.segments, -2)),
    )
    y = _attended(blocks, group, window)
    return _joined(y, group).reshape(batch, -1, heads, head_dim)[:, :time]


def _split(x: jax.Array, fill: int = 0) -> jax.Array:
    """[B, T, ...] -> [m, B, T / m, ...]."""
    time = x.shape[1]
    count = -(-time // BLOCK)
    size = -(-time // count)
    padded = jnp.pad(x, [(0, 0), (0, count * size - time), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)
    return padded.reshape(x.shape[0], count, size, *x.shape[2:]).swapaxes(0, 1)


def _by_heads(x: jax.Array, group: int) -> jax.Array:
    """[m, B, t, K * G, h] -> [m, B, K, G * t, h]: each product is of large matrices, the heads apart."""
    count, batch, size, heads, head_dim = x.shape
    x = x.reshape(count, batch, size, heads // group, group, head_dim).transpose(0, 1, 3, 4, 2, 5)
    return x.reshape(count, batch, heads // group, group * size, head_dim)


def _joined(x: jax.Array, group: int) -> jax.Array:
    """[m, B, K, G * t, h] -> [B, m * t, K * G, h]."""
    count, batch, kv_heads, rows, head_dim = x.shape
    x = x.reshape(count, batch, kv_heads, group, rows // group, head_dim).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(batch, -1, kv_heads * group, head_dim)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attended(blocks: Blocks, group: int, window: int | None) -> jax.Array:
    """The result [m, B, K, q, h]."""
    return _forward(blocks, group, window)[0]


def _forward(blocks: Blocks, group: int, window: int | None) -> tuple[jax.Array, Any]:
    def of_queries(part: tuple[jax.Array, Tokens]) -> tuple[jax.Array, jax.Array]:
        q, queries = part

        def add(state: tuple, part: tuple) -> tuple[tuple, None]:
            k, v, keys = part
            seen = visible(queries, keys, window)

            def seeing(most: jax.Array, total: jax.Array, sums: jax.Array) -> tuple:
                scores = _scores(q, k, seen, group)
                higher = jnp.maximum(most, scores.max(axis=-1, keepdims=True))
                exps, fade = jnp.exp(scores - higher), jnp.exp(most - higher)
                new = jnp.einsum(
                    "BKqs,BKsh->BKqh", exps.astype(v.dtype), v, preferred_element_type=jnp.float32
                )
                return higher, total * fade + exps.sum(axis=-1, keepdims=True), sums * fade + new

            return jax.lax.cond(seen.any(), seeing, lambda *state: state, *state), None

        column = (*q.shape[:-1], 1)
        empty = jnp.full(column, LEAST), jnp.zeros(column), jnp.zeros(q.shape, jnp.float32)
        (most, total, sums), _ = jax.lax.scan(add, empty, (blocks.k, blocks.v, blocks.keys))
        total = jnp.maximum(total, 1)  # it is at least that, but for queries that see nothing
        return (sums / total).astype(q.dtype), most + jnp.log(total)

    y, log_z = (named(x, "attention") for x in jax.lax.map(of_queries, (blocks.q, blocks.queries)))
    return y, (blocks, y, log_z)


def _backward(group: int, window: int | None, kept: tuple, d_y: jax.Array) -> tuple[Blocks]:
    blocks, y, log_z = kept

    def of_queries(carry: tuple, part: tuple) -> tuple[tuple, jax.Array]:
        q, queries, y, z, g = part
        share = (g.astype(jnp.float32) * y.astype(jnp.float32)).sum(axis=-1, keepdims=True)

        def add(d_q: jax.Array, part: tuple) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            k, v, keys, d_k, d_v = part
            seen = visible(queries, keys, window)

            def seeing(d_q: jax.Array, d_k: jax.Array, d_v: jax.Array) -> tuple:
                probs = jnp.exp(_scores(q, k, seen, group) - z)
                wide = partial(jnp.einsum, preferred_element_type=jnp.float32)
                d_probs = wide("BKqh,BKsh->BKqs", g, v)
                d_scores = (probs * (d_probs - share) * q.shape[-1] ** -0.5).astype(q.dtype)
                return (
                    d_q + wide("BKqs,BKsh->BKqh", d_scores, k),
                    d_k + wide("BKqs,BKqh->BKsh", d_scores, q),
                    d_v + wide("BKqs,BKqh->BKsh", probs.astype(g.dtype), g),
                )

            d_q, *d_kv = jax.lax.cond(seen.any(), seeing, lambda *state: state, d_q, d_k, d_v)
            return d_q, tuple(d_kv)

        d_q, carry = jax.lax.scan(
            add, jnp.zeros(q.shape, jnp.float32), (blocks.k, blocks.v, blocks.keys, *carry)
        )
        return carry, d_q.astype(q.dtype)

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (blocks.k, blocks.v))
    d_kv, d_q = jax.lax.scan(of_queries, zeros, (blocks.q, blocks.queries, y, log_z, d_y))
    d_k, d_v = (x.astype(blocks.k.dtype) for x in d_kv)
    return (Blocks(d_q, d_k, d_v, None, None),)  # type: ignore[arg-type]


_attended.defvjp(_forward, _backward)


def _scores(q: jax.Array, k: jax.Array, seen: jax.Array, group: int) -> jax.Array:
    """[B, K, q, s] fp32 of one block, those of keys that aren't `seen` [B, q / G, s] the least there is."""
    scores = jnp.einsum("BKqh,BKsh->BKqs", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    batch, heads, rows, count = scores.shape
    apart = scores.reshape(batch, heads, group, rows // group, count)
    return jnp.where(seen[:, None, None], apart, LEAST).reshape(scores.shape)
