"""Splash attention against the plain one, interpreted; and compiled for a TPU that isn't there."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ntjax.layout import Layout
from ntjax.mesh import MANUAL, ROWS, SEQUENCE, make_mesh
from ntjax.models import Model, build
from ntjax.ops.attention import Tokens, across, attention, plain
from ntjax.ops.splash import blocks, splash

interpreted = partial(splash, interpret=True)


def packed(rows: int, time: int) -> Tokens:
    """Rows of documents from some point of their own on, then padding; the first ends without any."""
    rng = np.random.default_rng(0)
    positions, segments = np.zeros((2, rows, time), np.int32)
    for row in range(rows):
        start, segment = 0, 1
        while start < time - 9 * row:
            end = min(start + int(rng.integers(2, time // 2)), time - 9 * row)
            positions[row, start:end] = rng.integers(0, 9) + np.arange(end - start)
            segments[row, start:end] = segment
            start, segment = end, segment + 1
    return Tokens(jnp.asarray(positions), jnp.asarray(segments))


def arrays(rows: int, time: int, head_dim: int = 64, dtype: str = "float32") -> list[jax.Array]:
    """q [rows, time, 4, head_dim], k and v [rows, time, 2, head_dim]."""
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.standard_normal((rows, time, heads, head_dim)), dtype) for heads in (4, 2, 2)]


def results(kernel: Callable[..., jax.Array], qkv: list[jax.Array], place: Tokens) -> list[jax.Array]:
    """The kernel's values and gradients, of what isn't padding."""
    learned = (place.segments > 0)[..., None, None]

    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array, place: Tokens) -> list[jax.Array]:
        y, backward = jax.vjp(lambda q, k, v: jnp.where(learned, kernel(q, k, v, place), 0), q, k, v)
        return [y, *backward(jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))]

    return both(*qkv, place)


def same(ours: list[jax.Array], theirs: list[jax.Array]) -> None:
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize(("time", "head_dim", "window"), [(300, 64, None), (128, 80, 5), (700, 64, 200)])
def test_values_and_gradients_are_the_plain_ones(time: int, head_dim: int, window: int | None) -> None:
    qkv, place = arrays(2, time, head_dim), packed(2, time)
    same(
        results(lambda q, k, v, at: interpreted(q, k, v, at, at, window), qkv, place),
        results(lambda q, k, v, at: plain(q, k, v, at, at, window), qkv, place),
    )


def test_padding_is_finite_and_so_are_its_gradients() -> None:
    place = Tokens(jnp.zeros((1, 200), int), jnp.zeros((1, 200), int).at[:, 64:96].set(1))
    qkv = arrays(1, 200, dtype="bfloat16")
    y, backward = jax.vjp(jax.jit(lambda q, k, v: interpreted(q, k, v, place, place, None)), *qkv)
    assert y.dtype == jnp.bfloat16
    assert all(bool(jnp.isfinite(x.astype(jnp.float32)).all()) for x in (y, *backward(y)))


def test_blocks_are_few_and_padding_is_little() -> None:
    sizes = {
        128: (128, 128),
        300: (384, 384),
        512: (512, 512),
        513: (384, 768),
        1100: (384, 1152),
        8192: (512, 8192),
    }
    assert {time: blocks(time) for time in sizes} == sizes


def test_what_it_cant_do_is_left_to_other_kernels() -> None:
    q, k, v = arrays(1, 128)
    place, one = packed(1, 128), packed(1, 20)
    with pytest.raises(NotImplementedError):
        splash(q[:, :64], k, v, jax.tree.map(lambda x: x[:, :64], place), place, None)
    with pytest.raises(NotImplementedError):
        splash(q[:, :20], k[:, :20], v[:, :20], one, one, None)
    y = attention(q[:, :20], k[:, :20], v[:, :20], one, one, kernel="splash")
    np.testing.assert_array_equal(y, plain(q[:, :20], k[:, :20], v[:, :20], one, one, None))


def test_pallas_is_imported_where_it_is_used() -> None:
    code = "import sys, ntjax.ops.attention; sys.exit(any('pallas' in name for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2, "sequence": 2}, {"data": 4}], ids=str
)
def test_devices_with_rows_and_parts_of_rows_of_their_own(sizes: dict[str, int]) -> None:
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    qkv, place = arrays(4, 512, 16), packed(4, 512)

    def one(q: jax.Array, k: jax.Array, v: jax.Array, own: Tokens) -> jax.Array:
        keys, k, v = across(own, k, v) if mesh.shape[SEQUENCE] > 1 else (own, k, v)
        return interpreted(q, k, v, own, keys, 300)

    manual = {axis for axis in MANUAL if mesh.shape[axis] > 1}
    split = PartitionSpec(
        tuple(axis for axis in ROWS if axis in manual), SEQUENCE if SEQUENCE in manual else None
    )
    run = jax.shard_map(one, mesh=mesh, in_specs=split, out_specs=split, axis_names=manual, check_vma=False)
    same(results(run, qkv, place), results(lambda q, k, v, at: plain(q, k, v, at, at, 300), qkv, place))


def test_a_mesh_that_is_left_to_xla() -> None:
    mesh = make_mesh({"fsdp": 2, "sequence": 2, "tensor": 2})
    qkv, place = arrays(4, 128, 16), packed(4, 128)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, at: Tokens) -> jax.Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return interpreted(q, k, v, at, at, None)

    rows = NamedSharding(mesh, PartitionSpec(MANUAL))
    same(
        results(run, *jax.device_put((qkv, place), rows)),
        results(lambda q, k, v, at: plain(q, k, v, at, at, None), qkv, place),
    )
    with pytest.raises(NotImplementedError), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        interpreted(*(x[:3] for x in qkv), *[jax.tree.map(lambda x: x[:3], place)] * 2, None)


HF = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def kernels(function: Callable[..., Any], model: Model, rows: tuple[str, ...]) -> list[str]:
    """The splash kernels in a function of (weights, ids, tokens), compiled for the devices of the model's layout."""
    assert model.layout is not None
    shapes = {path: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for path, spec in model.specs.items()}
    places = model.layout.shardings(shapes, model.specs)
    params = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[path]) for path, x in shapes.items()
    }
    place = NamedSharding(model.layout.mesh, PartitionSpec(rows))
    ids = jax.ShapeDtypeStruct((4, 256), jnp.int32, sharding=place)
    text = jax.jit(function).lower(params, ids, Tokens(ids, ids)).compile().as_text()
    return sorted(re.findall(r"%splash_mha_(fwd|dq|dkv)\S* = .*tpu_custom_call", text))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu compiles for TPUs")
def test_models_compile_for_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    from ntjax.estimate.target import target

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = target("v5e:2x2").devices

    def made(sizes: dict[str, int], remat: Any, zero: int) -> Model:
        layout = Layout(make_mesh(sizes, devices), zero)
        return build(HF, dtype="bfloat16", remat=remat, attention="auto", layout=layout)

    def gradient(model: Model) -> Callable[..., Any]:
        def loss(*arguments: Any) -> jax.Array:
            return model.hidden(*arguments).astype(jnp.float32).sum()

        return jax.grad(loss)

    model = made({"fsdp": 2, "tensor": 2}, "full", 3)
    assert kernels(gradient(model), model, ROWS) == ["dkv", "dq", "fwd", "fwd"]
    kept = made({"fsdp": 2, "sequence": 2}, ("attention",), 3)
    assert kernels(gradient(kept), kept, ROWS) == ["dkv", "dq", "fwd"]
    sampled = made({"fsdp": 2, "tensor": 2}, "none", 2)
    assert kernels(sampled.prefill, sampled, MANUAL) == ["fwd"]
