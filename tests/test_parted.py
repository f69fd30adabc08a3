"""Parts of a weight that several devices hold, put together in one stage or two: the same weight, the same gradient."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ntjax.elsewhere import Parted
from ntjax.mesh import make_mesh
from ntjax.ops.remat import rematerialised
from ntjax.parallel import neighbours
from ntjax.weights import product

FSDP = PartitionSpec("fsdp")
WEIGHT = PartitionSpec(None, "fsdp")


@pytest.mark.parametrize("copied", [False, True], ids=["ZeRO 3", "ZeRO 2"])
@pytest.mark.parametrize("ring", [1, 2, 4, 8])
def test_stages_give_the_whole_weight_and_its_summed_gradient(ring: int, copied: bool) -> None:
    mesh = make_mesh({"fsdp": 8})
    x, w, dy = (jax.random.normal(jax.random.key(n), s) for n, s in enumerate([(32, 16), (24, 16), (32, 24)]))

    def rows(x: jax.Array, part: jax.Array, whole: jax.Array, dy: jax.Array) -> jax.Array:
        w = Parted(part, -1, jax.lax.stop_gradient(whole) if copied else None, ring)
        return (product(x, w, 1) * dy).sum(keepdims=True)[0]

    spread = partial(
        jax.shard_map, mesh=mesh, in_specs=(FSDP, WEIGHT, PartitionSpec(), FSDP), check_vma=False
    )
    found = jax.grad(lambda x, w: spread(rows, out_specs=FSDP)(x, w, w, dy).sum(), argnums=(0, 1))(x, w)
    wanted = jax.grad(lambda x, w: (jnp.einsum("NI,OI->NO", x, w) * dy).sum(), argnums=(0, 1))(x, w)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_xla_may_gather_once_for_what_a_layer_s_backward_pass_forms_again() -> None:
    """A barrier would keep the weight of a layer that is formed again apart from that of its gradient."""
    mesh = make_mesh({"fsdp": 8})
    x, w = jnp.ones((32, 16)), jnp.ones((16, 16))

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(FSDP, PartitionSpec(None, None, "fsdp")),
        out_specs=FSDP,
        check_vma=False,
    )
    def layers(x: jax.Array, parts: jax.Array) -> jax.Array:
        def layer(x: jax.Array, part: jax.Array) -> tuple[jax.Array, None]:
            return jnp.sin(product(x, Parted(part, -1), 1)), None

        return jax.lax.scan(rematerialised(layer, "full"), x, parts)[0]

    lowered = jax.jit(jax.grad(lambda w: layers(x, w).sum())).lower(jnp.stack([w, w]))
    assert "all_gather" in lowered.as_text()
    assert "optimization_barrier" not in lowered.as_text()


@pytest.mark.parametrize(
    ("shape", "ring"),
    [((2, 2, 4), 4), ((4, 4, 4), 4), ((4, 4, 1), 4), ((8, 1, 1), 1)],
    ids=["v5p:2x2x4", "v5p:4x4x4", "v5e:4x4", "a line"],
)
def test_slices_of_two_or_three_dimensions_gather_along_one_first(shape: tuple[int, ...], ring: int) -> None:
    devices = np.array([SimpleNamespace(platform="tpu", coords=at) for at in np.ndindex(shape)], dtype=object)
    mesh: Any = SimpleNamespace(devices=devices, shape={"fsdp": devices.size}, size=devices.size)
    assert neighbours(mesh) == ring
    mesh = SimpleNamespace(devices=devices, shape={"fsdp": devices.size // 2}, size=devices.size)
    assert neighbours(mesh) == 1
