"""Log-probabilities, entropy and accuracy in chunks, against torch; and what is never held."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ntjax.ops import logprobs
from ntjax.ops.logprobs import token_logprobs

BATCH, TIME, EMBED, VOCAB = 2, 7, 5, 11
ONE_TOKEN = 4 * BATCH * VOCAB  # bytes of the logits of one time step
CHUNKINGS = {"one chunk": 10**9, "by 3 with a rest": 3 * ONE_TOKEN, "by 1": ONE_TOKEN, "less than 1": 1}


@pytest.fixture(params=CHUNKINGS)
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", CHUNKINGS[request.param])


def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """hidden [B, T, D], head [V, D], and targets of which some are the mode."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((BATCH, TIME, EMBED)).astype(np.float32)
    head = rng.standard_normal((VOCAB, EMBED)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (BATCH, TIME), dtype=np.int32)
    targets[:, ::2] = (hidden @ head.T).argmax(-1)[:, ::2]
    return hidden, head, targets


@pytest.mark.usefixtures("chunks")
def test_scores_are_torchs() -> None:
    hidden, head, targets = arrays()
    logits = torch.tensor(hidden) @ torch.tensor(head).T
    index = torch.tensor(targets).long()
    ours = token_logprobs(*map(jnp.asarray, (hidden, head, targets)))
    reference = torch.log_softmax(logits, -1).gather(-1, index[..., None])[..., 0]
    np.testing.assert_allclose(ours.logp, reference.numpy(), atol=1e-6)
    np.testing.assert_allclose(
        ours.entropy, torch.distributions.Categorical(logits=logits).entropy(), atol=1e-6
    )
    np.testing.assert_array_equal(ours.correct, (logits.argmax(-1) == index).numpy())
    assert 0 < int(ours.correct.sum()) < ours.correct.size


def test_entropy_of_equal_logits_is_that_of_the_uniform_whatever_their_size() -> None:
    scores = token_logprobs(jnp.full((1, 1, 1), 1000.0), jnp.ones((VOCAB, 1)), jnp.zeros((1, 1), jnp.int32))
    np.testing.assert_allclose(scores.entropy, np.log(VOCAB), rtol=1e-4)  # 1000 is a multiple of 6e-5 in fp32


@pytest.mark.usefixtures("chunks")
def test_gradients_are_torchs() -> None:
    hidden, head, targets = arrays()
    weights = np.random.default_rng(1).standard_normal(targets.shape).astype(np.float32)
    h, w = (torch.tensor(x, requires_grad=True) for x in (hidden, head))
    logp = torch.log_softmax(h @ w.T, -1).gather(-1, torch.tensor(targets).long()[..., None])[..., 0]
    (logp * torch.tensor(weights)).sum().backward()

    def weighted(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return (token_logprobs(hidden, head, jnp.asarray(targets)).logp * weights).sum()

    ours = jax.jit(jax.grad(weighted, argnums=(0, 1)))(jnp.asarray(hidden), jnp.asarray(head))
    for gradient, leaf in zip(ours, (h, w), strict=True):
        assert leaf.grad is not None
        np.testing.assert_allclose(gradient, leaf.grad.numpy(), atol=5e-6)


@pytest.mark.usefixtures("chunks")
def test_entropy_is_reported_and_never_differentiated() -> None:
    hidden, head, targets = map(jnp.asarray, arrays())
    gradient = jax.grad(lambda h: token_logprobs(h, head, targets).entropy.sum())(hidden)
    assert not gradient.any()


def test_bf16_logits_are_normalised_in_fp32() -> None:
    hidden, head, targets = map(jnp.asarray, arrays())
    scores = token_logprobs(hidden.astype(jnp.bfloat16), head, targets)
    assert scores.logp.dtype == scores.entropy.dtype == jnp.float32
    logits = jnp.einsum("btd,vd->btv", hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)).astype(
        jnp.float32
    )
    expected = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(scores.logp, expected, atol=1e-6)


def largest_array(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Elements of the largest array in the compiled gradient for B 2, T 64, D 8, V 512."""
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", chunk_bytes)

    def total(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
        return token_logprobs(hidden, head, targets).logp.sum()

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in [(2, 64, 8), (512, 8)]]
    targets = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    program = jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(*shapes, targets).compile().as_text()
    assert program
    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"\w\d+\[([\d,]+)\]", program)]
    return max(sizes)


def test_logits_of_all_tokens_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = 2 * 4 * 512  # rows, times a chunk, vocab
    assert largest_array(2**40, monkeypatch) == 2 * 64 * 512
    assert largest_array(4 * chunk, monkeypatch) == chunk
