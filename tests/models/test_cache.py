"""What a token sees does not depend on how it got there: packed or alone, at once or through a cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ntjax.models import Cache, Model
from ntjax.ops.attention import Kept, Tokens
from ntjax.params import Params
from tests.torch_reference import TINY, pair, random_ids, tokens

TOLERANCE = 1e-5
DYNAMIC = {
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0},
    "max_position_embeddings": 8,
}
WINDOW = {"model_type": "mistral", "sliding_window": 4}
LENGTHS = [7, 11, 3]  # of the documents of the packed row; 21 of 24 slots
TIME = 24


def packed_and_alone() -> tuple[np.ndarray, Tokens]:
    """Row 0 holds three documents one after the other; rows 1 to 3 hold each of them alone."""
    ids = np.zeros((4, TIME), np.int32)
    positions, segments = np.zeros_like(ids), np.zeros_like(ids)
    start = 0
    for i, length in enumerate(LENGTHS):
        document = random_ids(1, length, seed=i)[0]
        for row, at, segment in [(0, start, i + 1), (i + 1, 0, 1)]:
            ids[row, at : at + length] = document
            positions[row, at : at + length] = np.arange(length)
            segments[row, at : at + length] = segment
        start += length
    return ids, Tokens(jnp.asarray(positions), jnp.asarray(segments))


@pytest.mark.parametrize("variant", [{}, DYNAMIC, WINDOW], ids=["default", "dynamic rope", "window"])
def test_a_packed_row_is_its_documents_alone(variant: dict[str, Any]) -> None:
    _, model, params = pair({**TINY, **variant})
    ids, at = packed_and_alone()
    hidden = jax.jit(model.hidden)(params, jnp.asarray(ids), at)
    start = 0
    for row, length in enumerate(LENGTHS, start=1):
        alone = hidden[row, :length]
        np.testing.assert_allclose(hidden[0, start : start + length], alone, rtol=0, atol=TOLERANCE)
        start += length


def test_dynamic_rope_stretches_each_document_by_its_own_length() -> None:
    # transformers stretches a whole batch by its longest row, so the reference is one document a call.
    theirs, model, params = pair({**TINY, **DYNAMIC})
    ids, at = packed_and_alone()
    hidden = jax.jit(model.hidden)(params, jnp.asarray(ids), at)
    start = 0
    for row, length in enumerate(LENGTHS, start=1):
        with torch.no_grad():
            alone = theirs.model(torch.tensor(ids[row : row + 1, :length])).last_hidden_state[0].numpy()
        np.testing.assert_allclose(hidden[0, start : start + length], alone, rtol=0, atol=1e-4)
        start += length


def decoded(
    model: Model, params: Params, ids: np.ndarray, lengths: np.ndarray, group: int, columns: int
) -> np.ndarray:
    """Hidden states [B, new, D] of the ids after each prompt, through a cache; `group` neighbours share a prompt.

    Prompts are padded on the right, and rows go on for as many tokens as the longest prompt leaves.
    """
    prompts, rows, longest = len(ids) // group, len(ids), int(lengths.max())
    at = np.arange(longest)
    places = Tokens(
        jnp.asarray(np.broadcast_to(at, (prompts, longest))),
        jnp.asarray((at < lengths[::group, None]).astype(np.int32)),
    )
    _, kept = jax.jit(model.prefill)(params, jnp.asarray(ids[::group, :longest]), places)
    cache = model.cache(prompts, longest, rows, columns)
    layers = tuple(Kept(new, old.own) for new, old in zip(kept, cache.layers, strict=True))
    cache = Cache(layers, places, cache.own, jnp.int32(columns - 1), cache.shift)  # begins in the last column
    apart = model.layers(params)
    step: Any = jax.jit(model.decode)
    hidden = []
    for new in range(ids.shape[1] - longest):
        place = Tokens(jnp.asarray(lengths[:, None] + new), jnp.ones((rows, 1), jnp.int32))
        token = np.take_along_axis(ids, lengths[:, None] + new, axis=1)
        states, cache = step(params, apart, jnp.asarray(token), place, cache)
        hidden.append(np.asarray(states))
    return np.concatenate(hidden, axis=1)


@pytest.mark.parametrize("looped", [False, True], ids=["unrolled", "looped"])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("variant", [{}, WINDOW], ids=["default", "window"])
def test_a_cache_changes_nothing(variant: dict[str, Any], group: int, looped: bool) -> None:
    _, model, params = pair({**TINY, **variant})
    model = replace(model, looped=looped)
    ids = random_ids(6, 20)
    ids[:, :9] = np.repeat(ids[::group, :9], group, axis=0)  # rows of a group begin with the same prompt
    lengths = np.repeat(np.array([9, 4, 6, 9, 1, 2])[: 6 // group], group)
    whole = jax.jit(model.hidden)(params, jnp.asarray(ids), tokens(np.ones_like(ids)))
    hidden = decoded(model, params, ids, lengths, group, columns=11)
    after = lengths[:, None] + np.arange(11)
    wanted = np.take_along_axis(np.asarray(whole), after[..., None], axis=1)
    np.testing.assert_allclose(hidden, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("looped", "count", "lead"), [(False, 2, ()), (True, 1, (2,))])
def test_a_cache_is_of_layers_or_a_stack_in_the_dtype_of_the_activations(
    looped: bool, count: int, lead: tuple[int, ...]
) -> None:
    _, model, params = pair(TINY, dtype="bfloat16")
    model = replace(model, looped=looped)
    cache = model.cache(2, 16, 6, 4)
    assert {x.dtype for x in jax.tree.leaves(cache.layers)} == {jnp.dtype(jnp.bfloat16)}
    assert len(cache.layers) == len(model.layers(params)) == count
    assert cache.layers[0].prompt[0].shape == (*lead, 2, 2, 16, 8)  # prompts, key/value heads, time, head_dim
    assert cache.layers[0].own[0].shape == (*lead, 6, 2, 4, 8)
