"""Tunix's step as a contestant, run by the Python of an environment of its own: its PeftTrainer's compiled step on its
Llama 3, of the shape in a config.json, with random weights in fp32, without remat.

    PYTHON by_tunix.py CONFIG.json BATCH LENGTH STEPS
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness import timed


def step(hf: dict[str, Any], rows: int, length: int, folder: str) -> Callable[[], float]:
    """A function that takes one step on random tokens, every one learned, and returns its loss."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx
    from tunix.models.llama3.model import Llama3, ModelConfig
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput
    from tunix.sft.utils import build_positions_from_mask, make_causal_attn_mask

    config = ModelConfig(
        num_layers=hf["num_hidden_layers"],
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        head_dim=hf["hidden_size"] // hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        rope_theta=10_000,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        weight_tying=hf["tie_word_embeddings"],
    )
    model = Llama3(config, rngs=nnx.Rngs(0))
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5, weight_decay=0.0))
    settings = TrainingConfig(eval_every_n_steps=10**6, max_steps=10**6, checkpoint_root_directory=folder)
    trainer = PeftTrainer(model, clipped, settings)

    def inputs(given: TrainingInput) -> dict[str, Any]:
        ones = given.input_mask
        return {
            "input_tokens": given.input_tokens,
            "input_mask": ones,
            "positions": build_positions_from_mask(ones),
            "attention_mask": make_causal_attn_mask(ones),
        }

    trainer.with_gen_model_input_fn(inputs)
    compiled, _ = trainer.jit_train_and_eval_step()
    ids = np.random.default_rng(0).integers(100, min(hf["vocab_size"], 10_000), (rows, length), np.int32)
    batch = TrainingInput(input_tokens=jnp.asarray(ids), input_mask=jnp.ones((rows, length), jnp.int32))

    def run() -> float:
        loss, _ = compiled(model, trainer.optimizer, batch)
        return float(jax.block_until_ready(loss))

    return run


if __name__ == "__main__":
    config, *shape = sys.argv[1:]
    batch, length, steps = map(int, shape)
    with tempfile.TemporaryDirectory() as folder:
        print(
            json.dumps(
                timed(
                    step(json.loads(Path(config).read_text()), batch, length, folder), steps, batch * length
                )
            )
        )
