"""Qwen2 and Qwen2.5: Llama with biases on q, k and v (arXiv:2407.10671)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ntjax.errors import ConfigError
from ntjax.models import llama
from ntjax.models.decoder import DecoderConfig

decoder = llama.decoder


def config_from_hf(hf: Any) -> DecoderConfig:
    """From a transformers `Qwen2Config`."""
    if len(set(hf.layer_types)) > 1:
        raise ConfigError(
            "config.json mixes windowed and full attention layers", fix="set use_sliding_window to false"
        )
    hf.head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    hf.attention_bias = hf.mlp_bias = False
    window = hf.sliding_window if "sliding_attention" in hf.layer_types else None
    return replace(llama.config_from_hf(hf), qkv_bias=True, window=window)
