"""Frequencies at the sizes of real models, against transformers' own."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ntjax.ops.attention import Tokens
from ntjax.ops.rope import Rope, rope_from_hf, rotate, rotations

# rope_parameters, max_position_embeddings, head_dim: as in Llama 3.1 8B, Qwen2.5 7B with its long-context recipe, ...
REAL: dict[str, tuple[dict[str, Any], int, int]] = {
    "Llama 3.1": (
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        131072,
        128,
    ),
    "Qwen2.5": (
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
        32768,
        128,
    ),
    "a linear one": ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}, 4096, 64),
}


@pytest.mark.parametrize("name", REAL)
def test_frequencies_are_transformers(name: str) -> None:
    parameters, longest, head_dim = REAL[name]
    config = LlamaConfig(rope_parameters=dict(parameters), max_position_embeddings=longest, head_dim=head_dim)
    frequencies, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    rope = rope_from_hf(parameters, head_dim, longest)
    np.testing.assert_allclose(rope.frequencies, frequencies.numpy(), rtol=3e-7)
    assert rope.scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("length", [4095, 4096, 4097, 16384])
def test_dynamic_frequencies_are_transformers(length: int) -> None:
    parameters: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = LlamaConfig(rope_parameters=dict(parameters), max_position_embeddings=4096, head_dim=64)
    frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=torch.tensor(length))
    # The document's last token and its second: position 1 turns by the frequencies themselves.
    at = Tokens(jnp.asarray([[1, length - 1]]), jnp.ones((1, 2), jnp.int32))
    cos, sin = rotations(rope_from_hf(parameters, 64, 4096), at)
    np.testing.assert_allclose(jnp.arctan2(sin, cos)[0, 0], frequencies.numpy(), rtol=2e-6)


def test_yarn_without_a_factor_takes_the_ratio_of_lengths() -> None:
    parameters: dict[str, Any] = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 2048,
    }
    assert rope_from_hf(parameters, 64, 8192) == rope_from_hf({**parameters, "factor": 4.0}, 64, 8192)


def test_a_quarter_turn_by_hand() -> None:
    # One frequency, pi/2 a position: at position 1 the pair (a, b) becomes (-b, a); scale 2 doubles it.
    at = Tokens(jnp.asarray([[0, 1]]), jnp.ones((1, 2), jnp.int32))
    x = jnp.asarray([3.0, 5.0]).reshape(1, 1, 1, 2)
    y = rotate(jnp.concatenate([x, x], axis=1), rotations(Rope((float(np.pi / 2),), scale=2.0), at))
    np.testing.assert_allclose(y[0, :, 0], [[6, 10], [-10, 6]], atol=1e-6)
