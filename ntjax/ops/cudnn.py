"""Attention on GPUs: cuDNN's flash attention (arXiv:2205.14135), called through JAX.

Rows are given to cuDNN as documents, by lengths and offsets (its packed, "ragged" layout): no mask is made, and what
lies between documents is neither read nor written. It is called with `SLOTS` documents of every row at a time, as often
as the row with the most documents asks for.

Of JAX 0.10.2: `jax.nn.dot_product_attention` takes no offsets, so what it calls is called here. Offsets of keys are
counted in heads of queries (mended by jax-ml/jax#39521), so grouped keys and values are repeated, which is right before
and after. What it saves for the gradient are logsumexps [documents, H, T]; here they are saved as [B, H, T], and the
gradient is called by itself.

Axes: B batch, T time, H heads, K key/value heads, h head_dim, D documents, N documents of a call.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused

from ntjax.ops.attention import Tokens, partitions
from ntjax.ops.remat import named

# Documents of a row in one call. As XLA calls it, cuDNN sums the gradient of queries in fp32 [B * SLOTS, H, T, h], most
# of it zeros: 0.5 GiB for 8192 tokens of Llama-3-8B and SLOTS = 4. With less than 2 the call wouldn't be packed.
SLOTS = 4
VERSION = 90600  # of cuDNN: the first that JAX's own tests of packed rows run with
Gradients = tuple[jax.Array, jax.Array, jax.Array]


class Documents(NamedTuple):
    """Where documents lie in rows: `start` and `length` [B, D] int32, a length of 0 for those there aren't; `number`
    [B, T] int32 of each token's document in its row, -1 for padding."""

    start: jax.Array
    length: jax.Array
    number: jax.Array


class Part(NamedTuple):
    """The documents of one call, as JAX wants them: `lengths` [B, SLOTS] and `offsets` [B, SLOTS + 1] int32, -1 where
    there is none. `own` [B, T] says which tokens are theirs; such a token is `place` [B, T] tokens into document `slot`
    [B, T] of all N = B * SLOTS, among which those there are come first."""

    lengths: jax.Array
    offsets: jax.Array
    own: jax.Array
    slot: jax.Array
    place: jax.Array


def cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, queries: Tokens, keys: Tokens, window: int | None
) -> jax.Array:
    """`attention` of rows over themselves in bf16 or fp16, on Hopper GPUs or later; a query of padding gets zeros.

    A document's tokens stand together and in order, so comparing indices is comparing positions. What the backward pass
    needs of the result, its logsumexps with it, is named "attention" (`ops.remat`).
    """
    if queries.prefixes is not None:
        raise NotImplementedError("a token sees its own document alone")
    _check(q, k, v)
    mesh = jax.sharding.get_abstract_mesh()
    arrays = (q, k, v, documents(queries.segments))
    run = partial(_attended, window)
    if mesh.size <= 1 or not mesh.auto_axes:
        return run(*arrays)
    # JAX's own rule for splitting the call over heads fails where other axes are manual.
    rows, each = partitions(mesh, q.shape[0], k.shape[2])
    split = jax.shard_map(
        run,
        in_specs=(each, each, each, rows),
        out_specs=each,
        axis_names=set(mesh.auto_axes),
        check_vma=False,
    )
    return split(*arrays)


def _check(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Raises NotImplementedError for what cuDNN can't do, or can't do here."""
    if q.shape[1] != k.shape[1]:
        raise NotImplementedError("keys are of other tokens than the queries")
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
        raise NotImplementedError(f"cuDNN's attention is in bf16 or fp16, not {q.dtype}")
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        raise NotImplementedError(f"a head_dim of {q.shape[-1]} is no multiple of 8 up to 256")
    if q.size >= 2**31:
        raise NotImplementedError("offsets are int32")
    if fused.cuda_versions is None or not fused.check_compute_capability("9.0"):
        raise NotImplementedError("packed rows need a Hopper GPU or a later one")
    if fused.check_cudnn_version() < VERSION:
        raise NotImplementedError(f"packed rows need cuDNN {VERSION}")


def documents(segments: jax.Array) -> Documents:
    """The documents of rows with these segments [B, T]: as many as there is room for, a multiple of SLOTS."""
    batch, time = segments.shape
    room = -(-time // SLOTS) * SLOTS
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    begins, inside = (segments > 0) & (segments != before), segments > 0
    number = jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1
    row, none = jnp.arange(batch)[:, None], jnp.zeros((batch, room), jnp.int32)
    start = none.at[row, jnp.where(begins, number, room)].set(jnp.arange(time, dtype=jnp.int32), mode="drop")
    length = none.at[row, jnp.where(inside, number, room)].add(1, mode="drop")
    return Documents(start, length, jnp.where(inside, number, -1))


def part(documents: Documents, call: jax.Array) -> Part:
    """The documents of every row that are in call number `call`."""
    start, length = (
        jax.lax.dynamic_slice_in_dim(x, call * SLOTS, SLOTS, axis=1)
        for x in (documents.start, documents.length)
    )
    there = length > 0
    offsets = jnp.pad(jnp.where(there, start, -1), ((0, 0), (0, 1)), constant_values=-1)
    own = documents.number // SLOTS == call
    among = jnp.where(own, documents.number % SLOTS, 0)
    # JAX moves those there are to the left, over all rows.
    order = (jnp.cumsum(there.ravel(), dtype=jnp.int32) - 1).reshape(there.shape)
    slot, begin = (jnp.take_along_axis(x, among, axis=1) for x in (order, start))
    place = jnp.arange(own.shape[1], dtype=jnp.int32) - begin
    return Part(jnp.where(there, length, -1), offsets, own, slot, place)


def _calls(documents: Documents) -> jax.Array:
    """How many calls the row with the most documents needs, 0 if all is padding."""
    return documents.number.max() // SLOTS + 1


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attended(
    window: int | None, q: jax.Array, k: jax.Array, v: jax.Array, documents: Documents
) -> jax.Array:
    """`cudnn` of what one device has."""
    return _forward(window, q, k, v, documents)[0]


def _forward(
    window: int | None, q: jax.Array, k: jax.Array, v: jax.Array, documents: Documents
) -> tuple[jax.Array, jax.Array]:
    """y [B, T, H, h] and its logsumexps [B, H, T], both 0 in padding."""
    batch, time, heads, _ = q.shape
    k, v = (_repeated(x, heads) for x in (k, v))

    def call(number: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        some = part(documents, number)
        y, stats = _call(q, k, v, some.lengths, some.offsets, window)
        sums = stats[_places(some, heads)]
        return (
            jnp.where(some.own[:, :, None, None], y, found[0]),
            jnp.where(some.own[:, None], sums, found[1]),
        )

    nothing = jnp.zeros_like(q), jnp.zeros((batch, heads, time), jnp.float32)
    return jax.lax.fori_loop(0, _calls(documents), call, nothing)


def _forward_saving(
    window: int | None, q: jax.Array, k: jax.Array, v: jax.Array, documents: Documents
) -> tuple[jax.Array, Any]:
    y, sums = (named(x, "attention") for x in _forward(window, q, k, v, documents))
    return y, (q, k, v, documents, y, sums)


def _backward(window: int | None, saved: Any, dy: jax.Array) -> tuple[Any, ...]:
    q, k, v, documents, y, sums = saved
    (batch, time, heads, _), kv_heads = q.shape, k.shape[2]
    wide_k, wide_v = (_repeated(x, heads) for x in (k, v))

    def call(number: jax.Array, found: Gradients) -> Gradients:
        some = part(documents, number)
        slot, head, place = _places(some, heads)
        slot = jnp.where(some.own[:, None], slot, batch * SLOTS)
        stats = (
            jnp.zeros((batch * SLOTS, heads, time), jnp.float32).at[slot, head, place].set(sums, mode="drop")
        )
        new = _call_back(q, wide_k, wide_v, some.lengths, some.offsets, window, stats, y, dy)
        own = some.own[:, :, None, None]
        dq, dk, dv = (jnp.where(own, x, before) for x, before in zip(new, found, strict=True))
        return dq, dk, dv

    nothing = jnp.zeros_like(q), jnp.zeros_like(wide_k), jnp.zeros_like(wide_v)
    dq, dk, dv = jax.lax.fori_loop(0, _calls(documents), call, nothing)
    return dq, _summed(dk, kv_heads), _summed(dv, kv_heads), None


_attended.defvjp(_forward_saving, _backward)


def _places(some: Part, heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where the number of a head and a token [B, H, T] is in an array [N, H, T] of documents."""
    return some.slot[:, None], jnp.arange(heads)[:, None], some.place[:, None]


def _repeated(x: jax.Array, heads: int) -> jax.Array:
    """Keys or values [B, T, K, h] once for each head of the queries."""
    return jnp.repeat(x, heads // x.shape[2], axis=2)


def _summed(x: jax.Array, kv_heads: int) -> jax.Array:
    """The gradient of what was `_repeated`."""
    batch, time, heads, head_dim = x.shape
    grouped = x.reshape(batch, time, kv_heads, heads // kv_heads, head_dim)
    return grouped.sum(axis=3, dtype=jnp.float32).astype(x.dtype)


def _call(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, offsets: jax.Array, window: int | None
) -> tuple[jax.Array, jax.Array]:
    """y [B, T, H, h] and logsumexps [N, H, T] of documents; what is of none of them is left as memory was found."""
    return fused.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=q.shape[-1] ** -0.5,
        mask_type=fused.MaskType.PADDING_CAUSAL,
        sliding_window_length=window,
        return_residual=True,
    )


def _call_back(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    offsets: jax.Array,
    window: int | None,
    stats: jax.Array,
    y: jax.Array,
    dy: jax.Array,
) -> Gradients:
    """Gradients of q, k and v through `_call`, which gave `stats` and `y`."""
    absent = jnp.zeros(0, q.dtype)  # bias, and the tables of a cache in pages
    dq, dk, dv = fused._dot_product_attention_bwd_p_wrapper.bind(
        *(q, k, v, absent, lengths, lengths, offsets, offsets, absent, absent, stats, y, dy),
        scale=q.shape[-1] ** -0.5,
        seed=0,
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=fused.MaskType.PADDING_CAUSAL,
        layout=fused.AttentionLayout.BTNH.value,
        sliding_window_length=window,
    )
    return dq, dk, dv
