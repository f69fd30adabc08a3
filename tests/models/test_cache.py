"""What a token sees does not depend on how it got there: packed or alone, at once or through a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ntjax.models import Cache, Model
from ntjax.ops.attention import Tokens
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


Step = Callable[[Params, jax.Array, Tokens, Cache], tuple[jax.Array, Cache]]


def cached(model: Model, params: Params, ids: np.ndarray, mask: np.ndarray, parts: list[int]) -> np.ndarray:
    """Hidden states [B, T, D] of ids run through one cache, `parts` tokens at a time."""
    step: Step = jax.jit(model.hidden)
    at = tokens(mask)
    cache = model.cache(len(ids), ids.shape[1] + 5)  # five slots are never written
    hidden = []
    for start, stop in zip(np.cumsum([0, *parts[:-1]]), np.cumsum(parts), strict=True):
        part = jax.tree.map(lambda x, s=slice(start, stop): x[:, s], at)
        states, cache = step(params, jnp.asarray(ids[:, start:stop]), part, cache)
        hidden.append(np.asarray(states))
    assert int(cache.filled) == ids.shape[1]
    return np.concatenate(hidden, axis=1)


@pytest.mark.parametrize(
    ("variant", "parts"),
    [({}, [6, *[1] * 8]), (WINDOW, [6, *[1] * 8]), ({}, [6, 7, 1])],
    ids=["token by token", "with a window", "in parts"],
)
def test_a_cache_changes_nothing(variant: dict[str, Any], parts: list[int]) -> None:
    _, model, params = pair({**TINY, **variant})
    ids = random_ids(3, 14)
    mask = (np.arange(14) >= np.array([[0], [2], [5]])).astype(np.int32)  # padded on the left
    whole = jax.jit(model.hidden)(params, jnp.asarray(ids), tokens(mask))
    real = mask.astype(bool)
    hidden = cached(model, params, ids, mask, parts)
    np.testing.assert_allclose(hidden[real], np.asarray(whole)[real], rtol=0, atol=TOLERANCE)


def test_a_cache_is_in_the_dtype_of_the_activations() -> None:
    _, model, _ = pair(TINY, dtype="bfloat16")
    cache = model.cache(2, 16)
    assert cache.k.dtype == cache.v.dtype == jnp.bfloat16
    assert cache.k.shape == (2, 2, 16, 2, 8)  # layers, rows, slots, key/value heads, head_dim
