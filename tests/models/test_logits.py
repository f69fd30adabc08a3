"""Logits of every variant equal transformers' in fp32, to 1e-4, at every real token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ntjax.errors import ConfigError
from ntjax.models import build, families
from ntjax.ops.logprobs import token_logprobs
from tests.torch_reference import TINY, logits, pair, random_ids, stacked, tokens, torch_model

TOLERANCE = 1e-4
THETA = {"rope_theta": 10000.0}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LLAMA3 |= {"original_max_position_embeddings": 16}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": LLAMA3,
    "yarn": YARN,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "grouped-query": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "head_dim of its own": {"head_dim": 12},
    "eps": {"rms_norm_eps": 0.1},
    "gelu": {"hidden_act": "gelu"},
    "gelu_pytorch_tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "relu": {"hidden_act": "relu"},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear": {"rope_parameters": {**THETA, "rope_type": "linear", "factor": 4.0}},
    "dynamic, within": {"rope_parameters": {**THETA, "rope_type": "dynamic", "factor": 2.0}},
    "dynamic, beyond": {
        "rope_parameters": {**THETA, "rope_type": "dynamic", "factor": 2.0},
        "max_position_embeddings": 16,
    },
    "llama3": {"rope_parameters": {**THETA, **LLAMA3}},
    "yarn": {"rope_parameters": {**THETA, **YARN}},
    "yarn, attention_factor": {"rope_parameters": {**THETA, **YARN, "attention_factor": 1.7}},
    "yarn, mscale": {"rope_parameters": {**THETA, **YARN, "mscale": 0.7, "mscale_all_dim": 1.3}},
    "yarn, betas": {
        "rope_parameters": {**THETA, **YARN, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False}
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral, window": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2, window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 0,
    },
    "qwen2, a window for no layer": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 28,
    },
}


def worst(theirs: Any, ours: Any, params: Any, ids: np.ndarray, mask: np.ndarray) -> float:
    """The largest difference of logits over the real tokens."""
    with torch.no_grad():
        reference = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
    real = mask.astype(bool)
    assert np.abs(reference[real]).max() > 1
    return np.abs(np.asarray(logits(ours, params, ids, tokens(mask)))[real] - reference[real]).max()


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_transformers(name: str) -> None:
    theirs, ours, params = pair({**TINY, **VARIANTS[name]})
    assert worst(theirs, ours, params, random_ids(1, 24), np.ones((1, 24), np.int32)) <= TOLERANCE


@pytest.mark.parametrize("variant", ["grouped-query", "mistral, window"])
def test_padding_on_either_side_changes_nothing(variant: str) -> None:
    theirs, ours, params = pair({**TINY, **VARIANTS[variant]})
    ids = random_ids(3, 24)
    right = (np.arange(24) < np.array([[24], [9], [1]])).astype(np.int32)
    assert worst(theirs, ours, params, ids, right) <= TOLERANCE
    assert worst(theirs, ours, params, ids, right[:, ::-1].copy()) <= TOLERANCE


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "yarn"])
def test_old_config_files_mean_the_same(kind: str, key: str) -> None:
    scaling = {key: value for key, value in SCALINGS[kind].items() if key != "rope_type"}
    new = {**TINY, "rope_parameters": {"rope_type": kind, "rope_theta": 700.0, **scaling}}
    old = {**TINY, "rope_theta": 700.0, "rope_scaling": {key: kind, **scaling}}
    assert build(old).config == build(new).config


def test_an_old_config_file_without_scaling_keeps_its_theta() -> None:
    old = {**TINY, "rope_theta": 700.0, "rope_scaling": None}
    theirs = torch_model({**TINY, "rope_parameters": {"rope_type": "default", "rope_theta": 700.0}})
    ours = build(old)
    params = stacked(theirs.state_dict(), ours.specs)
    assert worst(theirs, ours, params, random_ids(1, 24), np.ones((1, 24), np.int32)) <= TOLERANCE


def mean_nll(model: Any, params: Any, ids: jax.Array, mask: np.ndarray) -> jax.Array:
    """Mean negative log-likelihood of all tokens but the first."""
    hidden = model.hidden(params, ids, tokens(mask))
    return -token_logprobs(hidden[:, :-1], model.head(params), ids[:, 1:]).logp.mean()


@pytest.mark.parametrize(
    "variant",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True, "num_key_value_heads": 1},
    ],
    ids=["biases", "tied"],
)
def test_gradients_are_transformers(variant: dict[str, Any]) -> None:
    theirs, ours, params = pair({**TINY, **variant})
    ids = random_ids(2, 12)
    theirs(torch.tensor(ids), labels=torch.tensor(ids).long()).loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    reference = stacked(gradients, ours.specs)
    grads = jax.jit(jax.grad(lambda p: mean_nll(ours, p, jnp.asarray(ids), np.ones_like(ids))))(params)
    for path, grad in grads.items():
        np.testing.assert_allclose(
            grad, reference[path], atol=TOLERANCE * float(jnp.abs(reference[path]).max())
        )


def test_remat_computes_the_same_gradients_in_less_memory() -> None:
    deep = {**TINY, "num_hidden_layers": 8}
    _, kept, params = pair(deep)
    policies = "everything", "full", "minimal", "dots", "offload", ("attention_out", "mlp_out")
    ids, mask = jnp.asarray(random_ids(1, 32)), np.ones((1, 32), np.int32)

    def compiled(model: Any) -> Any:
        return jax.jit(jax.grad(lambda p: mean_nll(model, p, ids, mask))).lower(params).compile()

    plain, memory = compiled(kept), {}
    memory["none"] = plain.memory_analysis().temp_size_in_bytes
    for policy in policies:
        program = compiled(build(deep, remat=policy))
        for a, b in zip(*(jax.tree.leaves(p(params)) for p in (plain, program)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
        memory[policy] = program.memory_analysis().temp_size_in_bytes
    assert memory["full"] < memory["everything"] / 2
    assert memory["full"] < memory["attention_out", "mlp_out"] < memory["minimal"]
    assert memory["minimal"] <= memory["none"] < 0.8 * memory["everything"]


def test_an_unknown_family_is_refused_by_name() -> None:
    assert families() == ["llama", "llava", "llava_next", "mistral", "qwen2", "qwen2_5_vl"]
    with pytest.raises(ConfigError, match="'gpt2' isn't there yet"):
        build({"model_type": "gpt2"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "mish"}, "hidden_act 'mish'"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        (
            {"rope_parameters": {**THETA, "rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
    ],
)
def test_what_cannot_be_run_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build({**TINY, **change})
