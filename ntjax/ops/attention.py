"""Attention. One call site for every model; a kernel is one function here.

A kernel raises NotImplementedError for what it can't do, and the next one (`NEXT`) is taken. All of them are the same
mathematics.

Axes: B batch, T query time, S key time, K key/value heads, G query heads a key/value head, h head_dim.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from ntjax import narrow
from ntjax.errors import ConfigError
from ntjax.mesh import ROWS, SEQUENCE, TENSOR
from ntjax.ops.remat import named

Kernel = Callable[..., jax.Array]  # with `plain`'s arguments


class Tokens(NamedTuple):
    """Where tokens stand: `positions` and `segments`, each [B, T] int32.

    Positions restart at 0 in every document of a packed row; segment 0 is padding. Within one segment,
    comparing positions is comparing time, so the same rule serves packed rows, left padding and a cache.
    Documents that begin alike may have their beginning once, as a segment of its own: `prefixes` [B, T] int32 are then
    the segments that tokens go on from, their own where they go on from none.
    """

    positions: jax.Array
    segments: jax.Array
    prefixes: jax.Array | None = None


def visible(queries: Tokens, keys: Tokens, window: int | None) -> jax.Array:
    """[B, T, S] bool: a query sees keys of its own document, not after it, at most `window - 1` before it."""
    ahead = queries.positions[:, :, None] - keys.positions[:, None, :]
    same = queries.segments[:, :, None] == keys.segments[:, None, :]
    if queries.prefixes is not None:
        same |= queries.prefixes[:, :, None] == keys.segments[:, None, :]
    seen = same & (ahead >= 0)
    return seen if window is None else seen & (ahead < window)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: Tokens,
    keys: Tokens,
    window: int | None = None,
    kernel: str = "xla",
) -> jax.Array:
    """softmax(q k^T / sqrt(h)) v over the keys that are `visible`.

    q [B, T, K*G, h], k and v [B, S, K, h] -> [B, T, K*G, h], known to policies of `ops.remat` as "attention". Scores
    and softmax are fp32. A query that sees no key takes the mean of all values.
    """
    try:
        with jax.named_scope("attention"):  # by which its part of a program is known
            y = KERNELS[kernel](q, k, v, queries, keys, window)
    except NotImplementedError:
        return attention(q, k, v, queries, keys, window, NEXT[kernel])
    # The others name what they keep, the result too: under the same name this one would be kept beside it.
    return named(y, "attention") if kernel == "xla" else y


def across(keys: Tokens, k: jax.Array, v: jax.Array) -> tuple[Tokens, jax.Array, jax.Array]:
    """The keys and values [B, S, K, h] of whole rows, of which the devices along `sequence` have a part each.

    All of them are fetched at once (arXiv:2407.21783, 3.3.2): with grouped queries they are few beside the queries,
    which stay where they are, and packed rows need no other mask. On CPUs they travel as fp32: XLA for CPUs can't sum
    bf16, as their gradients are, over devices.
    """
    gather = partial(jax.lax.all_gather, axis_name=SEQUENCE, axis=1, tiled=True)
    travelling = jnp.float32 if narrow.target() == "cpu" else k.dtype
    whole_k, whole_v = (gather(x.astype(travelling)).astype(x.dtype) for x in (k, v))
    return jax.tree.map(gather, keys), whole_k, whole_v


class Kept(NamedTuple):
    """Keys and values of a layer: of prompts [P, K, T, h] each, shared by the rows that go on from them, and of what
    those R rows wrote [R, K, S, h]; the rows of a prompt are neighbours. Or those of a stack of layers [L, ...], of
    which `layer` is meant."""

    prompt: tuple[jax.Array, jax.Array]
    own: tuple[jax.Array, jax.Array]
    layer: jax.Array | None = None  # [] int32

    @property
    def stacked(self) -> bool:
        """Whether they are of a stack."""
        return self.own[0].ndim == 5

    def written(self, new: tuple[jax.Array, jax.Array], at: jax.Array) -> Kept:
        """With every row's next key and value, [R, K, 1, h] each, in column `at` of the layer."""
        lead = () if self.layer is None else (self.layer,)
        k, v = (
            jax.lax.dynamic_update_slice(x, y.reshape(*(1 for _ in lead), *y.shape), (*lead, 0, 0, at, 0))
            for x, y in zip(self.own, new, strict=True)
        )
        return self._replace(own=(k, v))

    def of_layer(self) -> Kept:
        """The layer's alone."""
        if self.layer is None:
            return self
        pick = partial(jax.lax.dynamic_index_in_dim, index=self.layer, keepdims=False)
        return Kept(*jax.tree.map(pick, (self.prompt, self.own)))


def continued(
    q: jax.Array, kept: Kept, queries: Tokens, prompts: Tokens, own: Tokens, window: int | None = None
) -> jax.Array:
    """`attention` of one query a row [R, 1, H, h] over its prompt and what the row wrote -> [R, 1, H, h].

    A prompt's keys are read once for all of its rows.
    """
    kept = kept.of_layer()
    rows, _, heads, head_dim = q.shape
    count, kv_heads, time, _ = kept.prompt[0].shape
    together = q.reshape(count, rows // count, kv_heads, -1, head_dim).swapaxes(1, 2)
    shared = narrow.wide("PKRGh,PKTh->PKRGT", together, kept.prompt[0])
    shared = shared.swapaxes(1, 2).reshape(rows, kv_heads, -1, time)
    grouped = q.reshape(rows, kv_heads, -1, head_dim)
    alone = narrow.wide("RKGh,RKSh->RKGS", grouped, kept.own[0])
    each = jax.tree.map(lambda x: jnp.repeat(x, rows // count, axis=0), prompts)
    seen = jnp.concatenate([visible(queries, each, window), visible(queries, own, window)], axis=-1)
    scores = jnp.concatenate([shared, alone], axis=-1) * head_dim**-0.5
    scores = jnp.where(seen[:, :, None], scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    of_prompt = probs[..., :time].reshape(count, rows // count, kv_heads, -1, time).swapaxes(1, 2)
    mixed = jnp.einsum("PKRGT,PKTh->PKRGh", of_prompt, kept.prompt[1])
    mixed = mixed.swapaxes(1, 2).reshape(rows, kv_heads, -1, head_dim)
    mixed += jnp.einsum("RKGS,RKSh->RKGh", probs[..., time:], kept.own[1])
    return mixed.reshape(rows, 1, heads, head_dim)


def plain(
    q: jax.Array, k: jax.Array, v: jax.Array, queries: Tokens, keys: Tokens, window: int | None
) -> jax.Array:
    """`attention` that holds all scores, [B, K, G, T, S], and their softmax for the backward pass."""
    batch, time, heads, head_dim = q.shape
    grouped = q.reshape(batch, time, k.shape[2], -1, head_dim)
    scores = narrow.wide("BTKGh,BSKh->BKGTS", grouped, k)
    seen = visible(queries, keys, window)[:, None, None]
    scores = jnp.where(seen, scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BKGTS,BSKh->BTKGh", probs, v).reshape(batch, time, heads, head_dim)


def partitions(mesh: AbstractMesh, batch: int, kv_heads: int) -> tuple[PartitionSpec, PartitionSpec]:
    """How [batch, time] and [batch, time, heads, head_dim] are split over axes of a mesh that are left to XLA, which
    a kernel of its own takes over: XLA can't split one.

    Raises NotImplementedError where they can't be split evenly.
    """
    rows = tuple(axis for axis in (*ROWS, SEQUENCE) if axis in mesh.auto_axes)
    heads = TENSOR if TENSOR in mesh.auto_axes else None
    if batch % math.prod(mesh.shape[axis] for axis in rows) or (heads and kv_heads % mesh.shape[heads]):
        raise NotImplementedError("rows or heads can't be shared evenly")
    return PartitionSpec(rows), PartitionSpec(rows, None, heads)


def _imported(name: str) -> Kernel:
    """The kernel of its own file, whose libraries are imported where it is used."""

    def kernel(*arguments: Any) -> jax.Array:
        return getattr(importlib.import_module(f"ntjax.ops.{name}"), name)(*arguments)

    return kernel


KERNELS: dict[str, Kernel] = {
    "xla": plain,
    "blocked": _imported("blocked"),
    "splash": _imported("splash"),
    "cudnn": _imported("cudnn"),
}
NEXT = {"splash": "blocked", "cudnn": "blocked", "blocked": "xla"}
OWN = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}  # the kernel that only this platform has


def chosen(attention: str, platform: str, where: str | None = None) -> str:
    """The kernel that `attention` means on a platform: "auto" is the platform's own, else "blocked".

    Raises ConfigError at `where` for another platform's.
    """
    own = OWN.get(platform)
    if attention == "auto":
        return own or "blocked"
    if attention in OWN.values() and attention != own:
        raise ConfigError(
            f'attention = "{attention}": the devices are {platform}, which have no such kernel',
            where=where,
            fix='leave it out: "auto" takes what the devices have',
        )
    return attention
