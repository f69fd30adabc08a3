"""The weights of a tiny Llama, declared without torch."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from ntjax.params import Params, Specs, weight

SIZES = {"vocab": 48, "embed": 16, "mlp": 24, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 4}
LAYER = "model.layers.{layers}."


def llama_specs(tied: bool = False, **sizes: int) -> Specs:
    declared = {
        "embed": ("vocab embed", "model.embed_tokens.weight"),
        "norm": ("embed", "model.norm.weight"),
        "attn_norm": ("embed", LAYER + "input_layernorm.weight"),
        "q": ("embed -> heads head_dim", LAYER + "self_attn.q_proj.weight"),
        "k": ("embed -> kv_heads head_dim", LAYER + "self_attn.k_proj.weight"),
        "v": ("embed -> kv_heads head_dim", LAYER + "self_attn.v_proj.weight"),
        "o": ("heads head_dim -> embed", LAYER + "self_attn.o_proj.weight"),
        "mlp_norm": ("embed", LAYER + "post_attention_layernorm.weight"),
        "gate": ("embed -> mlp", LAYER + "mlp.gate_proj.weight"),
        "up": ("embed -> mlp", LAYER + "mlp.up_proj.weight"),
        "down": ("mlp -> embed", LAYER + "mlp.down_proj.weight"),
    }
    if not tied:
        declared["head"] = ("embed -> vocab", "lm_head.weight")
    return {path: weight(SIZES | sizes, *line).get_metadata()["spec"] for path, line in declared.items()}


def random_params(specs: Specs, dtype: str = "float32") -> Params:
    rng = np.random.default_rng(0)
    return {path: jnp.asarray(rng.standard_normal(spec.shape), dtype) for path, spec in specs.items()}
