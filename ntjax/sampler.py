"""Sampling from the trainer's own weights: one prefill and one compiled decode loop over a static cache.

Axes: B rows, T prompt time, N new tokens, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntjax.models import Model
from ntjax.ops.attention import Tokens
from ntjax.params import Params
from ntjax.weights import einsum

BUCKET = 64  # prompt and completion lengths are rounded up to this, so that few programs are compiled


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 takes the likeliest; top_k 0 and top_p 1 keep all."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class Completion:
    """`tokens` drawn after a prompt, the stop token included, and `logprobs` of each under the model (before
    temperature and truncation). `finished` is "stop" or "length"."""

    tokens: list[int]
    logprobs: list[float]
    finished: str


def generate(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_ids: Sequence[int],
    seed: int = 0,
    first_row: int = 0,
) -> list[Completion]:
    """A completion of each prompt; a row's draw depends on its prompt, its number (from `first_row`) and the seed."""
    ids, lengths = _left_padded(prompts)
    new = _rounded(sampling.max_new_tokens)
    decode = _compiled(model, new, sampling.temperature, sampling.top_k, sampling.top_p)
    stops = jnp.asarray(sorted(stop_ids) or [-1])
    rows = jnp.arange(first_row, first_row + len(prompts))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows)
    tokens, logprobs = decode(params, ids, lengths, stops, jnp.asarray(sampling.max_new_tokens), keys)
    return [
        _completion(t[: sampling.max_new_tokens].tolist(), p.tolist(), set(stop_ids))
        for t, p in zip(np.asarray(tokens), np.asarray(logprobs), strict=True)
    ]


def _completion(tokens: list[int], logprobs: list[float], stop_ids: set[int]) -> Completion:
    end = next((i + 1 for i, token in enumerate(tokens) if token in stop_ids), None)
    kept = len(tokens) if end is None else end
    return Completion(tokens[:kept], logprobs[:kept], "length" if end is None else "stop")


def _rounded(length: int) -> int:
    return -(-length // BUCKET) * BUCKET


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """ids [B, T] with the prompts at the right edge, and their lengths [B]."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    ids = np.zeros((len(prompts), _rounded(int(lengths.max()))), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[row.size - len(prompt) :] = prompt
    return ids, lengths


@lru_cache(maxsize=16)
def _compiled(model: Model, new: int, temperature: float, top_k: int, top_p: float) -> Any:
    """The program for one model, room for `new` tokens and one way of drawing."""

    def run(
        params: Params,
        ids: jax.Array,
        lengths: jax.Array,
        stops: jax.Array,
        limit: jax.Array,
        keys: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        batch, time = ids.shape
        offsets = jnp.arange(time) - (time - lengths[:, None])
        prompt = Tokens(jnp.maximum(offsets, 0), (offsets >= 0).astype(jnp.int32))
        hidden, cache = model.hidden(params, ids, prompt, model.cache(batch, time + new))
        head = model.head(params)

        def body(carry: tuple) -> tuple:
            i, last, done, cache, tokens, logprobs = carry
            logits = einsum("BTD,VD->BTV", last, head)[:, 0].astype(jnp.float32)
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
            token = jax.vmap(lambda key, row: draw(key, row, temperature, top_k, top_p))(step_keys, logits)
            logp = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
            at = Tokens((lengths + i)[:, None], jnp.ones((batch, 1), jnp.int32))
            hidden, cache = model.hidden(params, token[:, None], at, cache)
            done = done | jnp.any(token[:, None] == stops, axis=-1)
            return i + 1, hidden, done, cache, tokens.at[:, i].set(token), logprobs.at[:, i].set(logp)

        start = (
            jnp.zeros((), jnp.int32),
            hidden[:, -1:],
            jnp.zeros(batch, bool),
            cache,
            jnp.zeros((batch, new), jnp.int32),
            jnp.zeros((batch, new)),
        )
        carry = jax.lax.while_loop(lambda c: (c[0] < limit) & ~jnp.all(c[2]), body, start)
        return carry[4], carry[5]

    return jax.jit(run)


def draw(key: jax.Array, logits: jax.Array, temperature: float, top_k: int, top_p: float) -> jax.Array:
    """One token id from logits [V]: divided by the temperature, then cut to the top k, then to the nucleus
    (arXiv:1904.09751), as transformers orders its warpers."""
    if temperature == 0:
        return jnp.argmax(logits)
    logits = logits / temperature
    if top_k:
        logits = jnp.where(logits < jax.lax.top_k(logits, min(top_k, logits.size))[0][-1], -jnp.inf, logits)
    if top_p < 1:
        descending = jnp.sort(logits, descending=True)
        before = jnp.cumsum(jax.nn.softmax(descending)) - jax.nn.softmax(descending)
        least = jnp.min(jnp.where(before < top_p, descending, jnp.inf))
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits)
