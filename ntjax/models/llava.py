"""LLaVA-1.5 (arXiv:2310.03744): a vision tower, an MLP, and a language model that reads features as if they were words.

Axes: B rows, T time, G groups, N tiles of a group, F features of a tile, D embed, V the tower's embed.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ntjax.errors import ConfigError
from ntjax.models.decoder import Decoder, DecoderConfig
from ntjax.models.vision.pictures import Pictures, Units
from ntjax.models.vision.vit import Linear, Vit, VitConfig, vit_config
from ntjax.ops.activations import ACTIVATIONS, known
from ntjax.params import weight

NAME = "model.multi_modal_projector."


@dataclass(frozen=True)
class Vision:
    """What a LLaVA has beside a language model of the family `language`."""

    language: str
    tower: VitConfig
    activation: str
    bias: bool
    newline: bool = False  # LLaVA-NeXT's

    @property
    def usual(self) -> Units:
        """Units of one picture: the whole, and for LLaVA-NeXT four tiles as well."""
        side = self.tower.patch * math.isqrt(self.tower.patches)
        shape = 5 if self.newline else 1, self.tower.channels, side, side
        return {"pixels": jax.ShapeDtypeStruct(shape, jnp.float32)}


class Projector(nnx.Module):
    """Two linear maps from the tower's space to that of words."""

    def __init__(self, vision: Vision, embed: int):
        sizes = {"vision": vision.tower.embed, "mlp": embed, "embed": embed}
        self.activation = vision.activation
        self.up = Linear(sizes, "vision -> mlp", NAME + "linear_1", vision.bias)
        self.down = Linear(sizes, "mlp -> embed", NAME + "linear_2", vision.bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down("BTM,DM->BTD", ACTIVATIONS[self.activation](self.up("BTV,MV->BTM", x)))


class Llava(Decoder):
    """tokens and pixels -> hidden states."""

    def __init__(self, config: DecoderConfig, block: nnx.Module):
        super().__init__(config, block)
        vision = config.vision
        assert isinstance(vision, Vision)
        self.vision_tower = Vit(replace(vision.tower, dtype=config.dtype, remat=config.remat))
        self.projector = Projector(vision, config.embed)
        self.newline = weight(config.sizes, "embed", "model.image_newline") if vision.newline else None

    def embedded(self, ids: jax.Array, pictures: Pictures | None) -> jax.Array:
        words = super().embedded(ids, pictures)
        if pictures is None:
            return words
        pixels = pictures.units["pixels"]
        features = self.projector(self.vision_tower(pixels.reshape(-1, *pixels.shape[2:])))
        features = features.reshape(*pixels.shape[:2], *features.shape[1:])
        return pictures.shown(words, features, self.newline.get_value() if self.newline else None)


def config_from_hf(hf: Any) -> DecoderConfig:
    """From a transformers `LlavaConfig`.

    Raises ConfigError: features of several layers of the tower, or what its parts raise.
    """
    layer, text = hf.vision_feature_layer, hf.text_config
    if not isinstance(layer, int):
        raise ConfigError(
            f"vision_feature_layer = {layer}: features of several layers aren't there", fix="name one layer"
        )
    activation = known(hf.projector_hidden_act, "projector_hidden_act")
    tower = vit_config(hf.vision_config, layer, hf.vision_feature_select_strategy)
    vision = Vision(text.model_type, tower, activation, hf.multimodal_projector_bias)
    language = family(text.model_type).config_from_hf(text)
    return replace(language, prefix="model.language_model.", vision=vision, tied=hf.tie_word_embeddings)


def family(name: str) -> Any:
    """The language model's module."""
    from ntjax.models import families

    if name not in families():
        raise ConfigError(f"text_config.model_type {name!r} isn't there", fix=f"use one of {families()}")
    return importlib.import_module(f"ntjax.models.{name}")


def decoder(config: DecoderConfig) -> Llava:
    """The module of this family."""
    assert isinstance(config.vision, Vision)
    return Llava(config, family(config.vision.language).decoder(config).blocks)
