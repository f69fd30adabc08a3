"""Attention anywhere: block by block of queries and of keys (FlashAttention, arXiv:2205.14135, in plain JAX).

Scores are those of one block at a time, formed again in the backward pass from the logarithm of each query's sum of
exponentials. Blocks of which no query sees a key are passed over: half of them in a long row, more in a packed one.

Axes: B batch, T query time, S key time, K key/value heads, G query heads a key/value head, h head_dim; m, n blocks of
queries and of keys, t queries and s keys of a block.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ntjax.narrow import turned, wide
from ntjax.ops.attention import Tokens, visible
from ntjax.ops.remat import named

BLOCK = 128  # queries, and keys, of a block: the fewer, the more of a packed row is passed over
WHOLE = 256  # tokens of a row that is one block: passing over a quarter of it would cost more than it saves
LEAST = jnp.finfo(jnp.float32).min


class Blocks(NamedTuple):
    """Queries [m, B, K, G, t, h], keys and values [n, B, K, s, h], and where they stand [m, B, t] and [n, B, s]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    queries: Tokens
    keys: Tokens


def blocked(
    q: jax.Array, k: jax.Array, v: jax.Array, queries: Tokens, keys: Tokens, window: int | None
) -> jax.Array:
    """`attention`. What the backward pass needs, the sums too, is named "attention" (`ops.remat`).

    Rows of up to `BLOCK` tokens, as when sampling, are left to `plain`.
    """
    batch, time, heads, head_dim = q.shape
    if max(time, k.shape[1]) <= BLOCK:
        raise NotImplementedError("short rows are for the plain attention")
    # What fills the last blocks is of no document: it sees nothing and isn't seen, and is cut off.
    prefixes = None if queries.prefixes is None else _split(queries.prefixes, -1)
    blocks = Blocks(
        _by_heads(_split(q.reshape(batch, time, k.shape[2], -1, head_dim))),
        _by_heads(_split(k)),
        _by_heads(_split(v)),
        Tokens(_split(queries.positions), _split(queries.segments, -1), prefixes),
        Tokens(_split(keys.positions), _split(keys.segments, -2)),
    )
    return _joined(_attended(blocks, window)).reshape(batch, -1, heads, head_dim)[:, :time]


def block(time: int) -> int:
    """Tokens of each block of a row of so many."""
    return time if time <= WHOLE else -(-time // -(-time // BLOCK))


def _split(x: jax.Array, fill: int = 0) -> jax.Array:
    """[B, T, ...] -> [m, B, T / m, ...]."""
    time = x.shape[1]
    size = block(time)
    count = -(-time // size)
    padded = jnp.pad(x, [(0, 0), (0, count * size - time), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)
    return padded.reshape(x.shape[0], count, size, *x.shape[2:]).swapaxes(0, 1)


def _by_heads(x: jax.Array) -> jax.Array:
    """[m, B, t, K, ..., h] -> [m, B, K, ..., t, h]: each product is of large matrices, the heads apart."""
    return jnp.moveaxis(x, 2, -2)


def _joined(x: jax.Array) -> jax.Array:
    """[m, B, K, G, t, h] -> [B, m, t, K, G, h]."""
    return x.transpose(1, 0, 4, 2, 3, 5)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attended(blocks: Blocks, window: int | None) -> jax.Array:
    """The result [m, B, K, G, t, h]."""
    return _forward(blocks, window)[0]


def _forward(blocks: Blocks, window: int | None) -> tuple[jax.Array, Any]:
    def of_queries(part: tuple[jax.Array, Tokens]) -> tuple[jax.Array, jax.Array]:
        q, queries = part

        def add(state: tuple, part: tuple) -> tuple[tuple, None]:
            k, v, keys = part
            seen = visible(queries, keys, window)

            def seeing(most: jax.Array, total: jax.Array, sums: jax.Array) -> tuple:
                scores = wide("BKGth,BKsh->BKGts", q, k) * q.shape[-1] ** -0.5
                scores = jnp.where(seen[:, None, None], scores, LEAST)
                higher = jnp.maximum(most, scores.max(axis=-1, keepdims=True))
                exps, fade = jnp.exp(scores - higher), jnp.exp(most - higher)
                new = wide("BKGts,BKsh->BKGth", exps.astype(v.dtype), v)
                return higher, total * fade + exps.sum(axis=-1, keepdims=True), sums * fade + new

            return jax.lax.cond(seen.any(), seeing, lambda *state: state, *state), None

        column = (*q.shape[:-1], 1)
        empty = jnp.full(column, LEAST), jnp.zeros(column), jnp.zeros(q.shape, jnp.float32)
        (most, total, sums), _ = jax.lax.scan(add, empty, (blocks.k, blocks.v, blocks.keys))
        total = jnp.maximum(total, 1)  # it is at least that, but for queries that see nothing
        return (sums / total).astype(q.dtype), (most + jnp.log(total))[..., 0]

    y, log_z = (named(x, "attention") for x in jax.lax.map(of_queries, (blocks.q, blocks.queries)))
    return y, (blocks, y, log_z)


def _backward(window: int | None, kept: tuple, d_y: jax.Array) -> tuple[Blocks]:
    blocks, y, log_z = kept

    def of_queries(carry: tuple, part: tuple) -> tuple[tuple, jax.Array]:
        q, queries, y, z, g = part
        share = (g.astype(jnp.float32) * y.astype(jnp.float32)).sum(axis=-1)

        def add(d_q: jax.Array, part: tuple) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            k, v, keys, d_k, d_v = part
            seen = visible(queries, keys, window).swapaxes(1, 2)

            def seeing(d_q: jax.Array, d_k: jax.Array, d_v: jax.Array) -> tuple:
                scores = wide("BKsh,BKGth->BKsGt", k, q) * q.shape[-1] ** -0.5
                probs = jnp.exp(jnp.where(seen[:, None, :, None], scores, LEAST) - z[:, :, None])
                d_probs = wide("BKsh,BKGth->BKsGt", v, g)
                d_scores = (probs * (d_probs - share[:, :, None]) * q.shape[-1] ** -0.5).astype(q.dtype)
                by_queries = turned(d_scores.reshape(*d_scores.shape[:3], -1))
                return (
                    d_q + wide("BKqs,BKsh->BKqh", by_queries, k).reshape(q.shape),
                    d_k + wide("BKsGt,BKGth->BKsh", d_scores, q),
                    d_v + wide("BKsGt,BKGth->BKsh", probs.astype(g.dtype), g),
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
