"""Log-probabilities, entropy and accuracy in chunks, against torch; what is never held, and never computed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ntjax.narrow import traced_for
from ntjax.ops import logprobs
from ntjax.ops.logprobs import likelihood, token_logprobs
from tests.jaxprs import equations

BATCH, TIME, EMBED, VOCAB = 2, 7, 5, 11
# (tokens of a chunk at least, pieces): how 14 tokens are cut up
CUTS = {"one chunk": (128, 1), "by 5 with a rest": (1, 3), "by 2": (1, 7), "by 1": (1, 14)}
WANTED = {"all": 1.0, "a third": 0.3, "none": 0.0}


@pytest.fixture(params=CUTS)
def cuts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    least, pieces = CUTS[request.param]
    monkeypatch.setattr(logprobs, "LEAST", least)
    monkeypatch.setattr(logprobs, "PIECES", pieces)


@pytest.fixture(params=WANTED)
def wanted(request: pytest.FixtureRequest) -> np.ndarray:
    """[B, T]."""
    return np.random.default_rng(2).random((BATCH, TIME)) < WANTED[request.param]


def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """hidden [B, T, D], head [V, D], and targets of which some are the mode."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((BATCH, TIME, EMBED)).astype(np.float32)
    head = rng.standard_normal((VOCAB, EMBED)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (BATCH, TIME), dtype=np.int32)
    targets[:, ::2] = (hidden @ head.T).argmax(-1)[:, ::2]
    return hidden, head, targets


@pytest.mark.usefixtures("cuts")
def test_scores_are_torchs(wanted: np.ndarray) -> None:
    hidden, head, targets = arrays()
    logits = torch.tensor(hidden) @ torch.tensor(head).T
    index = torch.tensor(targets).long()
    ours = token_logprobs(*map(jnp.asarray, (hidden, head, targets, wanted)))
    reference = torch.log_softmax(logits, -1).gather(-1, index[..., None])[..., 0]
    np.testing.assert_allclose(ours.logp, reference.numpy() * wanted, atol=1e-6)
    entropy = torch.distributions.Categorical(logits=logits).entropy().numpy()
    np.testing.assert_allclose(ours.entropy, entropy * wanted, atol=1e-6)
    correct = (logits.argmax(-1) == index).numpy() & wanted
    np.testing.assert_array_equal(ours.correct, correct)
    assert correct.sum() < correct.size
    sums = likelihood(*map(jnp.asarray, (hidden, head, targets, wanted)))
    expected = (reference.numpy() * wanted).sum(), (entropy * wanted).sum(), correct.sum()
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-6)


def test_entropy_of_equal_logits_is_that_of_the_uniform_whatever_their_size() -> None:
    scores = token_logprobs(jnp.full((1, 1, 1), 1000.0), jnp.ones((VOCAB, 1)), jnp.zeros((1, 1), jnp.int32))
    np.testing.assert_allclose(scores.entropy, np.log(VOCAB), rtol=1e-4)  # 1000 is a multiple of 6e-5 in fp32


def gradients(total: Callable[..., jax.Array], weights: np.ndarray) -> list[tuple[Any, Any]]:
    """Ours of `total(hidden, head, targets)`, and torch's of the weighted log-probs: of hidden, of the head."""
    hidden, head, targets = arrays()
    h, w = (torch.tensor(x, requires_grad=True) for x in (hidden, head))
    logp = torch.log_softmax(h @ w.T, -1).gather(-1, torch.tensor(targets).long()[..., None])[..., 0]
    (logp * torch.tensor(weights)).sum().backward()
    ours = jax.jit(jax.grad(lambda h, w: total(h, w, jnp.asarray(targets)), argnums=(0, 1)))(hidden, head)
    assert h.grad is not None
    assert w.grad is not None
    return list(zip(ours, (h.grad.numpy(), w.grad.numpy()), strict=True))


@pytest.mark.usefixtures("cuts")
def test_gradients_are_torchs(wanted: np.ndarray) -> None:
    weights = np.random.default_rng(1).standard_normal(wanted.shape).astype(np.float32)

    def total(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
        return (token_logprobs(hidden, head, targets, jnp.asarray(wanted)).logp * weights).sum()

    for ours, theirs in gradients(total, weights * wanted):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


@pytest.mark.usefixtures("cuts")
def test_gradients_of_sums_are_torchs(wanted: np.ndarray) -> None:
    def total(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
        return 3 * likelihood(hidden, head, targets, jnp.asarray(wanted)).logp

    for ours, theirs in gradients(total, 3 * wanted.astype(np.float32)):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


@pytest.mark.usefixtures("cuts")
def test_gradients_of_hidden_states_alone_are_the_same() -> None:
    hidden, head, targets = map(jnp.asarray, arrays())
    alone = jax.grad(lambda h: likelihood(h, head, targets).logp)(hidden)
    both = jax.grad(lambda h, w: likelihood(h, w, targets).logp, argnums=(0, 1))(hidden, head)
    np.testing.assert_allclose(alone, both[0], atol=1e-7)


@pytest.mark.usefixtures("cuts")
def test_entropy_is_reported_and_never_differentiated() -> None:
    hidden, head, targets = map(jnp.asarray, arrays())
    for function in (token_logprobs, likelihood):
        gradient = jax.grad(lambda h, function=function: function(h, head, targets).entropy.sum())(hidden)
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


@pytest.mark.usefixtures("cuts")
@pytest.mark.parametrize("function", [token_logprobs, likelihood])
def test_a_head_may_be_narrower_than_hidden_states(function: Callable[..., Any]) -> None:
    hidden, head, targets = map(jnp.asarray, arrays())
    narrow = head.astype(jnp.bfloat16)

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return function(hidden, head, targets).logp.sum()

    ours = jax.grad(loss, (0, 1))(hidden, narrow)
    expected = jax.grad(loss, (0, 1))(hidden, narrow.astype(jnp.float32))
    assert ours[1].dtype == jnp.bfloat16
    np.testing.assert_allclose(ours[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(ours[1].astype(jnp.float32), expected[1], rtol=0.02, atol=0.05)


@pytest.mark.parametrize("function", [token_logprobs, likelihood])
def test_a_head_is_cast_once_and_not_for_every_chunk(
    function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "LEAST", 1)
    hidden, head, targets = map(jnp.asarray, arrays())

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return function(hidden, head, targets).logp.sum()

    with traced_for("gpu"):  # where a product's gradient is bf16 without a cast
        jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden.astype(jnp.bfloat16), head)
    loops = [
        eqn.params["body_jaxpr"].jaxpr for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "while"
    ]
    assert loops
    for loop in loops:
        for eqn in equations(loop):
            cast = eqn.primitive.name == "convert_element_type" and eqn.outvars[0].aval.dtype == jnp.bfloat16
            assert not (cast and eqn.invars[0].aval.shape == head.shape), eqn


def test_what_is_not_wanted_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop goes round as often as there are chunks of wanted tokens."""
    monkeypatch.setattr(logprobs, "LEAST", 2)
    hidden, head, targets = map(jnp.asarray, arrays())
    rounds: list[int] = []
    product = logprobs._product

    def counted(hidden: jax.Array, head: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: rounds.append(1))
        return product(hidden, head)

    monkeypatch.setattr(logprobs, "_product", counted)
    for number, chunks in ((0, 0), (1, 1), (4, 2), (5, 3), (14, 7)):
        wanted = (jnp.arange(BATCH * TIME) < number).reshape(BATCH, TIME)
        rounds.clear()
        jax.block_until_ready(jax.jit(likelihood)(hidden, head, targets, wanted))
        jax.effects_barrier()
        assert len(rounds) == chunks


def largest_array(function: Callable[..., Any], pieces: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Elements of the largest array in the compiled gradient for B 2, T 64, D 8, V 512."""
    monkeypatch.setattr(logprobs, "LEAST", 1)
    monkeypatch.setattr(logprobs, "PIECES", pieces)

    def total(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
        return function(hidden, head, targets).logp.sum()

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in [(2, 64, 8), (512, 8)]]
    targets = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    program = jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(*shapes, targets).compile().as_text()
    assert program
    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"\w\d+\[([\d,]+)\]", program)]
    return max(sizes)


@pytest.mark.parametrize("function", [token_logprobs, likelihood])
def test_logits_of_all_tokens_are_never_held(
    function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert largest_array(function, 1, monkeypatch) == 2 * 64 * 512
    assert largest_array(function, 16, monkeypatch) == 8 * 512
