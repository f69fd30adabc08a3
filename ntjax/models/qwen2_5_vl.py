"""Qwen2.5-VL (arXiv:2502.13923) on pictures: Qwen2, whose rotations know a token's time, row and column (M-RoPE).

Axes: B rows, T time, G groups, N pictures of a group, P patches of a picture, D embed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
from flax import nnx

from ntjax.errors import ConfigError
from ntjax.models import llama, qwen2
from ntjax.models.decoder import Decoder, DecoderConfig
from ntjax.models.vision.pictures import Pictures
from ntjax.models.vision.qwen import Merger, Tower, TowerConfig, tower_config
from ntjax.ops.rope import Rope

SECTIONS = (16, 24, 24)  # where config.json names none, as transformers


class Qwen25VL(Decoder):
    """tokens and patches -> hidden states.

    Units: "patches" [G, N, P, channels * frames * height * width], "at" [G, N, P, 2] and "window" [G, N, P] int32, see
    `Tower`; patches of one feature are neighbours.
    """

    def __init__(self, config: DecoderConfig, block: nnx.Module):
        super().__init__(config, block)
        assert isinstance(config.vision, TowerConfig)
        self.vision_tower = Tower(replace(config.vision, dtype=config.dtype, remat=config.remat))
        self.projector = Merger(config.vision, config.embed)

    def embedded(self, ids: jax.Array, pictures: Pictures | None) -> jax.Array:
        words = super().embedded(ids, pictures)
        if pictures is None:
            return words
        units = [pictures.units[name] for name in ("patches", "at", "window")]
        features = self.projector(self.vision_tower(*(x.reshape(-1, *x.shape[2:]) for x in units)))
        return pictures.shown(words, features.reshape(*units[0].shape[:2], *features.shape[1:]))


def config_from_hf(hf: Any) -> DecoderConfig:
    """From a transformers `Qwen2_5_VLConfig`.

    Raises ConfigError: features or sections of rotations that don't fit, or what its parts raise.
    """
    text, vision = hf.text_config, hf.vision_config
    if vision.out_hidden_size != text.hidden_size:
        raise ConfigError(
            f"vision_config.out_hidden_size = {vision.out_hidden_size}, but words have {text.hidden_size}",
            fix="set it to the language model's hidden_size",
        )
    text.tie_word_embeddings = hf.tie_word_embeddings
    language = qwen2.config_from_hf(text)
    sections = tuple(text.rope_parameters.get("mrope_section", SECTIONS))
    return replace(
        language,
        prefix="model.language_model.",
        rope=sectioned(language.rope, sections),
        vision=tower_config(vision),
    )


def sectioned(rope: Rope, sections: tuple[int, ...]) -> Rope:
    """The rotations with so many frequencies for time, row and column; raises ConfigError unless those are all."""
    count = len(rope.frequencies)
    if len(sections) != 3 or sum(sections) != count:
        raise ConfigError(
            f"mrope_section = {list(sections)} isn't of time, row and column with {count} frequencies together",
            fix="let config.json name three numbers that add up to half of head_dim",
        )
    return replace(rope, sections=sections)


def decoder(config: DecoderConfig) -> Qwen25VL:
    """The module of this family."""
    return Qwen25VL(config, llama.Block(config))
