"""LLaVA's features and gradients are transformers', whatever the tower and the layer they are taken from."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from ntjax.errors import ConfigError
from ntjax.layout import Layout
from ntjax.mesh import make_mesh
from ntjax.models import Model, build
from ntjax.models.vision.pictures import Pictures
from ntjax.ops.attention import Tokens
from ntjax.ops.logprobs import token_logprobs
from ntjax.params import Params
from tests.torch_reference import TINY, randomised, stacked

TOLERANCE = 1e-4
IMAGE = 60
CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}
HF: dict[str, Any] = {"model_type": "llava", "image_token_index": IMAGE, "text_config": TINY}
VARIANTS: dict[str, dict[str, Any]] = {
    "clip, before the last layer": {"vision_config": CLIP},
    "clip, last layer": {"vision_config": CLIP, "vision_feature_layer": -1},
    "clip, first layer": {"vision_config": CLIP, "vision_feature_layer": 1},
    "clip, with the class token": {"vision_config": CLIP, "vision_feature_select_strategy": "full"},
    "clip, gelu": {"vision_config": {**CLIP, "hidden_act": "gelu"}},
    "siglip": {"vision_config": SIGLIP, "vision_feature_select_strategy": "full"},
    "siglip, last layer": {
        "vision_config": SIGLIP,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
    "siglip without a head": {
        "vision_config": {**SIGLIP, "vision_use_head": False},
        "vision_feature_select_strategy": "full",
    },
    "no biases between": {"vision_config": CLIP, "multimodal_projector_bias": False},
    "mistral": {
        "vision_config": CLIP,
        "text_config": {**TINY, "model_type": "mistral", "sliding_window": 30},
    },
    "qwen2": {"vision_config": CLIP, "text_config": {**TINY, "model_type": "qwen2"}},
    "tied": {
        "vision_config": CLIP,
        "tie_word_embeddings": True,
        "text_config": {**TINY, "tie_word_embeddings": True},
    },
}


def pair(changed: dict[str, Any]) -> tuple[Any, Model, Params]:
    """A transformers model with every weight random, and ours with the same."""
    hf = {**HF, **changed}
    theirs = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(**hf), attn_implementation="eager"
    ).eval()
    randomised(theirs, 0.2)
    ours = build(hf)
    return theirs, ours, stacked(theirs.state_dict(), ours.specs)


def rows(features: int) -> tuple[np.ndarray, np.ndarray]:
    """ids [3, T] and index [3, T] of two pictures in a row, none, and one."""
    picture = [IMAGE] * features
    said = [[5, 6, *picture, 7, *picture, 8, 9], [3, 4, 5], [*picture, 9, 8]]
    ids = np.zeros((3, max(map(len, said))), np.int32)
    for row, words in enumerate(said):
        ids[row, : len(words)] = words
    seen = ids == IMAGE
    return ids, np.where(seen, np.cumsum(seen).reshape(ids.shape) - 1, -1)


def pixels() -> np.ndarray:
    """Three pictures."""
    return np.random.default_rng(1).normal(size=(3, 3, 12, 12)).astype(np.float32)


def ours_of(model: Model, params: Params, ids: np.ndarray, index: np.ndarray, pool: np.ndarray) -> jax.Array:
    """Log-probs of each next token [B, T]."""
    time = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    shown = Pictures(jnp.asarray(index), {"pixels": jnp.asarray(pool)})
    hidden = model.hidden(
        params, jnp.asarray(ids), Tokens(time, jnp.asarray((ids > 0).astype(np.int32))), shown
    )
    return token_logprobs(hidden, model.head(params), jnp.roll(jnp.asarray(ids), -1, axis=1)).logp


def theirs_of(model: Any, ids: np.ndarray) -> torch.Tensor:
    """The same of transformers'."""
    words = torch.tensor(ids, dtype=torch.long)
    logits = model(input_ids=words, attention_mask=words > 0, pixel_values=torch.tensor(pixels())).logits
    logps = logits.log_softmax(dim=-1)
    return logps.gather(-1, words.roll(-1, dims=1)[..., None])[..., 0]


@pytest.mark.parametrize("name", VARIANTS)
def test_log_probs_and_gradients_are_transformers(name: str) -> None:
    theirs, ours, params = pair(VARIANTS[name])
    tower = ours.config.vision.tower  # type: ignore[union-attr]
    ids, index = rows(9 + (tower.clip and tower.whole))
    real = ids > 0
    reference = theirs_of(theirs, ids)
    (reference * torch.tensor(real)).sum().backward()
    want = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}

    def total(params: Params) -> tuple[jax.Array, jax.Array]:
        logps = ours_of(ours, params, ids, index, pixels()[None])
        return (logps * real).sum(), logps

    (_, logps), got = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    assert np.abs(np.asarray(logps) - reference.detach().numpy())[real].max() <= TOLERANCE
    for path, gradient in stacked(want, ours.specs).items():
        scale = float(jnp.abs(gradient).max())
        assert (scale == 0) == (".unused." in path), path
        # That of a key's bias is nothing but rounding: it moves all of a query's scores alike.
        assert float(jnp.abs(got[path] - gradient).max()) <= 1e-3 * max(scale, 1e-2), path


def test_every_tensor_is_declared_once() -> None:
    for name, changed in VARIANTS.items():
        theirs, ours, _ = pair(changed)
        names = [tensor for spec in ours.specs.values() for _, tensor in spec.tensors()]
        there = set(theirs.state_dict()) - ({"lm_head.weight"} if name == "tied" else set())
        assert sorted(names) == sorted(there)


@pytest.mark.parametrize(
    ("sizes", "zero"), [({"data": 3, "sequence": 2}, 0), ({"fsdp": 3, "tensor": 2}, 3)], ids=str
)
def test_devices_that_share_rows_see_their_own_pictures(sizes: dict[str, int], zero: int) -> None:
    """A group of rows for each, with room for two pictures in each pool."""
    text = {**TINY, "hidden_size": 48, "head_dim": 8, "vocab_size": 66}
    tower = {**CLIP, "num_attention_heads": 6}
    _, ours, params = pair({"vision_config": tower, "text_config": text})
    ids, index = rows(9)
    alone = ours_of(ours, params, ids, index, pixels()[None])
    pools = np.zeros((3, 2, 3, 12, 12), np.float32)
    pools[0], pools[2, 0] = pixels()[:2], pixels()[2]
    index = np.where(index[2] >= 0, index[2] - 18, -1) * np.array([[0], [0], [1]]) + index * [[1], [1], [0]]
    layout = Layout(make_mesh(sizes, jax.devices()[:6]), zero)
    spread = build(ours.hf, layout=layout)
    together = jax.jit(lambda params: ours_of(spread, params, ids, index, pools))(
        layout.put(params, ours.specs)
    )
    assert np.abs(np.asarray(together) - np.asarray(alone))[ids > 0].max() <= 1e-5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vision_feature_layer": [-2, -1]}, "features of several layers"),
        ({"vision_config": {**CLIP, "model_type": "siglip2_vision_model"}}, "siglip2_vision_model"),
        ({"text_config": {**TINY, "model_type": "gemma"}}, "'gemma' isn't there"),
        ({"vision_config": {**CLIP, "attention_dropout": 0.1}}, "attention_dropout = 0.1"),
    ],
    ids=str,
)
def test_what_is_not_there_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build({**HF, "vision_config": CLIP, **changed})
