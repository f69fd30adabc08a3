"""The towers that LLaVA looks through: CLIP's (arXiv:2103.00020) and SigLIP's (arXiv:2303.15343) vision transformers.

Both read pictures of one size. Features are the hidden states after one of the layers; weights behind it are read and
written with the model and otherwise left alone ("unused").

Axes: B pictures, T patches (and CLIP's class token), D embed, H heads, h head_dim, M mlp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ntjax.errors import ConfigError
from ntjax.ops.activations import ACTIVATIONS, known
from ntjax.ops.attention import Tokens, attention
from ntjax.ops.elementwise import shifted
from ntjax.ops.norms import layer_norm
from ntjax.ops.remat import rematerialised
from ntjax.params import weight
from ntjax.weights import dense, einsum

PREFIX = "model.vision_tower."


@dataclass(frozen=True)
class VitConfig:
    """The numbers of a tower; features come after `used` of its `layers`, with the class token if it is `whole`."""

    embed: int
    mlp: int
    layers: int
    used: int
    heads: int
    patch: int
    patches: int
    channels: int
    eps: float
    activation: str
    clip: bool
    whole: bool
    pooled: bool  # SigLIP's head is there
    dtype: str = "float32"
    remat: str | tuple[str, ...] = "none"

    @property
    def sizes(self) -> dict[str, int]:
        """Axis name -> size."""
        return {
            "layers": self.used,
            "embed": self.embed,
            "mlp": self.mlp,
            "heads": self.heads,
            "head_dim": self.embed // self.heads,
            "channels": self.channels,
            "patch_height": self.patch,
            "patch_width": self.patch,
            "positions": self.patches + self.clip,
            "all": 3 * self.embed,
            "one": 1,
            "single": 1,
        }


def vit_config(hf: Any, layer: int, strategy: str) -> VitConfig:
    """From a transformers `CLIPVisionConfig` or `SiglipVisionConfig`, for features after hidden state `layer`.

    Raises ConfigError: another tower, or one with an unknown activation.
    """
    clip = hf.model_type == "clip_vision_model"
    if not clip and hf.model_type != "siglip_vision_model":
        raise ConfigError(
            f"vision_config.model_type {hf.model_type!r} isn't there yet",
            fix="use a model whose tower is clip_vision_model or siglip_vision_model",
        )
    layers = hf.num_hidden_layers
    return VitConfig(
        embed=hf.hidden_size,
        mlp=hf.intermediate_size,
        layers=layers,
        used=layer if layer >= 0 else layers + 1 + layer,
        heads=hf.num_attention_heads,
        patch=hf.patch_size,
        patches=(hf.image_size // hf.patch_size) ** 2,
        channels=hf.num_channels,
        eps=hf.layer_norm_eps,
        activation=known(hf.hidden_act),
        clip=clip,
        whole=strategy == "full",
        pooled=not clip and getattr(hf, "vision_use_head", True),
    )


class Norm(nnx.Module):
    """Layer normalisation with a scale and a bias."""

    def __init__(self, sizes: dict[str, int], name: str, eps: float):
        self.eps = eps
        self.scale = weight(sizes, "embed", name + ".weight", init="ones")
        self.bias = weight(sizes, "embed", name + ".bias", init="zeros")

    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x, self.scale.get_value(), self.bias.get_value(), self.eps)


class Linear(nnx.Module):
    """A linear map with a bias: `equation` is that of `weights.einsum`."""

    def __init__(self, sizes: dict[str, int], axes: str, name: str, bias: bool = True):
        outputs = axes.partition("->")[2]
        self.kernel = weight(sizes, axes, name + ".weight")
        self.bias = weight(sizes, f"->{outputs}", name + ".bias", init="zeros") if bias else None

    def __call__(self, equation: str, x: jax.Array) -> jax.Array:
        y = einsum(equation, x, self.kernel.get_value())
        return y if self.bias is None else shifted(y, self.bias.get_value())


class Block(nnx.Module):
    """Pre-norm attention of every patch to every other, and an MLP."""

    def __init__(self, config: VitConfig, name: str):
        sizes = config.sizes
        self.activation = config.activation
        self.attn_norm = Norm(sizes, name + "layer_norm1", config.eps)
        self.q = Linear(sizes, "embed -> heads head_dim", name + "self_attn.q_proj")
        self.k = Linear(sizes, "embed -> heads head_dim", name + "self_attn.k_proj")
        self.v = Linear(sizes, "embed -> heads head_dim", name + "self_attn.v_proj")
        self.out = Linear(sizes, "heads head_dim -> embed", name + "self_attn.out_proj")
        self.mlp_norm = Norm(sizes, name + "layer_norm2", config.eps)
        self.up = Linear(sizes, "embed -> mlp", name + "mlp.fc1")
        self.down = Linear(sizes, "mlp -> embed", name + "mlp.fc2")

    def __call__(self, x: jax.Array) -> jax.Array:
        normed, everywhere = self.attn_norm(x), same_place(x)
        q, k, v = (part("BTD,HhD->BTHh", normed) for part in (self.q, self.k, self.v))
        x = x + self.out("BTHh,DHh->BTD", attention(q, k, v, everywhere, everywhere, kernel="blocked"))
        hidden = ACTIVATIONS[self.activation](self.up("BTD,MD->BTM", self.mlp_norm(x)))
        return x + self.down("BTM,DM->BTD", hidden)


class Pooling(nnx.Module):
    """SigLIP's head, which no feature passes."""

    def __init__(self, config: VitConfig):
        sizes, name = config.sizes, PREFIX + "head."
        self.probe = weight(sizes, "one single embed", name + "probe")
        self.attention = weight(sizes, "embed -> all", name + "attention.in_proj_weight")
        self.attention_bias = weight(sizes, "-> all", name + "attention.in_proj_bias", init="zeros")
        self.out = Linear(sizes, "heads head_dim -> embed", name + "attention.out_proj")
        self.norm = Norm(sizes, name + "layernorm", config.eps)
        self.up = Linear(sizes, "embed -> mlp", name + "mlp.fc1")
        self.down = Linear(sizes, "mlp -> embed", name + "mlp.fc2")


class Unused(nnx.Module):
    """What stands behind the features."""

    def __init__(self, config: VitConfig):
        numbers = range(config.used, config.layers)
        self.blocks = nnx.Dict({f"{n}": Block(config, f"{PREFIX}encoder.layers.{n}.") for n in numbers})
        self.norm = Norm(config.sizes, PREFIX + "post_layernorm", config.eps)
        if config.pooled:
            self.head = Pooling(config)


class Vit(nnx.Module):
    """pixels [B, channels, height, width] -> features [B, T, D]."""

    def __init__(self, config: VitConfig):
        sizes, name = config.sizes, PREFIX + "embeddings."
        self.config = config
        axes = "channels patch_height patch_width -> embed"
        self.patch = weight(sizes, axes, name + "patch_embedding.weight", kernel=True)
        if config.clip:
            self.cls = weight(sizes, "embed", name + "class_embedding")
            self.norm = Norm(sizes, PREFIX + "pre_layrnorm", config.eps)
        else:
            self.patch_bias = weight(sizes, "-> embed", name + "patch_embedding.bias", init="zeros")
        self.positions = weight(sizes, "positions embed", name + "position_embedding.weight")
        self.blocks = Block(config, PREFIX + "encoder.layers.{layers}.")
        self.unused = Unused(config)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        config = self.config
        x = einsum(
            "BTchw,Dchw->BTD", patches(pixels.astype(config.dtype), config.patch), self.patch.get_value()
        )
        positions = dense(self.positions.get_value(), x.dtype)
        if config.clip:
            # Rounded after it is spread over images: its gradient is summed in its own dtype.
            cls = jnp.broadcast_to(self.cls.get_value(), (len(x), 1, config.embed)).astype(x.dtype)
            x = self.norm(shifted(jnp.concatenate([cls, x], axis=1), positions))
        else:
            x = shifted(shifted(x, self.patch_bias.get_value()), positions)
        graph, layers = nnx.split(self.blocks)

        def layer(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
            return nnx.merge(graph, weights)(x), None

        x, _ = jax.lax.scan(rematerialised(layer, config.remat), x, layers)
        return x if config.whole or not config.clip else x[:, 1:]


def patches(pixels: jax.Array, size: int) -> jax.Array:
    """[B, c, height, width] -> [B, T, c, size, size], row after row."""
    batch, channels, height, width = pixels.shape
    tiles = pixels.reshape(batch, channels, height // size, size, width // size, size)
    return tiles.transpose(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels, size, size)


def same_place(x: jax.Array) -> Tokens:
    """Places by which all tokens of x [B, T, D] see one another."""
    at = jnp.zeros(x.shape[:2], jnp.int32)
    return Tokens(at, at)
