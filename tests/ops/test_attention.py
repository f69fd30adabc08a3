"""Who sees whom, by hand; what they make of it, against torch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ntjax.ops.attention import Tokens, attention, visible

PACKED = Tokens(jnp.asarray([[0, 1, 2, 0, 1, 0]]), jnp.asarray([[1, 1, 1, 2, 2, 0]]))


def test_a_token_sees_its_own_document_up_to_itself() -> None:
    assert visible(PACKED, PACKED, None)[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_a_window_counts_the_token_itself() -> None:
    assert visible(PACKED, PACKED, 2)[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_slots_of_a_cache_that_are_not_written_are_not_seen() -> None:
    # One slot of padding, three of tokens, two of nothing.
    keys = Tokens(jnp.asarray([[0, 0, 1, 2, 0, 0]]), jnp.asarray([[0, 1, 1, 1, 0, 0]]))
    query = Tokens(jnp.asarray([[2]]), jnp.asarray([[1]]))
    assert visible(query, keys, None)[0].astype(int).tolist() == [[0, 1, 1, 1, 0, 0]]


def arrays(dtype: str = "float32") -> tuple[list[jax.Array], jax.Array]:
    """q [2, 5, 4, 8], k and v [2, 7, 2, 8], and a random [2, 5, 7] of which every query sees something."""
    rng = np.random.default_rng(0)
    shapes = [(2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8)]
    seen = rng.random((2, 5, 7)) < 0.5
    seen[..., 0] = True
    return [jnp.asarray(2 * rng.standard_normal(s), dtype) for s in shapes], jnp.asarray(seen)


def in_torch(qkv: list[jax.Array], seen: jax.Array) -> tuple[list[torch.Tensor], torch.Tensor]:
    """torch's leaves and its attention of them, [B, T, H, h]."""
    leaves = [torch.tensor(np.asarray(x), requires_grad=True) for x in qkv]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    mask = torch.tensor(np.asarray(seen))[:, None]
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return leaves, y.transpose(1, 2)


def test_attention_and_its_gradient_are_torchs() -> None:
    qkv, seen = arrays()
    leaves, reference = in_torch(qkv, seen)
    y, backward = jax.vjp(jax.jit(lambda q, k, v: attention(q, k, v, seen)), *qkv)
    np.testing.assert_allclose(y, reference.detach().numpy(), atol=1e-6)
    cotangent = np.random.default_rng(1).standard_normal(y.shape).astype(np.float32)
    reference.backward(torch.tensor(cotangent))
    for ours, leaf in zip(backward(jnp.asarray(cotangent)), leaves, strict=True):
        assert leaf.grad is not None
        np.testing.assert_allclose(ours, leaf.grad.numpy(), atol=5e-6)


def test_bf16_scores_are_summed_and_normalised_in_fp32() -> None:
    # 256 keys with the same score: in bf16 their sum would stick at 256 ones, and 1/257 isn't there either.
    q, k = jnp.zeros((1, 1, 1, 8), jnp.bfloat16), jnp.zeros((1, 300, 1, 8), jnp.bfloat16)
    v = jnp.ones((1, 300, 1, 8), jnp.bfloat16)
    y = attention(q, k, v, jnp.ones((1, 1, 300), bool))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), 1.0, rtol=2**-8)
    scores = [e for e in jax.make_jaxpr(attention)(q, k, v, jnp.ones((1, 1, 300), bool)).eqns]
    products = [e for e in scores if e.primitive.name == "dot_general"]
    assert products[0].outvars[0].aval.dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_query_that_sees_nothing_is_finite(dtype: str) -> None:
    qkv, seen = arrays(dtype)
    blind = jnp.zeros_like(seen)
    y, backward = jax.vjp(jax.jit(lambda q, k, v: attention(q, k, v, blind)), *qkv)
    assert all(bool(jnp.isfinite(x.astype(jnp.float32)).all()) for x in (y, *backward(y)))
