"""What is done number by number, in fp32 and rounded once, as torch's kernels do it.

In bf16, XLA for CPUs would round after every operation; and the gradient of a weight that is spread over tokens, which
is a sum, after every addition, so that with a thousand tokens it was 2% off.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def in_fp32(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function` of activations and of weights that are spread over them, which take the activations' dtype first; so
    does the result."""

    def wide(x: jax.Array, *weights: jax.Array) -> jax.Array:
        given = (weight.astype(x.dtype).astype(jnp.float32) for weight in weights)
        return function(x.astype(jnp.float32), *given).astype(x.dtype)

    return wide


scaled = in_fp32(jnp.multiply)
shifted = in_fp32(jnp.add)
