"""What follows from a weight's one line, worked out for small ones; and the one place where weights are used."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntjax.models import build
from ntjax.params import Spec, decays, initial, weight
from ntjax.weights import einsum
from tests.torch_reference import TINY, torch_model

SIZES = {"layers": 2, "embed": 6, "heads": 3, "head_dim": 4, "mlp": 5, "vocab": 7, "experts": 2}


def spec(axes: str, hf: str, init: str = "normal") -> Spec:
    return weight(SIZES, axes, hf, init).get_metadata()["spec"]


def test_a_projection_is_stored_as_torch_stores_it_with_layers_stacked() -> None:
    q = spec("embed -> heads head_dim", "model.layers.{layers}.q.weight")
    assert (q.stacked, q.outputs, q.inputs) == (("layers",), ("heads", "head_dim"), ("embed",))
    assert q.names == ("layers", "heads", "head_dim", "embed")
    assert q.shape == (2, 3, 4, 6)
    assert q.torch_shape == (12, 6)
    assert list(q.tensors()) == [((0,), "model.layers.0.q.weight"), ((1,), "model.layers.1.q.weight")]


def test_several_inputs_are_flattened_too() -> None:
    o = spec("heads head_dim -> embed", "model.layers.{layers}.o.weight")
    assert (o.shape, o.torch_shape) == ((2, 6, 3, 4), (6, 12))


def test_a_bias_a_norm_an_embedding_and_a_head() -> None:
    bias = spec("-> heads head_dim", "model.layers.{layers}.q.bias")
    norm = spec("embed", "model.norm.weight")
    embed = spec("vocab embed", "model.embed_tokens.weight")
    head = spec("embed -> vocab", "lm_head.weight")
    assert [s.shape for s in (bias, norm, embed, head)] == [(2, 3, 4), (6,), (7, 6), (7, 6)]
    assert [s.torch_shape for s in (bias, norm, embed, head)] == [(12,), (6,), (7, 6), (7, 6)]
    assert [decays(s) for s in (bias, norm, embed, head)] == [False, False, True, True]
    assert list(norm.tensors()) == [((), "model.norm.weight")]


def test_two_stacked_axes_are_two_indices() -> None:
    gate = spec("embed -> mlp", "model.layers.{layers}.experts.{experts}.gate.weight")
    assert (gate.shape, gate.torch_shape) == ((2, 2, 5, 6), (5, 6))
    assert list(gate.tensors())[1:3] == [
        ((0, 1), "model.layers.0.experts.1.gate.weight"),
        ((1, 0), "model.layers.1.experts.0.gate.weight"),
    ]


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_declares_transformers_tensors_one_by_one(tied: bool) -> None:
    hf = {**TINY, "tie_word_embeddings": tied, "attention_bias": True, "mlp_bias": True, "head_dim": 12}
    specs = build(hf).specs
    declared = {name: spec.torch_shape for spec in specs.values() for _, name in spec.tensors()}
    assert declared == {name: tuple(p.shape) for name, p in torch_model(hf).named_parameters()}


def test_initial_weights() -> None:
    specs = build({**TINY, "model_type": "qwen2"}).specs
    matrices = ["embed", "head", "blocks.attn.q", "blocks.mlp.down"]
    specs = {path: specs[path] for path in [*matrices, "norm", "blocks.attn.q_bias"]}
    params = initial(specs, jax.random.key(0))
    assert {path: p.shape for path, p in params.items()} == {path: s.shape for path, s in specs.items()}
    np.testing.assert_array_equal(params["norm"], np.ones(32))
    assert not params["blocks.attn.q_bias"].any()
    for path in matrices:
        assert float(params[path].std()) == pytest.approx(0.02, rel=0.05), path
        assert abs(float(params[path].mean())) < 0.002, path
    assert not jnp.array_equal(params["embed"], params["head"])
    assert not jnp.array_equal(params["blocks.attn.q"][0], params["blocks.attn.q"][1])


def test_initial_weights_are_a_function_of_the_key() -> None:
    specs = {"embed": build(TINY).specs["embed"]}
    first, again, other = (initial(specs, jax.random.key(seed))["embed"] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not jnp.array_equal(first, other)
    assert initial(specs, jax.random.key(3), jnp.bfloat16)["embed"].dtype == jnp.bfloat16


EQUATIONS = {
    "BTD,HhD->BTHh": ((2, 3, 6), (4, 5, 6)),
    "BTHh,DHh->BTD": ((2, 3, 4, 5), (6, 4, 5)),
    "BTD,MD->BTM": ((2, 3, 6), (7, 6)),
    "BD,VD->BV": ((2, 6), (9, 6)),
}


@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum_and_its_gradients_are_numpys(equation: str) -> None:
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in EQUATIONS[equation])
    y, backward = jax.vjp(lambda x, w: einsum(equation, x, w), x, w)
    expected, reference = jax.vjp(lambda x, w: jnp.einsum(equation, x, w), x, w)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    cotangent = jnp.asarray(rng.standard_normal(y.shape), jnp.float32)
    for ours, theirs in zip(backward(cotangent), reference(cotangent), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_einsum_computes_in_the_dtype_of_the_activation_and_keeps_the_weights_own() -> None:
    x, w = jnp.ones((2, 3, 6), jnp.bfloat16), jnp.ones((7, 6), jnp.float32)
    y, backward = jax.vjp(lambda w: einsum("BTD,MD->BTM", x, w), w)
    assert y.dtype == jnp.bfloat16
    assert backward(y)[0].dtype == jnp.float32


@pytest.mark.parametrize("equation", ["BTD,DM->BTM", "BTD,MD->BMT", "DBT,MD->BTM"])
def test_einsum_refuses_another_layout(equation: str) -> None:
    with pytest.raises(AssertionError):
        einsum(equation, jnp.ones((6, 6, 6)), jnp.ones((6, 6)))
