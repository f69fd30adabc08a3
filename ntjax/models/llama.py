"""Llama 1 to 3.x, SmolLM2 and everything else that calls itself `llama`.

Axes: B batch, T time, D embed, H heads, K key/value heads, h head_dim, M mlp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from ntjax.models.decoder import Context, Decoder, DecoderConfig
from ntjax.ops.activations import ACTIVATIONS, known
from ntjax.ops.attention import across, attention, continued
from ntjax.ops.elementwise import shifted
from ntjax.ops.norms import rms_norm
from ntjax.ops.remat import named
from ntjax.ops.rope import rope_from_hf, rotate
from ntjax.params import weight
from ntjax.weights import einsum


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig):
        sizes, hf = config.sizes, config.layer + "self_attn."
        self.window, self.kernel = config.window, config.attention
        self.q = weight(sizes, "embed -> heads head_dim", hf + "q_proj.weight")
        self.k = weight(sizes, "embed -> kv_heads head_dim", hf + "k_proj.weight")
        self.v = weight(sizes, "embed -> kv_heads head_dim", hf + "v_proj.weight")
        self.o = weight(sizes, "heads head_dim -> embed", hf + "o_proj.weight")
        self.q_bias = bias(config.qkv_bias, sizes, "-> heads head_dim", hf + "q_proj.bias")
        self.k_bias = bias(config.qkv_bias, sizes, "-> kv_heads head_dim", hf + "k_proj.bias")
        self.v_bias = bias(config.qkv_bias, sizes, "-> kv_heads head_dim", hf + "v_proj.bias")
        self.o_bias = bias(config.out_bias, sizes, "-> embed", hf + "o_proj.bias")

    def __call__(self, x: jax.Array, context: Context, cache: Any) -> tuple[jax.Array, Any]:
        q = biased(einsum("BTD,HhD->BTHh", x, self.q.get_value()), self.q_bias)
        k = biased(einsum("BTD,KhD->BTKh", x, self.k.get_value()), self.k_bias)
        v = named(biased(einsum("BTD,KhD->BTKh", x, self.v.get_value()), self.v_bias), "value")
        q = named(rotate(q, context.rotation), "query")
        k = named(rotate(k, context.rotation), "key")
        kept: Any = None
        if context.keep or cache is not None:
            kept = k.swapaxes(1, 2), v.swapaxes(1, 2)
        if cache is None:
            keys, k, v = across(context.tokens, k, v) if context.parted else (context.tokens, k, v)
            mixed = attention(q, k, v, context.tokens, keys, self.window, self.kernel)
        else:
            assert context.before is not None
            prompts, own = context.before
            kept = cache.written(kept, context.at)
            mixed = continued(q, kept, context.tokens, prompts, own, self.window)
        out = biased(einsum("BTHh,DHh->BTD", mixed, self.o.get_value()), self.o_bias)
        return named(out, "attention_out"), kept


class MLP(nnx.Module):
    """Gated MLP: down(act(gate(x)) * up(x)) (arXiv:2002.05202)."""

    def __init__(self, config: DecoderConfig):
        sizes, hf = config.sizes, config.layer + "mlp."
        self.activation = config.activation
        self.gate = weight(sizes, "embed -> mlp", hf + "gate_proj.weight")
        self.up = weight(sizes, "embed -> mlp", hf + "up_proj.weight")
        self.down = weight(sizes, "mlp -> embed", hf + "down_proj.weight")
        self.gate_bias = bias(config.mlp_bias, sizes, "-> mlp", hf + "gate_proj.bias")
        self.up_bias = bias(config.mlp_bias, sizes, "-> mlp", hf + "up_proj.bias")
        self.down_bias = bias(config.mlp_bias, sizes, "-> embed", hf + "down_proj.bias")

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = named(biased(einsum("BTD,MD->BTM", x, self.gate.get_value()), self.gate_bias), "gate")
        up = named(biased(einsum("BTD,MD->BTM", x, self.up.get_value()), self.up_bias), "up")
        gated = ACTIVATIONS[self.activation](gate) * up
        return named(biased(einsum("BTM,DM->BTD", gated, self.down.get_value()), self.down_bias), "mlp_out")


class Block(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: DecoderConfig):
        sizes, hf = config.sizes, config.layer
        self.eps = config.eps
        self.attn_norm = weight(sizes, "embed", hf + "input_layernorm.weight", init="ones")
        self.attn = Attention(config)
        self.mlp_norm = weight(sizes, "embed", hf + "post_attention_layernorm.weight", init="ones")
        self.mlp = MLP(config)

    def __call__(self, x: jax.Array, context: Context, cache: Any) -> tuple[jax.Array, Any]:
        mixed, written = self.attn(rms_norm(x, self.attn_norm.get_value(), self.eps), context, cache)
        x = x + mixed
        return x + self.mlp(rms_norm(x, self.mlp_norm.get_value(), self.eps)), written


def bias(there: bool, sizes: Mapping[str, int], axes: str, hf: str) -> nnx.Param | None:
    """A bias's declaration, or None where the layer has none."""
    return weight(sizes, axes, hf, init="zeros") if there else None


def biased(y: jax.Array, bias: nnx.Param | None) -> jax.Array:
    """y plus its bias, where the layer has one."""
    return y if bias is None else shifted(y, bias.get_value())


def config_from_hf(hf: Any) -> DecoderConfig:
    """From a transformers `LlamaConfig`. Raises ConfigError: an unknown activation or scaling of rotations."""
    return DecoderConfig(
        vocab=hf.vocab_size,
        embed=hf.hidden_size,
        mlp=hf.intermediate_size,
        layers=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        kv_heads=hf.num_key_value_heads,
        head_dim=hf.head_dim,
        rope=rope_from_hf(hf.rope_parameters, hf.head_dim, hf.max_position_embeddings),
        eps=hf.rms_norm_eps,
        tied=hf.tie_word_embeddings,
        activation=known(hf.hidden_act),
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        mlp_bias=hf.mlp_bias,
    )


def decoder(config: DecoderConfig) -> Decoder:
    """The module of this family."""
    return Decoder(config, Block(config))
