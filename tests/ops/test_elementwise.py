"""In bf16, what is done number by number is rounded once."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntjax.ops.activations import ACTIVATIONS
from ntjax.ops.elementwise import scaled, shifted
from ntjax.ops.norms import rms_norm

TOKENS, SIZE = (4, 256), 64
ROUNDING = 2.0**-8  # of a number to bf16, at most, relative


def drawn(number: int, *shape: int) -> jax.Array:
    """Numbers that are whole in bf16, as fp32."""
    return jax.random.normal(jax.random.key(number), shape).astype(jnp.bfloat16).astype(jnp.float32)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_an_activation_and_its_gradient_are_those_of_fp32_rounded(name: str) -> None:
    x, dy = drawn(0, *TOKENS, SIZE), drawn(1, *TOKENS, SIZE)

    def both(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(ACTIVATIONS[name], x)
        return y, *pull(dy)

    wide, narrow = jax.jit(both)(x, dy), jax.jit(both)(*(a.astype(jnp.bfloat16) for a in (x, dy)))
    for expected, found in zip(wide, narrow, strict=True):
        np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_activations_in_bf16_are_torchs(name: str) -> None:
    torch = pytest.importorskip("torch")
    from transformers.activations import ACT2FN

    x = drawn(0, *TOKENS, SIZE)
    reference = ACT2FN[name](torch.tensor(np.asarray(x)).bfloat16()).float().numpy()
    found = np.asarray(ACTIVATIONS[name](x.astype(jnp.bfloat16)).astype(jnp.float32))
    # Where exponentials differ in the last bit of fp32, a number in a thousand is rounded the other way.
    assert (found == reference).mean() > 0.998
    np.testing.assert_allclose(found, reference, rtol=2 * ROUNDING, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [scaled, shifted, lambda x, weight: rms_norm(x, weight, 1e-5)],
    ids=["scaled", "shifted", "norm"],
)
def test_the_gradient_of_a_weight_that_all_tokens_share_is_summed_in_fp32(
    function: Callable[[jax.Array, jax.Array], jax.Array],
) -> None:
    x, dy, weight = drawn(0, *TOKENS, SIZE), 1 + drawn(1, *TOKENS, SIZE) / 8, drawn(2, SIZE)

    def gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.vjp(lambda weight: function(x, weight), weight)[1](dy)[0]

    expected = jax.jit(gradient)(x, dy)
    found = jax.jit(gradient)(x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16))
    assert found.dtype == jnp.float32
    # Roundings of a thousand products, up and down by chance, and one of their sum.
    np.testing.assert_allclose(found, expected, rtol=ROUNDING, atol=ROUNDING * float(jnp.abs(expected).max()))
