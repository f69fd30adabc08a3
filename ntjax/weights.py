"""The one place where a weight meets an activation.

`einsum` alone knows how a weight is held. Today that is a plain array in torch's layout, outputs first;
adapters and quantised weights will be further kinds of the same argument, and no model will notice.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def einsum(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
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
    matrix = w.reshape(math.prod(w.shape[:split]), -1).astype(x.dtype)
    y = jnp.einsum("bi,oi->bo", rows, matrix)
    return y.reshape(*x.shape[: len(batch)], *w.shape[:split])
