"""On CPUs what layers lay aside in bf16 are words; gradients are the same bit for bit, whatever is kept."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from ntjax import narrow
from ntjax.ops.remat import named, rematerialised

LAYERS, ROWS, WIDTH = 3, 8, 16


def gradients(keep: Any) -> tuple[Any, str]:
    """Of a scan over layers that name what they compute, and the program they are of."""

    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        gate = named(x @ w, "gate")
        return x + named(jnp.tanh(gate) * 0.5, "mlp_out"), None

    def loss(x: jax.Array, stack: jax.Array) -> jax.Array:
        return jax.lax.scan(rematerialised(layer, keep), x, stack)[0].astype(jnp.float32).sum()

    x = jax.random.normal(jax.random.key(0), (ROWS, WIDTH), jnp.bfloat16)
    stack = jax.random.normal(jax.random.key(1), (LAYERS, WIDTH, WIDTH), jnp.bfloat16)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(x, stack)
    return traced.lower().compile()(x, stack), str(traced.jaxpr)


@pytest.mark.parametrize("keep", ["none", "full", "minimal", ("gate",)])
def test_what_is_laid_aside_in_bf16_is_words(keep: Any) -> None:
    found, program = gradients(keep)
    stacked = f"[{LAYERS},{ROWS},{WIDTH}]"
    assert "u16" + stacked in program
    assert "bf16" + stacked not in program
    expected, plain = gradients("everything")
    assert "bf16" + stacked in plain
    for ours, theirs in zip(found, expected, strict=True):
        assert jnp.array_equal(ours, theirs)


def test_programs_for_other_platforms_keep_bf16() -> None:
    with narrow.traced_for("tpu"):
        _, program = gradients("none")
    assert f"bf16[{LAYERS},{ROWS},{WIDTH}]" in program
    assert "u16" not in program
