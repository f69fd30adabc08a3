"""Shapes of models that the GPU table trains from random weights, and the FLOPs of a token of them."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]


def _llama(layers: int, embed: int, mlp: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> Json:
    sizes = {"num_hidden_layers": layers, "hidden_size": embed, "intermediate_size": mlp, "vocab_size": vocab}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": embed // heads}
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": tied,
        "max_position_embeddings": 8192,
        **sizes,
    }


SHAPES = {
    "1B": _llama(16, 2048, 8192, 32, 8, 128256, tied=True),  # Llama-3.2-1B
    "3B": _llama(28, 3072, 8192, 24, 8, 128256, tied=True),  # Llama-3.2-3B
    "7B": _llama(32, 4096, 11008, 32, 32, 32000, tied=False),  # Llama-2-7B
    "toy": _llama(2, 64, 128, 4, 2, 512, tied=True),
}


def matmul_weights(hf: Json) -> int:
    """N: weights that a token is multiplied with, the head's included, an embedding's that is only looked up not."""
    embed, mlp, head = hf["hidden_size"], hf["intermediate_size"], hf["head_dim"]
    attention = 2 * embed * head * (hf["num_attention_heads"] + hf["num_key_value_heads"])
    return hf["num_hidden_layers"] * (attention + 3 * embed * mlp) + hf["vocab_size"] * embed


def flops(hf: Json, length: int, *, frozen: bool = False, reference: bool = False) -> float:
    """Of a token of a row of `length`, forward and backward: 6 N, 4 N where all weights are frozen and LoRA's count for
    nothing, 2 N more for a reference model; and causal attention, whose scores above the diagonal aren't counted."""
    passes = (2 if frozen else 3) + reference
    attended = hf["num_hidden_layers"] * hf["num_attention_heads"] * hf["head_dim"] * length
    # Scores and values: 2 x 2 x length / 2 a head's dimension forward, twice that backward, of weights frozen or not.
    return passes * 2 * matmul_weights(hf) + (3 + reference) * 2 * attended
