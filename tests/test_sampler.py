"""The sampler: transformers' own greedy text, the trainer's own log-probabilities, rows that mind their business."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ntjax import sampler
from ntjax.models import Model
from ntjax.params import Params
from ntjax.sampler import Completion, Sampling, draw, generate
from tests.torch_reference import TINY, logits, pair, tokens

PROMPTS = [[5, 6, 7], [10, 11, 12, 13, 14, 15, 16], [20]]
GREEDY = Sampling(max_new_tokens=20, temperature=0.0)
DRAWN = Sampling(max_new_tokens=20, temperature=0.7, top_k=5, top_p=0.9)
NO_STOP: Sequence[int] = ()


@cache
def tiny() -> tuple[Any, Model, Params]:
    return pair({**TINY, "eos_token_id": None})


@cache
def greedy() -> list[Completion]:
    _, model, params = tiny()
    return generate(model, params, PROMPTS, GREEDY, stop_ids=NO_STOP)


def test_greedy_is_transformers_greedy() -> None:
    theirs, _, _ = tiny()
    for prompt, completion in zip(PROMPTS, greedy(), strict=True):
        ids = torch.tensor([prompt])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
        assert completion.tokens == out[0, len(prompt) :].tolist()
        assert completion.finished == "length"
        assert len(set(completion.tokens)) > 5


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_reported_logprobs_are_those_of_a_full_forward_pass(sampling: Sampling) -> None:
    # Of the whole distribution at temperature 1, whatever was drawn from.
    _, model, params = tiny()
    completions = generate(model, params, PROMPTS, sampling, stop_ids=NO_STOP)
    ids = np.zeros((len(PROMPTS), 32), np.int32)
    mask = np.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
        text = prompt + completion.tokens
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    logp = jax.nn.log_softmax(logits(model, params, ids, tokens(mask)))
    for row, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
        at = np.arange(len(completion.tokens)) + len(prompt) - 1
        expected = logp[row, at, np.array(completion.tokens)]
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=2e-5)


def test_a_row_does_not_see_its_neighbours() -> None:
    _, model, params = tiny()
    together = generate(model, params, PROMPTS, DRAWN, stop_ids=NO_STOP, seed=3)
    alone = generate(model, params, PROMPTS[:1], DRAWN, stop_ids=NO_STOP, seed=3)[0]
    others = generate(model, params, [PROMPTS[0], [30, 31], [40] * 9], DRAWN, stop_ids=NO_STOP, seed=3)
    assert together[0].tokens == alone.tokens == others[0].tokens
    np.testing.assert_allclose(together[0].logprobs, alone.logprobs, atol=2e-5)


def test_draws_follow_the_seed_and_the_row() -> None:
    _, model, params = tiny()
    same = [PROMPTS[0]] * 3
    first = generate(model, params, same, DRAWN, stop_ids=NO_STOP, seed=3)
    assert first == generate(model, params, same, DRAWN, stop_ids=NO_STOP, seed=3)
    assert first != generate(model, params, same, DRAWN, stop_ids=NO_STOP, seed=4)
    assert first[0].tokens != first[1].tokens


def test_a_stop_token_ends_its_row_and_is_kept() -> None:
    _, model, params = tiny()
    free = greedy()
    stop = free[0].tokens[4]
    stopped = generate(model, params, PROMPTS, GREEDY, stop_ids=[stop, 60])
    for completion, whole in zip(stopped, free, strict=True):
        ends = [i for i, token in enumerate(whole.tokens) if token in (stop, 60)]
        kept = ends[0] + 1 if ends else 20
        assert completion.tokens == whole.tokens[:kept]
        assert completion.finished == ("stop" if ends else "length")
        assert len(completion.logprobs) == kept
    assert len(stopped[0].tokens) <= 5
    assert {completion.finished for completion in stopped} == {"stop", "length"}


@pytest.mark.parametrize("limit", [1, 7])
def test_no_more_tokens_than_asked_for(limit: int) -> None:
    _, model, params = tiny()
    completions = generate(model, params, PROMPTS, Sampling(limit, 0.0), stop_ids=NO_STOP)
    assert [c.tokens for c in completions] == [c.tokens[:limit] for c in greedy()]
    assert [len(c.logprobs) for c in completions] == [limit] * 3


def test_programs_are_counted_by_buckets_not_by_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, params = tiny()
    traced = Counter[str]()

    def counted(*args: Any) -> jax.Array:
        traced["draw"] += 1
        return draw(*args)

    monkeypatch.setattr(sampler, "draw", counted)

    def compiled(prompt: int, new: int, stops: Sequence[int] = (60,)) -> int:
        before = traced["draw"]
        generate(model, params, [[5] * prompt], Sampling(new, 0.99), stop_ids=stops, seed=new)
        return traced["draw"] - before

    first = compiled(1, 1)
    assert first >= 1
    assert [compiled(prompt, new) for prompt, new in [(2, 1), (64, 1), (1, 64), (17, 3)]] == [0, 0, 0, 0]
    assert compiled(3, 5, stops=(7,)) == 0
    assert compiled(65, 1) == first
    assert compiled(128, 2) == 0


def random_logits(size: int = 50) -> np.ndarray:
    return 3 * np.random.default_rng(0).standard_normal(size).astype(np.float32)


WARPERS = {
    "temperature": (0.7, 0, 1.0),
    "top_k": (1.0, 5, 1.0),
    "top_k of 1": (1.0, 1, 1.0),
    "top_k past the vocabulary": (1.0, 99, 1.0),
    "top_p": (1.0, 0, 0.8),
    "top_p of almost nothing": (1.0, 0, 1e-4),
    "top_p after temperature": (2.0, 0, 0.8),
    "top_p after top_k": (0.5, 7, 0.6),
}


@pytest.mark.parametrize("name", WARPERS)
def test_what_is_drawn_from_is_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    temperature, top_k, top_p = WARPERS[name]
    monkeypatch.setattr(jax.random, "categorical", lambda key, logits: logits)
    ours = np.asarray(draw(jax.random.key(0), jnp.asarray(random_logits()), temperature, top_k, top_p))
    warpers: list[Any] = [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    process: Any = LogitsProcessorList(warpers)
    theirs = process(None, torch.tensor(random_logits())[None])[0].numpy()
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_draws_have_the_frequencies_of_the_softmax() -> None:
    # Probabilities 1/2, 1/4, 1/8, 1/8 squared and normalised at temperature 1/2; 20,000 draws, four deviations.
    weights = np.array([1 / 2, 1 / 4, 1 / 8, 1 / 8])
    expected = weights**2 / (weights**2).sum()
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = jax.jit(jax.vmap(lambda key: draw(key, jnp.log(weights), 0.5, 0, 1.0)))(keys)
    shares = np.bincount(np.asarray(drawn), minlength=4) / 20_000
    assert np.all(np.abs(shares - expected) < 4 * np.sqrt(expected * (1 - expected) / 20_000))


def test_temperature_zero_takes_the_likeliest_whatever_the_key() -> None:
    row = jnp.asarray(random_logits())
    drawn = {int(draw(jax.random.key(seed), row, 0.0, 5, 0.5)) for seed in range(3)}
    assert drawn == {int(np.argmax(random_logits()))}
