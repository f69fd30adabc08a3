"""LLaVA-NeXT (LLaVA 1.6): LLaVA on a small picture of the whole and on tiles of it at a higher resolution.

Which tiles, and where a line of patches ends, is known from a picture's size alone: the host says it in the index of
features (`Pictures.index`). The model's own is a learned end of a line.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ntjax.models import llava
from ntjax.models.decoder import DecoderConfig

decoder = llava.decoder


def config_from_hf(hf: Any) -> DecoderConfig:
    """From a transformers `LlavaNextConfig`."""
    config = llava.config_from_hf(hf)
    assert isinstance(config.vision, llava.Vision)
    return replace(config, vision=replace(config.vision, newline=True))
