"""Models. The folder is the registry: a config.json with `model_type` "x" is built by `ntjax/models/x.py`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax

from ntjax.errors import ConfigError
from ntjax.layout import Layout
from ntjax.models.decoder import Cache, Decoder, DecoderConfig
from ntjax.models.model import Model
from ntjax.ops.attention import chosen

__all__ = [
    "Cache",
    "Decoder",
    "DecoderConfig",
    "Model",
    "build",
    "families",
    "is_scoring",
    "scoring_config",
    "sees",
]

LANGUAGE, SCORING = "ForCausalLM", "ForSequenceClassification"


def families() -> list[str]:
    """The `model_type`s that can be built."""
    modules = (module for module in pkgutil.iter_modules(__path__) if not module.ispkg)
    return sorted(module.name for module in modules if module.name not in ("decoder", "model"))


def build(
    hf: dict[str, Any],
    *,
    dtype: str = "float32",
    remat: str | tuple[str, ...] = "none",
    labels: int = 0,
    attention: str = "xla",
    layout: Layout | None = None,
) -> Model:
    """The model that a config.json describes, computing in `dtype`.

    `remat` says what blocks keep for the backward pass (`ops.remat`). With `labels`, it has a head of so many
    scores, as transformers' sequence classifiers, instead of the language model's. `layout` is that of its weights;
    `attention` is what `ops.attention.chosen` knows, on its devices or else on those that JAX takes first.
    """
    from transformers import AutoConfig

    name = hf.get("model_type")
    if name not in families():
        raise ConfigError(
            f"model_type {name!r} isn't there yet", fix=f"use a model of the families {families()}"
        )
    family = importlib.import_module(f"ntjax.models.{name}")
    full = AutoConfig.for_model(**hf)
    parts = full, getattr(full, "text_config", None), getattr(full, "vision_config", None)
    if rate := max(getattr(part, "attention_dropout", 0.0) for part in parts):
        raise ConfigError(f"attention_dropout = {rate} isn't there", fix="set it to 0 in config.json")
    kernel = chosen(attention, layout.platform if layout else jax.default_backend())
    config = replace(family.config_from_hf(full), dtype=dtype, remat=remat, labels=labels, attention=kernel)
    return Model.of(family.decoder(config), hf, layout)


def sees(hf: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a vision-language model."""
    return "vision_config" in hf


def is_scoring(hf: dict[str, Any]) -> bool:
    """Whether a config.json is that of a model with a head of scores."""
    return any(str(name).endswith(SCORING) for name in hf.get("architectures") or ())


def scoring_config(hf: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the same model with one score a sequence, as AutoModelForSequenceClassification reads it."""
    names = [str(name).replace(LANGUAGE, SCORING) for name in hf.get("architectures") or ()]
    return {**hf, "architectures": names, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
