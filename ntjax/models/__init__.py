"""Models. The folder is the registry: a config.json with `model_type` "x" is built by `ntjax/models/x.py`."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace
from typing import Any

from ntjax.errors import ConfigError
from ntjax.models.decoder import Cache, Decoder, DecoderConfig, Model

__all__ = ["Cache", "Decoder", "DecoderConfig", "Model", "build", "families"]


def families() -> list[str]:
    """The `model_type`s that can be built."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "decoder")


def build(hf: dict[str, Any], *, dtype: str = "float32", remat: bool = False) -> Model:
    """The model that a config.json describes, computing in `dtype`; with `remat`, the backward pass forms each
    block's activations again."""
    from transformers import AutoConfig

    name = hf.get("model_type")
    if name not in families():
        raise ConfigError(
            f"model_type {name!r} isn't there yet", fix=f"use a model of the families {families()}"
        )
    family = importlib.import_module(f"ntjax.models.{name}")
    full = AutoConfig.for_model(**hf)
    if getattr(full, "attention_dropout", 0.0):
        raise ConfigError(
            f"attention_dropout = {full.attention_dropout} isn't there", fix="set it to 0 in config.json"
        )
    config = replace(family.config_from_hf(full), dtype=dtype, remat=remat)
    return Model.of(family.decoder(config), hf)
