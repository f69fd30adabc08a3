"""The one place where a weight meets an activation.

A weight is a plain array, a quantised one (`ntjax.quantised`) or either with a LoRA adapter around it; for decoding
also a matrix in an array's place. `einsum` and `dense` alone know the difference; no model does. All of them are pytree
nodes whose leaves have the stacked axes in front, so a scan over layers slices them as it slices arrays. Arrays that
are `elsewhere` are put together here, where they are used, and again for the gradient.

Axes: N rows, I inputs, O outputs, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ntjax import narrow
from ntjax.elsewhere import is_here, whole
from ntjax.params import Spec
from ntjax.quantised import EightBit, FourBit
from ntjax.turned import Turned


@struct.dataclass
class Adapted:
    """A weight with a low-rank adapter: y = W x + scale B A dropout(x) (LoRA, arXiv:2106.09685).

    With a `magnitude` m, DoRA (arXiv:2402.09353): each row of W + scale B A is rescaled to length m; the length it
    has is a constant to the gradient. A layer whose scale is 0 has no adapter.
    """

    base: Any  # [.., *outputs, *inputs]
    a: jax.Array  # [.., r, *inputs]
    b: jax.Array  # [.., *outputs, r]
    scale: jax.Array  # [..] fp32
    magnitude: jax.Array | None = None  # [.., *outputs]
    key: jax.Array | None = None  # [..] of dropout; None: no dropout
    rate: float = struct.field(pytree_node=False, default=0.0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array it stands for."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """Of the array it stands for."""
        return self.base.ndim

    def dense(self, dtype: Any) -> jax.Array:
        """The merged weight, one matrix or a stack of them."""
        stacked = self.scale.ndim
        outputs = self.b.shape[stacked:-1]
        lead, rows = self.shape[:stacked], math.prod(outputs)
        wide = (*lead, rows, -1)
        a, b = self.a.reshape(*lead, self.a.shape[stacked], -1), self.b.reshape(*lead, rows, -1)
        scale = self.scale[..., None, None]
        merged = dense(self.base, jnp.float32).reshape(wide) + scale * jnp.matmul(
            b.astype(jnp.float32), a.astype(jnp.float32), precision="highest"
        )
        if self.magnitude is not None:
            norm = jax.lax.stop_gradient(jnp.linalg.norm(merged, axis=-1))
            length = self.magnitude.astype(jnp.float32).reshape(*lead, rows)
            merged *= jnp.where(scale == 0, 1.0, (length / norm)[..., None])
        return merged.reshape(self.shape).astype(dtype)

    def product(self, rows: jax.Array, split: int) -> jax.Array:
        """rows [N, I] times the weight of one layer -> [N, O]."""
        dropped = rows
        if self.key is not None and self.rate:
            keep = jax.random.bernoulli(self.key, 1 - self.rate, rows.shape)
            dropped = jnp.where(keep, rows / (1 - self.rate), 0).astype(rows.dtype)
        a = _matrix(self.a, 1, rows.dtype)
        b = _matrix(self.b, split, rows.dtype)
        delta = narrow.product(narrow.product(dropped, a), b) * self.scale.astype(rows.dtype)
        y = product(rows, self.base, split)
        if self.magnitude is None:
            return y + delta
        length = self._length(split, rows.dtype)
        through = y if dropped is rows else product(dropped, self.base, split)
        return (y + (length - 1) * through + length * delta).astype(rows.dtype)

    def _length(self, split: int, dtype: Any) -> jax.Array:
        """What DoRA multiplies each output by: [O] fp32, as most of them stay nearer to 1 than bf16 can tell."""
        assert self.magnitude is not None
        plain = self.replace(magnitude=None).dense(dtype)  # type: ignore[attr-defined]
        norm = jnp.linalg.norm(_matrix(plain, split, jnp.float32), axis=-1)
        length = self.magnitude.astype(jnp.float32).reshape(-1) / jax.lax.stop_gradient(norm)
        return jnp.where(self.scale == 0, 1.0, length)


@struct.dataclass
class Flat:
    """A matrix in place of an array of more axes. TPUs lay out the last two axes in tiles: an array whose inputs are
    heads and head_dim is laid out anew before each product by it."""

    matrix: jax.Array  # [.., O, I]
    axes: tuple[int, ...] = struct.field(pytree_node=False)  # (*outputs, *inputs)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array it stands for."""
        return (*self.matrix.shape[:-2], *self.axes)

    @property
    def ndim(self) -> int:
        """Of the array it stands for."""
        return len(self.shape)

    def dense(self, dtype: Any) -> jax.Array:
        """That array."""
        return self.matrix.reshape(self.shape).astype(dtype)


def einsum(equation: str, x: jax.Array, w: Any) -> jax.Array:
    """`jnp.einsum(equation, x, w)` in the dtype of `x`, for x = (batch..., inputs...) and w = (outputs..., inputs...).

    The product is taken as one 2-D matmul: with several contracted or batch dimensions XLA on CPU transposes
    a copy of the activations for the weight's gradient.
    """
    xs, ws, ys = equation.replace("->", ",").split(",")
    inputs = "".join(c for c in xs if c in ws)
    outputs = "".join(c for c in ws if c not in inputs)
    batch = xs[: len(xs) - len(inputs)]
    assert (xs, ws, ys) == (batch + inputs, outputs + inputs, batch + outputs), equation
    split = w.ndim - len(inputs)
    rows = x.reshape(-1, math.prod(w.shape[split:]))
    return product(rows, w, split).reshape(*x.shape[: len(batch)], *w.shape[:split])


def product(rows: jax.Array, w: Any, split: int) -> jax.Array:
    """rows [N, I] times w, whose first `split` axes are its outputs -> [N, O]."""
    if not is_here(w):
        return _formed_again(lambda rows, w: product(rows, whole(w), split))(rows, w)
    if isinstance(w, Adapted):
        return w.product(rows, split)
    if isinstance(w, FourBit | EightBit):
        return _formed_again(partial(_by_codes, split=split))(rows, w)
    if isinstance(w, Flat):
        # Else XLA for TPUs would shape the product as its users want it, and copy the matrix for that.
        return jax.lax.optimization_barrier(narrow.product(rows, w.matrix.astype(rows.dtype)))
    return narrow.product(rows, _matrix(w, split, rows.dtype))


def _formed_again(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A product whose weight is put together or dequantised again in the backward pass: kept for it, all layers' would
    stand there whole. Where that pass forms the layer's products again too, XLA may take the two weights for one."""
    return jax.checkpoint(function, prevent_cse=False)


def _by_codes(rows: jax.Array, w: FourBit | EightBit, split: int) -> jax.Array:
    """`product` with a weight in 4 or 8 bits."""
    if isinstance(w, Turned):
        return w.product(rows)
    return narrow.product(rows, _matrix(w.dense(rows.dtype), split, rows.dtype))


def dense(w: Any, dtype: Any) -> jax.Array:
    """The plain array that a weight stands for: put together, dequantised, the adapter merged."""
    w = whole(w)
    return w.dense(dtype) if isinstance(w, Adapted | Flat | FourBit | EightBit) else w.astype(dtype)


def narrowed(w: Any, spec: Spec, dtype: Any) -> Any:
    """The weight with a matrix in the dtype that it is cast to where it is used, if that is narrower."""

    return _within(w, lambda x: cast(x, dtype) if isinstance(x, jax.Array) and spec.is_matrix else x)


def cast(w: jax.Array, dtype: Any) -> jax.Array:
    """A plain weight in a dtype, if that is narrower than its own."""
    return w.astype(dtype) if jnp.dtype(dtype).itemsize < w.dtype.itemsize else w


def dequantised(w: Any, spec: Spec, dtype: Any) -> Any:
    """The weight with numbers in place of codes, formed a layer at a time: what is between them is several times as
    large."""

    def formed(x: Any) -> Any:
        if not isinstance(x, FourBit | EightBit):
            return x
        return jax.lax.map(lambda layer: layer.dense(dtype), x) if spec.stacked else x.dense(dtype)

    return _within(w, formed)


def flat(w: Any, spec: Spec) -> Any:
    """The weight with an array of more than two axes, stacked ones aside, as a matrix."""

    def laid_out(x: Any) -> Any:
        lead = len(spec.stacked)
        if not (isinstance(x, jax.Array) and spec.linear and x.ndim - lead > 2):
            return x
        return Flat(x.reshape(*x.shape[:lead], *spec.matrix), x.shape[lead:])

    return _within(w, laid_out)


def _within(w: Any, change: Callable[[Any], Any]) -> Any:
    """`change` of the weight, or of what its adapter is around; but for DoRA's, whose lengths are taken in fp32."""
    if not isinstance(w, Adapted):
        return change(w)
    base = w.base if w.magnitude is not None else change(w.base)
    return w if base is w.base else w.replace(base=base)  # type: ignore[attr-defined]


def _matrix(w: jax.Array, split: int, dtype: Any) -> jax.Array:
    """w as (outputs, inputs)."""
    return w.reshape(math.prod(w.shape[:split]), -1).astype(dtype)
