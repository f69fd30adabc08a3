"""Rotary position embedding (arXiv:2104.09864) and the ways of stretching it past the pretrained length.

Rotation pairs are (i, i + head_dim / 2), as in Hugging Face checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ntjax.errors import ConfigError
from ntjax.ops.attention import Tokens

SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """How positions become angles; `frequencies` in radians a position, [head_dim / 2].

    `stretch` is the dynamic scaling's (base, factor, pretrained length), None for the others. `sections`: how many
    frequencies turn with a token's time, how many with its row and how many with its column (arXiv:2409.12191, 2.1).
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0  # of cos and sin (yarn's attention factor)
    stretch: tuple[float, float, int] | None = None
    sections: tuple[int, ...] = ()


def rope_from_hf(parameters: Mapping[str, float], head_dim: int, max_positions: int) -> Rope:
    """The `rope_parameters` of a transformers config, which names the scaling `rope_type`."""
    kind = parameters["rope_type"]
    if kind not in SCALINGS or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"rope_parameters {dict(parameters)} can't be run", fix=f"rope_type is one of {SCALINGS}"
        )
    base = parameters["rope_theta"]
    freq = 1.0 / np.float32(base) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    if kind == "linear":
        return Rope(_floats(freq / parameters["factor"]))
    if kind == "dynamic":
        return Rope(_floats(freq), stretch=(base, parameters["factor"], max_positions))
    if kind == "llama3":
        return Rope(_floats(_llama3(freq, parameters)))
    if kind == "yarn":
        return Rope(
            _floats(_yarn(freq, parameters, head_dim, max_positions)), _yarn_scale(parameters, max_positions)
        )
    return Rope(_floats(freq))


def rotations(rope: Rope, tokens: Tokens, places: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every token's angles, each [B, T, head_dim / 2] fp32.

    `places` [B, T, 3] are those of tokens in time, row and column, where these aren't all its position.
    """
    frequencies = jnp.asarray(rope.frequencies, jnp.float32)
    if rope.stretch is not None:
        frequencies = _dynamic(rope, _document_lengths(tokens))
    at = tokens.positions[..., None]
    if places is not None and rope.sections:
        at = jnp.repeat(places, np.array(rope.sections), axis=-1, total_repeat_length=len(rope.frequencies))
    angles = at.astype(jnp.float32) * frequencies
    return jnp.cos(angles) * rope.scale, jnp.sin(angles) * rope.scale


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """x [B, T, heads, head_dim] turned by the angles of its position, in the dtype of x (as transformers)."""
    cos, sin = (r[:, :, None].astype(x.dtype) for r in rotation)
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def _document_lengths(tokens: Tokens) -> jax.Array:
    """[B, T] int32: of each token, the length of the document it stands in (so far, in a cache)."""
    same = tokens.segments[:, :, None] == tokens.segments[:, None, :]
    return jnp.max(jnp.where(same, tokens.positions[:, None, :], 0), axis=-1) + 1


def _dynamic(rope: Rope, lengths: jax.Array) -> jax.Array:
    """NTK-aware scaling: the base grows with the document's length past the pretrained one.

    transformers takes the longest row of a batch; taking each document's own keeps rows independent.
    """
    assert rope.stretch is not None
    base, factor, pretrained = rope.stretch
    dim = 2 * len(rope.frequencies)
    longer = jnp.maximum(lengths, pretrained).astype(jnp.float32)
    bases = base * (factor * longer / pretrained - (factor - 1)) ** (dim / (dim - 2))
    return 1.0 / bases[..., None] ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


def _llama3(freq: np.ndarray, parameters: Mapping[str, float]) -> np.ndarray:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between blended."""
    pretrained, factor = parameters["original_max_position_embeddings"], parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    wavelengths = 2 * math.pi / freq
    blend = (pretrained / wavelengths - low) / (high - low)
    blended = (1 - blend) * freq / factor + blend * freq
    scaled = np.where(wavelengths > pretrained / low, freq / factor, blended)
    return np.where(wavelengths < pretrained / high, freq, scaled)


def _yarn(freq: np.ndarray, parameters: Mapping[str, float], head_dim: int, max_positions: int) -> np.ndarray:
    """YaRN (arXiv:2309.00071, section 3.2): interpolate the dimensions that turn less than beta_slow times."""
    pretrained, base = parameters["original_max_position_embeddings"], parameters["rope_theta"]

    def dimension(turns: float) -> float:
        return head_dim * math.log(pretrained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = dimension(parameters.get("beta_fast") or 32)
    high = dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    interpolated = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return freq / _yarn_factor(parameters, max_positions) * interpolated + freq * (1 - interpolated)


def _yarn_factor(parameters: Mapping[str, float], max_positions: int) -> float:
    return parameters.get("factor") or max_positions / parameters["original_max_position_embeddings"]


def _yarn_scale(parameters: Mapping[str, float], max_positions: int) -> float:
    if parameters.get("attention_factor") is not None:
        return parameters["attention_factor"]

    def mscale(weight: float) -> float:
        factor = _yarn_factor(parameters, max_positions)
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    weight, weight_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return mscale(weight) / mscale(weight_all) if weight and weight_all else mscale(1.0)


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(v) for v in values)
