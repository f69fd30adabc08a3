"""4-bit weights turned for TPUs stand for the same numbers, and multiply as they do."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntjax import mesh as meshes
from ntjax.layout import Layout
from ntjax.models import build
from ntjax.parallel import over_rows
from ntjax.quantised import Kind, quantise_4bit
from ntjax.turned import Turned, turned
from ntjax.weights import dense, einsum

SHAPES = {
    "two blocks a row": (6, 128),
    "rows that begin anywhere among 256 blocks": (5, 11008),
    "more than 256 blocks a row": (3, 32896),
    "heads": (2, 3, 256),
}


def numbers(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def stack(nodes: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *nodes)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_it_stands_for_the_same_numbers(kind: Kind, double: bool, shape: tuple[int, ...]) -> None:
    node = quantise_4bit(numbers(shape), kind, double, shape)
    other = turned(node, shape[-1])
    assert isinstance(other, Turned)
    assert (other.shape, other.ndim) == (node.shape, node.ndim)
    np.testing.assert_array_equal(
        jax.jit(dense, static_argnums=1)(other, jnp.float32), node.dense(jnp.float32)
    )


def test_it_is_as_small() -> None:
    node = turned(quantise_4bit(numbers((64, 4096)), "nf4", True, (64, 4096)), 4096)
    assert sum(x.nbytes for x in jax.tree.leaves(node)) <= 0.53 * math.prod(node.shape)


def test_several_inputs_are_one() -> None:
    """An attention's output takes heads and their dimensions in."""
    node = quantise_4bit(numbers((6, 4, 64)), "nf4", True, (6, 4, 64))
    np.testing.assert_array_equal(turned(node, 256).dense(jnp.float32), node.dense(jnp.float32))


def test_a_stack_is_turned_as_its_layers_are_on_host_and_device() -> None:
    layers = [quantise_4bit(numbers((300, 128), seed), "nf4", True, (300, 128)) for seed in range(2)]
    one_by_one = stack([turned(layer, 128) for layer in layers])
    together = jax.jit(lambda w: turned(w, 128))(stack(layers))
    jax.tree.map(np.testing.assert_array_equal, one_by_one, together)
    assert together.shape == (2, 300, 128)


def test_halves_that_are_not_whole_blocks_stay_as_they_are() -> None:
    node = quantise_4bit(numbers((4, 192)), "nf4", True, (4, 192))
    assert turned(node, 192) is node


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_and_their_gradients_are_the_same(dtype: str) -> None:
    node = quantise_4bit(numbers((96, 256)), "nf4", True, (96, 256))
    x, dy = (jnp.asarray(numbers(shape, 1), dtype) for shape in ((2, 5, 256), (2, 5, 96)))

    @jax.jit
    def both(w: Any) -> Any:
        y, back = jax.vjp(lambda x: einsum("bte,me->btm", x, w), x)
        return y, back(dy)[0]

    tolerance = 1e-5 if dtype == "float32" else 2e-2  # of bf16, a last bit
    for ours, plain in zip(both(turned(node, 256)), both(node), strict=True):
        assert ours.dtype == plain.dtype == dtype
        np.testing.assert_allclose(ours.astype("float32"), plain.astype("float32"), tolerance, tolerance)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 2, "sequence": 2}])
@pytest.mark.parametrize("double", [True, False])
def test_devices_share_out_its_outputs(sizes: dict[str, int], double: bool) -> None:
    hf = {"model_type": "llama", "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256}
    hf |= {"num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": True}
    layout = Layout(meshes.make_mesh(sizes), 3)
    specs = build(hf, layout=layout).specs
    path, shape = "blocks.mlp.up", (256, 128)
    node = stack([quantise_4bit(numbers(shape, seed), "nf4", double, shape) for seed in range(2)])
    x = jnp.asarray(numbers((8, 4, 128), 9))

    def summed(x: jax.Array, params: Any) -> jax.Array:
        def product(params: Any, x: jax.Array) -> jax.Array:
            layer = jax.tree.map(lambda leaf: leaf[1], params[path])
            return einsum("bte,me->btm", x, layer) ** 2

        return over_rows(layout, product, params, {path: specs[path]}, x).sum()

    held = layout.put({path: turned(node, 128)}, specs)
    parts = held[path].codes.addressable_shards[0].data.shape
    assert parts == (2, 1, 64, 256 // (sizes["fsdp"] * sizes.get("tensor", 1)))
    ours = jax.jit(jax.value_and_grad(summed))(x, held)
    wanted = jax.value_and_grad(
        lambda x: (jnp.einsum("bte,me->btm", x, node.dense("float32")[1]) ** 2).sum()
    )(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-3), ours, wanted)
