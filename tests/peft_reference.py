"""PEFT around tiny transformers models, with random adapters, and the same settings as ours."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from transformers import PreTrainedModel

from ntjax.config import LoraConfig
from tests.torch_reference import TINY, VOCAB

QWEN2 = {**TINY, "model_type": "qwen2"}  # the family with biases on some of its linear layers
# transformers 5.23 warns of its own name for what PEFT 0.21 asks it, PEFT of what it does with heads.
WARNINGS = ("ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:Setting `save_embedding_layers`")


def config(**settings: Any) -> LoraConfig:
    """Settings in PEFT's words as ours."""
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    return LoraConfig(**given)


def adapted(base: PreTrainedModel, seed: int = 1, **settings: Any) -> Any:
    """`base` (which stays as it is) with an adapter; all that is trained is random."""
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = 0.3 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + noise if "norm" in name or "magnitude" in name else noise)
    return model


def load(base: PreTrainedModel, folder: Path) -> Any:
    """`base` (which stays as it is) with the adapter in a folder."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """[B, T, V] of rows without padding."""
    assert ids.max() < VOCAB
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    """What PEFT trains, by the names in its files without "base_model.model."."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = re.sub(r"(vector)\.default\.weight$|\.default(?=\.)|\.modules_to_save", r"\1", name)
            found[name.removeprefix("base_model.model.")] = parameter
    return found
