"""Copies of weights for drawing: what they are, and where there is room for them."""

from __future__ import annotations

import logging
import weakref
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntjax import memory
from ntjax.data.prompts import Prompt
from ntjax.draw import Sampling
from ntjax.layout import RULES, Layout
from ntjax.mesh import make_mesh
from ntjax.models import Model
from ntjax.params import Params
from ntjax.policy import quantisable
from ntjax.quantised import FourBit, quantise_4bit
from ntjax.sampler import Completion, Sampler
from ntjax.slots import Programs, Shape, State, programs, state_of
from tests.torch_reference import TINY, pair

PROMPTS = [Prompt([5, 6, 7]), Prompt([10, 11, 12, 13, 14, 15, 16]), Prompt([20])]
FREE = Sampling(max_new_tokens=20, temperature=0.7)


@cache
def four_bit() -> tuple[Model, Params]:
    """A tiny model with every matrix that can be in 4 bits in them."""
    _, model, params = pair({**TINY, "eos_token_id": None})

    def stacked(w: Any) -> FourBit:
        layers = [quantise_4bit(np.asarray(one), "nf4", True, one.shape) for one in w]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *layers)

    chosen = quantisable(model.specs)
    return model, {path: stacked(w) if path in chosen else w for path, w in params.items()}


def drawn(weights: str) -> list[Completion]:
    model, params = four_bit()
    return Sampler(model, FREE, slots=4, weights=weights)(params, PROMPTS, seed=3)


def test_codes_are_dequantised_where_weights_are_copied() -> None:
    model, params = four_bit()
    own, layers = jax.eval_shape(model.copies, params)
    leaves = jax.tree.leaves(layers, is_leaf=lambda x: isinstance(x, FourBit))
    assert not own
    assert not any(isinstance(leaf, FourBit) for leaf in leaves)
    held, copied = drawn("held"), drawn("copied")
    assert [one.tokens for one in held] == [one.tokens for one in copied]
    for one, other in zip(held, copied, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-5)


def test_what_is_gathered_is_parted_no_more() -> None:
    model, params = four_bit()
    layout = Layout(make_mesh({"fsdp": 4, "tensor": 2}), zero=3, rules=(*RULES.items(), ("vocab", "none")))
    model = replace(model, layout=layout)
    for _ in range(2):
        found = model.gathered(layout.put(params, model.specs))
    places = jax.tree.leaves(layout.shardings(found, model.specs, parted=False))
    for array, place in zip(jax.tree.leaves(found), places, strict=True):
        assert array.sharding.is_equivalent_to(place, array.ndim)


def test_there_is_room_for_what_fits_in_nine_tenths_of_what_is_left() -> None:
    model, params = four_bit()
    state = state_of(model, FREE, Shape(1, 4, 1, 32, 32))
    copies = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(model.copies, params)))
    keys = [x for x in jax.tree.leaves(state) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    wanted = copies + sum(x.size * x.dtype.itemsize for x in keys)
    assert memory.for_copies(model, params, state, (wanted + 1e6) / 0.9 + 1, 1e6)
    assert not memory.for_copies(model, params, state, (wanted + 1e6) / 0.9 - 10, 1e6)


@pytest.mark.parametrize(("limit", "copied"), [(1e9, True), (1e5, False)])
def test_weights_are_drawn_from_as_they_are_held_where_there_is_no_room(
    limit: float, copied: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory, "now", lambda devices: (limit, 0))
    model, params = four_bit()
    sampler = Sampler(model, FREE, slots=4)
    with caplog.at_level(logging.INFO, "ntjax"):
        completions = sampler(params, PROMPTS, seed=3)
    assert ("no room for copies" in caplog.text) is not copied
    assert [one.tokens for one in completions] == [one.tokens for one in drawn("copied")]


def test_longer_prompts_are_asked_about_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def for_copies(model: Model, params: Params, state: State, *of: float) -> bool:
        asked.append(state.cache.prompts.positions.shape[-1])
        return True

    monkeypatch.setattr(memory, "now", lambda devices: (1e9, 0))
    monkeypatch.setattr(memory, "for_copies", for_copies)
    model, params = four_bit()
    sampler = Sampler(model, FREE, slots=4)
    for length in (3, 5, 40):
        sampler(params, [Prompt([7] * length)])
    assert asked == [32, 64]


def test_copies_are_gone_when_the_last_completions_are_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def watched(*of: Any) -> Programs:
        compiled = programs(*of)

        def copies(params: Params) -> Any:
            found = compiled.copies(params)
            made.extend(map(weakref.ref, jax.tree.leaves(found)))
            return found

        return compiled._replace(copies=copies)

    monkeypatch.setattr("ntjax.sampler.programs", watched)
    model, params = four_bit()
    drawing = Sampler(model, FREE, slots=4).groups(params, PROMPTS[:1], group=1, seed=3, first_row=0)
    next(drawing)
    assert made
    assert not any(copy() is not None for copy in made)


def test_the_fullest_device_says_what_is_there() -> None:
    class Device:
        def __init__(self, taken: int):
            self.taken = taken

        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 100, "bytes_in_use": self.taken}

    assert memory.now([Device(3), Device(30), Device(7)]) == (100, 30)  # type: ignore[list-item]
    assert memory.now(jax.devices()[:1]) is None
