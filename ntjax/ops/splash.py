"""Attention on TPUs: JAX's splash kernels, block-sparse flash attention (arXiv:2205.14135) written in Pallas.

Scores live in the chip's vector memory, a block at a time and in fp32; blocks that the mask of indices leaves empty are
neither fetched nor computed. Keys and values of grouped queries are read as they are, not repeated.

Axes: B batch, T query time, S key time, H heads, K key/value heads, h head_dim.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

from ntjax.mesh import SEQUENCE
from ntjax.ops.attention import Tokens, partitions

LANES = 128  # of a vector register: block sizes are multiples of it
# Queries and keys of a block at most, MaxText's default. Scores of such a block are 1 MiB, and what is made of them
# fits the vector memory of v4 (16 MiB) to v6e, in fp32 with a head_dim of 256 too; those of 1024 don't.
BLOCK = 512


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: Tokens,
    keys: Tokens,
    window: int | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`attention` of rows over themselves, or of a device's part of rows over the whole of them (`attention.across`).

    A document's tokens stand together and in order, so comparing indices is comparing positions; a token of padding
    sees padding up to itself. What the backward pass needs of the result, its logsumexps with it, is named "attention"
    (`ops.remat`). `interpret` is for machines without a TPU.
    """
    mesh, time = jax.sharding.get_abstract_mesh(), q.shape[1]
    parts = mesh.shape[SEQUENCE] if SEQUENCE in mesh.manual_axes else 1
    if queries.prefixes is not None:
        raise NotImplementedError("a token sees its own segment alone")
    if k.shape[1] != parts * time:
        raise NotImplementedError("keys are of other tokens than the queries")
    if time < LANES:
        raise NotImplementedError("most of a block would be padding")
    block, size = blocks(time)
    if parts > 1 and size > time:
        raise NotImplementedError("padding would come between the parts of a row")
    kernel = _own_part(_kernel(size, parts, block, window, interpret), parts)
    arrays = (kernel, q, k, v, queries.segments, keys.segments)
    if mesh.size <= 1 or not mesh.auto_axes:
        return _attended(*arrays)
    tokens, each = partitions(mesh, q.shape[0], k.shape[2])
    run = jax.shard_map(
        _attended,
        in_specs=(PartitionSpec(), each, each, each, tokens, tokens),
        out_specs=each,
        axis_names=set(mesh.auto_axes),
        check_vma=False,
    )
    return run(*arrays)


def blocks(time: int) -> tuple[int, int]:
    """(size of a block, padded time) for so many queries: the fewest blocks, and the least padding with those."""
    count = -(-time // BLOCK)
    block = -(-time // (count * LANES)) * LANES
    return block, count * block


def _attended(
    kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, queries: jax.Array, keys: jax.Array
) -> jax.Array:
    """`splash` of what one device has: q [B, T, H, h], k and v [B, S, K, h], segments [B, T] and [B, S]."""
    time, scale = q.shape[1], q.shape[-1] ** -0.5
    short = -time % blocks(time)[0]
    if short:
        q, k, v, queries, keys = (
            jnp.pad(x, [(0, 0), (0, short), *[(0, 0)] * (x.ndim - 2)]) for x in (q, k, v, queries, keys)
        )
    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    q, k, v = (x.swapaxes(1, 2) for x in (scaled, k, v))
    y = jax.vmap(kernel)(q, k, v, kernels.SegmentIds(queries, keys))
    return y.swapaxes(1, 2)[:, :time]


@lru_cache(maxsize=16)
def _kernel(time: int, parts: int, block: int, window: int | None, interpret: bool) -> Any:
    """The kernels for rows of `parts` times `time` tokens, with the places of their blocks as numpy arrays.

    The kernel that gives all three gradients at once isn't used: it would write a dq for every block of keys.
    """
    shape = (parts * time, parts * time)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    with jax.ensure_compile_time_eval():
        made = kernels.make_splash_mha(
            masks.MultiHeadMask([mask]),  # of all heads
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=parts,
            residual_checkpoint_name="attention",
            interpret=interpret,
        )
    return jax.tree.map(np.asarray, made)


def _own_part(kernel: Any, parts: int) -> Any:
    """The kernels with the blocks of this device's part of the queries alone."""
    if parts == 1:
        return kernel
    number = jax.lax.axis_index(SEQUENCE)

    def own(x: np.ndarray) -> jax.Array:
        """Of indices [S] of queries, or of tables [heads, blocks of queries, blocks of keys]."""
        axis = 0 if x.ndim == 1 else 1
        size = x.shape[axis] // parts
        return jax.lax.dynamic_slice_in_dim(x, number * size, size, axis)

    return jax.tree.map(own, kernel)
