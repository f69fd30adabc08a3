"""Products of bf16 by a CPU's own instructions are the same as without them, on one device and on several."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ntjax import mesh as meshes
from ntjax import narrow

ROWS, INPUTS, OUTPUTS = 96, 64, 160


def arrays() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows, a matrix, and the gradient of their product."""
    draw = np.random.default_rng(0).normal
    x, w, dy = (
        draw(size=shape).astype(np.float32) for shape in ((ROWS, INPUTS), (OUTPUTS, INPUTS), (ROWS, OUTPUTS))
    )
    return jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16)


def both(x: jax.Array, w: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
    """The product and both gradients."""
    y, back = jax.vjp(narrow.product, x, w)
    return y, *back(dy)


def compiled(*given: jax.Array) -> list[str]:
    return jax.jit(both).lower(*given).compile().as_text().splitlines()


@pytest.fixture(params=[True, False], ids=["with instructions", "without"])
def fitted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(narrow, "fitted", lambda: request.param)
    return request.param


def same(found: tuple[jax.Array, ...], x: jax.Array, w: jax.Array, dy: jax.Array) -> None:
    """Within a last bit of the exact ones, rounded."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    for ours, exact in zip(found, (x @ w.T, dy @ w, dy.T @ x), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=2**-8, atol=2**-9)


def test_sums_are_fp32_and_rounded_once(fitted: bool) -> None:
    given = arrays()
    same(jax.jit(both)(*given), *given)
    kinds = [line.split(" dot(")[0].split()[-1] for line in compiled(*given) if " dot(" in line]
    assert len(kinds) == 3
    assert all(kind.startswith("f32") for kind in kinds)


def test_programs_for_other_platforms_have_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "_instructions", lambda: {"amx_bf16"})
    assert narrow.fitted()
    with narrow.traced_for("tpu"):
        assert not narrow.fitted()
    monkeypatch.setattr(narrow, "_instructions", lambda: {"avx512f"})
    assert not narrow.fitted()


def test_gradients_through_a_checkpoint_and_a_scan(fitted: bool) -> None:
    x, w, _ = arrays()
    stack, back = jnp.stack([w, w / 2]), jnp.stack([w.T, w.T / 2])

    def loss(x: jax.Array, both: tuple[jax.Array, jax.Array]) -> jax.Array:
        def layer(x: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            up, down = pair
            return jnp.tanh(narrow.product(narrow.product(x, up), down) / 64).astype(x.dtype), None

        return jax.lax.scan(jax.checkpoint(layer), x, both)[0].astype(jnp.float32).sum()

    ours = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, (stack, back))
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (x, (stack, back)))
    exact = jax.grad(loss, argnums=(0, 1))(*wide)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        assert np.linalg.norm(a.astype(np.float32) - b) < 0.03 * np.linalg.norm(b)


def test_rows_and_outputs_on_several_devices(fitted: bool) -> None:
    mesh = meshes.make_mesh({"data": 4, "tensor": 2})
    given = arrays()
    parts = PartitionSpec("data"), PartitionSpec("tensor"), PartitionSpec("data", "tensor")
    placed = [jax.device_put(a, NamedSharding(mesh, p)) for a, p in zip(given, parts, strict=True)]
    same(jax.jit(both)(*placed), *given)
