"""Mistral: Llama with a sliding window over every layer (arXiv:2310.06825)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ntjax.models import llama
from ntjax.models.decoder import DecoderConfig

decoder = llama.decoder


def config_from_hf(hf: Any) -> DecoderConfig:
    """From a transformers `MistralConfig`."""
    hf.attention_bias = hf.mlp_bias = False
    return replace(llama.config_from_hf(hf), window=hf.sliding_window)
