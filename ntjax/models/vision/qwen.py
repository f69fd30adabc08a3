"""The tower that Qwen2.5-VL looks through (arXiv:2502.13923, 2.1): a vision transformer for pictures of any size.

Patches come in units of neighbours that become one feature, and know their place by rotations in two dimensions. In
most layers a patch sees those of its window alone.

Axes: B pictures, T patches, F features, D embed, H heads, h head_dim, M mlp, c channels, f frames, p and w a patch's
height and width, n the three of query, key and value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ntjax.models.vision.pictures import Units
from ntjax.models.vision.vit import Linear
from ntjax.ops.activations import ACTIVATIONS, known
from ntjax.ops.attention import Tokens, attention
from ntjax.ops.norms import rms_norm
from ntjax.ops.remat import rematerialised
from ntjax.ops.rope import rotate
from ntjax.params import weight
from ntjax.weights import einsum

PREFIX = "model.visual."
EPS = 1e-6  # of norms, in every config.json
USUAL = 1024  # features of a picture of 896 x 896 pixels
Rotation = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class TowerConfig:
    """The numbers of a tower; patches see the whole picture in the layers `full`, their window in the others."""

    embed: int
    mlp: int
    layers: int
    heads: int
    channels: int
    frames: int
    patch: int
    merge: int  # a feature is of `merge` x `merge` patches
    theta: float
    full: tuple[int, ...]
    activation: str
    dtype: str = "float32"
    remat: str | tuple[str, ...] = "none"

    @property
    def usual(self) -> Units:
        """Units of one picture of `USUAL` features."""
        count, pixels = USUAL * self.merge**2, self.channels * self.frames * self.patch**2
        shapes = {"patches": (pixels, jnp.float32), "at": (2, jnp.int32)}
        found = {name: jax.ShapeDtypeStruct((1, count, last), kind) for name, (last, kind) in shapes.items()}
        return {**found, "window": jax.ShapeDtypeStruct((1, count), jnp.int32)}

    @property
    def sizes(self) -> dict[str, int]:
        """Axis name -> size."""
        return {
            "layers": self.layers,
            "embed": self.embed,
            "mlp": self.mlp,
            "three": 3,
            "heads": self.heads,
            "head_dim": self.embed // self.heads,
            "channels": self.channels,
            "frames": self.frames,
            "patch_height": self.patch,
            "patch_width": self.patch,
        }


def tower_config(hf: Any) -> TowerConfig:
    """From a transformers `Qwen2_5_VLVisionConfig`. Raises ConfigError: an unknown activation."""
    return TowerConfig(
        embed=hf.hidden_size,
        mlp=hf.intermediate_size,
        layers=hf.depth,
        heads=hf.num_heads,
        channels=hf.in_channels,
        frames=hf.temporal_patch_size,
        patch=hf.patch_size,
        merge=hf.spatial_merge_size,
        theta=hf.rope_parameters["rope_theta"],
        full=tuple(hf.fullatt_block_indexes),
        activation=known(hf.hidden_act),
    )


class Block(nnx.Module):
    """Pre-norm attention among the patches of a segment, and a gated MLP."""

    def __init__(self, config: TowerConfig):
        sizes, name = config.sizes, PREFIX + "blocks.{layers}."
        self.activation = config.activation
        self.attn_norm = weight(sizes, "embed", name + "norm1.weight", init="ones")
        self.qkv = Linear(sizes, "embed -> three heads head_dim", name + "attn.qkv")
        self.out = Linear(sizes, "heads head_dim -> embed", name + "attn.proj")
        self.mlp_norm = weight(sizes, "embed", name + "norm2.weight", init="ones")
        self.gate = Linear(sizes, "embed -> mlp", name + "mlp.gate_proj")
        self.up = Linear(sizes, "embed -> mlp", name + "mlp.up_proj")
        self.down = Linear(sizes, "mlp -> embed", name + "mlp.down_proj")

    def __call__(self, x: jax.Array, rotation: Rotation, segments: jax.Array) -> jax.Array:
        normed = rms_norm(x, self.attn_norm.get_value(), EPS)
        q, k, v = jnp.unstack(self.qkv("BTD,nHhD->BTnHh", normed), axis=2)
        # Turned in fp32, as transformers does.
        q, k = (rotate(part.astype(jnp.float32), rotation).astype(x.dtype) for part in (q, k))
        # At one position all of a segment see one another.
        at = Tokens(jnp.zeros_like(segments), segments)
        x = x + self.out("BTHh,DHh->BTD", attention(q, k, v, at, at, kernel="blocked"))
        normed = rms_norm(x, self.mlp_norm.get_value(), EPS)
        gate = ACTIVATIONS[self.activation](self.gate("BTD,MD->BTM", normed))
        return x + self.down("BTM,DM->BTD", gate * self.up("BTD,MD->BTM", normed))


class Tower(nnx.Module):
    """patches [B, T, c f p w] -> hidden states [B, T, D].

    `at` [B, T, 2] int32: each patch's row and column. `window` [B, T] int32: its window, counted from 1; 0 is padding.
    """

    def __init__(self, config: TowerConfig):
        self.config = config
        axes = "channels frames patch_height patch_width -> embed"
        self.patch = weight(config.sizes, axes, PREFIX + "patch_embed.proj.weight", kernel=True)
        self.blocks = Block(config)

    def __call__(self, patches: jax.Array, at: jax.Array, window: jax.Array) -> jax.Array:
        config = self.config
        shape = config.channels, config.frames, config.patch, config.patch
        pixels = patches.astype(config.dtype).reshape(*window.shape, *shape)
        x = einsum("BTcfpw,Dcfpw->BTD", pixels, self.patch.get_value())
        rotation = rotations(at, config.embed // config.heads, config.theta)
        graph, layers = nnx.split(self.blocks)

        def layer(x: jax.Array, given: tuple[Any, jax.Array]) -> tuple[jax.Array, None]:
            weights, full = given
            segments = jnp.where(full, jnp.minimum(window, 1), window)
            return nnx.merge(graph, weights)(x, rotation, segments), None

        full = jnp.array([number in config.full for number in range(config.layers)])
        x, _ = jax.lax.scan(rematerialised(layer, config.remat), x, (layers, full))
        return x


class Merger(nnx.Module):
    """Hidden states [B, T, D] -> features [B, F, `embed`]: each is an MLP's of a unit of neighbouring patches."""

    def __init__(self, config: TowerConfig, embed: int):
        name, merged = PREFIX + "merger.", config.embed * config.merge**2
        self.merged = merged
        self.norm = weight({"embed": config.embed}, "embed", name + "ln_q.weight", init="ones")
        self.up = Linear({"embed": merged, "mlp": merged}, "embed -> mlp", name + "mlp.0")
        self.down = Linear({"mlp": merged, "embed": embed}, "mlp -> embed", name + "mlp.2")

    def __call__(self, x: jax.Array) -> jax.Array:
        x = rms_norm(x, self.norm.get_value(), EPS).reshape(len(x), -1, self.merged)
        return self.down("BFM,DM->BFD", ACTIVATIONS["gelu"](self.up("BFD,MD->BFM", x)))


def rotations(at: jax.Array, head_dim: int, theta: float) -> Rotation:
    """cos and sin, [B, T, head_dim / 2] fp32 each: half of the frequencies turn with the row, half with the column."""
    half = head_dim // 2
    frequencies = 1.0 / np.float32(theta) ** (np.arange(0, half, 2, dtype=np.float32) / np.float32(half))
    angles = (at.astype(jnp.float32)[..., None] * frequencies).reshape(*at.shape[:-1], -1)
    return jnp.cos(angles), jnp.sin(angles)
