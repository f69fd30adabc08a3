"""Tiny transformers models with every weight random, and the same weights as ours.

transformers draws biases as zeros and norms as ones: a test on those would not see them left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ntjax.models import Model, build
from ntjax.ops.attention import Tokens
from ntjax.params import Params, Specs
from ntjax.weights import einsum

VOCAB = 61
TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def torch_model(hf: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """The transformers model of a config.json; matrices are N(0, 0.3), biases too, norms around 1."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf), attn_implementation="eager").eval()
    return randomised(model, 0.3, seed)


def randomised(model: Any, deviation: float, seed: int = 0) -> Any:
    """The model with every weight N(0, deviation), biases too, and norms' scales around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = deviation * torch.randn(parameter.shape, generator=generator)
            scales = ("norm" in name or "ln_q" in name) and name.endswith("weight")
            parameter.copy_(1 + noise if scales else noise)
    return model


def stacked(tensors: Mapping[str, torch.Tensor], specs: Specs) -> Params:
    """Tensors by their Hugging Face names (a state dict, gradients) as one of our trees."""
    params = {}
    for path, spec in specs.items():
        array = np.zeros(spec.shape, np.float32)
        for index, name in spec.tensors():
            array[index] = tensors[name].detach().numpy().reshape(array[index].shape)
        params[path] = jnp.asarray(array)
    return params


def pair(hf: dict[str, Any], **options: Any) -> tuple[PreTrainedModel, Model, Params]:
    """A transformers model, ours of the same config.json, and the weights of both."""
    theirs = torch_model(hf)
    ours = build(hf, **options)
    return theirs, ours, stacked(theirs.state_dict(), ours.specs)


def tokens(mask: np.ndarray) -> Tokens:
    """Positions and segments of rows padded anywhere: positions count the real tokens of mask [B, T]."""
    mask = np.asarray(mask)
    return Tokens(jnp.asarray(np.maximum(np.cumsum(mask, axis=1) - 1, 0)), jnp.asarray(mask))


def logits(model: Model, params: Params, ids: np.ndarray, at: Tokens) -> jax.Array:
    """Our logits [B, T, V]."""
    return _logits(model, params, jnp.asarray(ids), at)


def _forward(model: Model, params: Params, ids: jax.Array, at: Tokens) -> jax.Array:
    hidden = model.hidden(params, ids, at)
    return einsum("BTD,VD->BTV", hidden, model.head(params))


_logits = jax.jit(_forward, static_argnums=0)


def random_ids(batch: int, time: int, seed: int = 0) -> np.ndarray:
    """Token ids [B, T] that are not special."""
    return np.random.default_rng(seed).integers(3, VOCAB, (batch, time), dtype=np.int32)
