"""Per-token log-probabilities from hidden states, never holding [batch, time, vocab], and of wanted tokens alone.

Tokens that are wanted are laid together and go through the head in chunks; the loop ends with the last of them, so what
isn't learned (prompts, padding) costs nothing.

Axes: B batch, T time, N = B * T tokens, C those of a chunk, D embed, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from ntjax.weights import cast, einsum

CHUNK_BYTES = 2**30  # of fp32 logits alive at a time, at most
PIECES = 8  # into which a batch's tokens are cut: the finer, the less is computed of what isn't wanted
LEAST = 128  # tokens of a chunk: of fewer, reading the head would take longer than computing with it


class TokenLogprobs(NamedTuple):
    """Of each token given those before it: log-probability, the distribution's entropy (nats), was it the mode.

    `log_collision` is the log of the sum of squared probabilities. What isn't used of them isn't computed.
    """

    logp: jax.Array  # [B, T] fp32
    entropy: jax.Array  # [B, T] fp32, no gradient
    correct: jax.Array  # [B, T] bool
    log_collision: jax.Array  # [B, T] fp32, no gradient


class Likelihood(NamedTuple):
    """Sums over tokens, [] fp32: log-probability, entropy (nats), how many were the mode. The first has a gradient."""

    logp: jax.Array
    entropy: jax.Array
    correct: jax.Array


def token_logprobs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, wanted: jax.Array | None = None
) -> TokenLogprobs:
    """log p(targets | hidden): hidden [B, T, D], head [V, D], targets [B, T] int32; zero where `wanted` [B, T] isn't.

    Logits exist for a chunk of tokens at once, and again in the backward pass, which keeps only each token's log of
    the sum of exponentials. The gradient of the chosen logit is taken by comparison: a gather's would be a scatter.
    """
    scores = _scores(*_flat(hidden, targets), head, _mask(wanted, targets))
    return jax.tree.map(lambda x: x.reshape(targets.shape), scores)


def likelihood(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, wanted: jax.Array | None = None
) -> Likelihood:
    """`token_logprobs`, summed over the tokens that are wanted.

    A sum's gradient is known beforehand but for one factor: it is formed while the logits are there, and they never
    have to be formed again.
    """
    return _likelihood(*_flat(hidden, targets), head, _mask(wanted, targets))


def _flat(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    return hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)


def _mask(wanted: jax.Array | None, targets: jax.Array) -> jax.Array:
    return jnp.ones(targets.size, bool) if wanted is None else wanted.reshape(-1)


class _Logits(NamedTuple):
    """Of a chunk: fp32 logits [C, V], their maxima [C, 1], exponentials less these [C, V] and their sums [C]."""

    logits: jax.Array
    top: jax.Array
    exps: jax.Array
    total: jax.Array

    @classmethod
    def of(cls, logits: jax.Array) -> _Logits:
        logits = logits.astype(jnp.float32)
        top = jnp.max(logits, axis=-1, keepdims=True)
        exps = jnp.exp(logits - top)
        return cls(logits, top, exps, jnp.sum(exps, axis=-1))

    @property
    def log_z(self) -> jax.Array:
        return self.top[..., 0] + jnp.log(self.total)

    def scores(self, targets: jax.Array) -> TokenLogprobs:
        ids = _ids(self.logits)
        chosen = jnp.sum(jnp.where(ids == targets[:, None], self.logits, 0), axis=-1)
        # The first of the largest, as argmax, which XLA on CPU doesn't vectorise.
        mode = jnp.min(jnp.where(self.logits == self.top, ids, self.logits.shape[-1]), axis=-1)
        entropy = self.log_z - jnp.sum(self.exps * self.logits, axis=-1) / self.total
        log_collision = jnp.log(jnp.sum(jnp.square(self.exps), axis=-1)) - 2 * jnp.log(self.total)
        return TokenLogprobs(chosen - self.log_z, entropy, mode == targets, log_collision)


@jax.custom_vjp
def _scores(hidden: jax.Array, targets: jax.Array, head: Any, wanted: jax.Array) -> TokenLogprobs:
    """`token_logprobs` of hidden [N, D]."""
    return _scores_forward(hidden, targets, head, wanted)[0]


def _scores_forward(hidden: jax.Array, targets: jax.Array, head: Any, wanted: jax.Array) -> tuple[Any, Any]:
    ready = _ready(head, hidden)

    def chunk(carry: None, part: tuple) -> tuple[None, tuple]:
        h, t, _ = part
        found = _Logits.of(_product(h, ready))
        return None, (found.scores(t), found.log_z)

    _, (scores, log_z) = _over_chunks(chunk, None, (hidden, targets), wanted, head)
    return scores, (hidden, targets, head, wanted, log_z)


def _scores_backward(kept: tuple, grads: TokenLogprobs) -> tuple[jax.Array, None, Any, None]:
    hidden, targets, head, wanted, log_z = kept
    ready = _ready(head, hidden)

    def chunk(d_head: Any, part: tuple) -> tuple[Any, jax.Array]:
        h, t, z, g, w = part
        logits, pull = jax.vjp(_product, h, ready)
        probs = jnp.exp(logits.astype(jnp.float32) - z[:, None])
        d_logits = jnp.where(w, g, 0)[:, None] * ((_ids(logits) == t[:, None]) - probs)
        d_hidden, d_part = pull(d_logits.astype(logits.dtype))
        return jax.tree.map(jnp.add, d_head, d_part), d_hidden

    zeros = jax.tree.map(jnp.zeros_like, head)
    d_head, d_hidden = _over_chunks(chunk, zeros, (hidden, targets, log_z, grads.logp), wanted, head)
    return d_hidden, None, d_head, None


_scores.defvjp(_scores_forward, _scores_backward)


@jax.custom_vjp
def _likelihood(hidden: jax.Array, targets: jax.Array, head: Any, wanted: jax.Array) -> Likelihood:
    """`likelihood` of hidden [N, D]."""
    ready = _ready(head, hidden)

    def chunk(sums: Likelihood, part: tuple) -> tuple[Likelihood, tuple]:
        h, t, w = part
        return _added(sums, _Logits.of(_product(h, ready)).scores(t), w), ()

    zeros = Likelihood(*[jnp.zeros((), jnp.float32)] * 3)
    return _over_chunks(chunk, zeros, (hidden, targets), wanted, head)[0]


def _added(sums: Likelihood, scores: TokenLogprobs, wanted: jax.Array) -> Likelihood:
    each = (jnp.where(wanted, x, 0).sum(dtype=jnp.float32) for x in scores[: len(sums)])
    return Likelihood(*map(jnp.add, sums, each))


def _likelihood_forward(
    hidden: CustomVJPPrimal, targets: CustomVJPPrimal, head: Any, wanted: CustomVJPPrimal
) -> tuple[Likelihood, tuple]:
    learns = any(leaf.perturbed for leaf in jax.tree.leaves(head, is_leaf=_is_primal))
    head = jax.tree.map(lambda leaf: leaf.value, head, is_leaf=_is_primal)
    ready = _ready(head, hidden.value)

    def chunk(carry: tuple[Likelihood, Any], part: tuple) -> tuple[tuple[Likelihood, Any], jax.Array]:
        (sums, d_head), (h, t, w) = carry, part
        if learns:
            logits, pull = jax.vjp(_product, h, ready)
        else:
            logits, pull = jax.vjp(lambda h: _product(h, ready), h)
        found = _Logits.of(logits)
        probs = found.exps * (1 / found.total)[:, None]
        d_logits = jnp.where(w[:, None], (_ids(logits) == t[:, None]) - probs, 0)
        d_hidden, *d_part = pull(d_logits.astype(logits.dtype))
        d_head = jax.tree.map(jnp.add, d_head, d_part[0]) if learns else None
        return (_added(sums, found.scores(t), w), d_head), d_hidden

    zeros = Likelihood(*[jnp.zeros((), jnp.float32)] * 3)
    carry = zeros, jax.tree.map(jnp.zeros_like, head) if learns else None
    given = hidden.value, targets.value
    (sums, d_head), d_hidden = _over_chunks(chunk, carry, given, wanted.value, head)
    return sums, (d_hidden, d_head)


def _likelihood_backward(kept: tuple, grads: Likelihood) -> tuple[jax.Array, None, Any, None]:
    d_hidden, d_head = kept
    factor = 0.0 if isinstance(grads.logp, SymbolicZero) else grads.logp

    def scaled(x: jax.Array) -> jax.Array:
        return (x * factor).astype(x.dtype)

    return scaled(d_hidden), None, jax.tree.map(scaled, d_head), None


_likelihood.defvjp(_likelihood_forward, _likelihood_backward, symbolic_zeros=True)


def _is_primal(x: Any) -> bool:
    return isinstance(x, CustomVJPPrimal)


def _product(hidden: jax.Array, head: Any) -> jax.Array:
    return einsum("ND,VD->NV", hidden, head)


def _ready(head: Any, hidden: jax.Array) -> Any:
    """The head in the dtype of `hidden`, cast once and not for every chunk, if that is narrower; by a wider one its
    gradients would be wider than itself."""
    return cast(head, hidden.dtype) if isinstance(head, jax.Array) else head


def _ids(logits: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


def chunk(tokens: int, vocab: int) -> int:
    """Tokens of a chunk, of so many."""
    return min(max(LEAST, -(-tokens // PIECES)), max(1, CHUNK_BYTES // (4 * vocab)))


def _over_chunks(
    body: Callable[[Any, tuple], tuple[Any, Any]], carry: Any, arrays: tuple, wanted: jax.Array, head: Any
) -> tuple[Any, Any]:
    """Carries `body` over chunks of `arrays` [N, ...] with `wanted` [N] as the last of them, tokens wanted first; it
    ends with these. Results [N, ...] are zero where a token isn't wanted."""
    total = len(wanted)
    size = chunk(total, head.shape[0])
    count = -(-total // size)
    if count == 1:
        carry, found = body(carry, (*arrays, wanted))
        return carry, jax.tree.map(lambda x: _cleared(x, wanted), found)
    order = jnp.argsort(~wanted, stable=True)
    short = count * size - total

    def laid(x: jax.Array) -> jax.Array:
        return jnp.pad(x[order], [(0, short), *[(0, 0)] * (x.ndim - 1)])

    parts = tuple(map(laid, (*arrays, wanted)))

    def step(number: jax.Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        carry, found = state
        at = number * size
        carry, new = body(carry, tuple(jax.lax.dynamic_slice_in_dim(x, at, size) for x in parts))
        put = jax.lax.dynamic_update_slice_in_dim
        return carry, jax.tree.map(lambda all_, one: put(all_, one, at, 0), found, new)

    shapes = jax.eval_shape(body, carry, tuple(x[:size] for x in parts))[1]
    found = jax.tree.map(lambda x: jnp.zeros((count * size, *x.shape[1:]), x.dtype), shapes)
    with jax.named_scope(f"at_most_{count}_times"):  # by which a plan knows how often
        carry, found = jax.lax.fori_loop(0, -(-wanted.sum() // size), step, (carry, found))
    place = jnp.argsort(order)
    return carry, jax.tree.map(lambda x: _cleared(x[place], wanted), found)


def _cleared(x: jax.Array, wanted: jax.Array) -> jax.Array:
    """x [N, ...], zero where it isn't wanted."""
    return jnp.where(wanted.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros((), x.dtype))
