"""Compiling the train step against depth, on a CPU: the table `compile` of docs/benchmarks.md.

    python scripts/bench/compile.py [--rounds N] [--only ROW ...] [--toy]

SmolLM2-135M's shape with more or fewer layers, 4 x 256 tokens, fp32, AdamW, on shapes alone. Seconds are those of
tracing, lowering and compiling; "from the cache" is the same where nothing but the program on disk is left of it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from typing import Any

import noted
from harness import Row, measured

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
TOY = {"vocab_size": 320, "hidden_size": 36, "intermediate_size": 48}
DEPTHS = (2, 8, 30)


def lowered(hf: dict[str, Any], rows: int, length: int) -> Any:
    """The train step of a model on shapes, lowered."""
    import jax
    import jax.numpy as jnp

    from ntjax.models import build
    from ntjax.optim import direction, schedule
    from ntjax.stages.sft import Options
    from ntjax.step import initial_state, train_step

    stage, model = Options(stage_type="sft"), build(hf, attention="auto")
    optimizer = direction(stage, model.specs)
    params = {path: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for path, spec in model.specs.items()}
    state = jax.eval_shape(lambda params: initial_state(params, optimizer), params)
    kinds = {"tokens": jnp.int32, "mask": jnp.bool_, "segments": jnp.int32, "positions": jnp.int32}
    batch = {name: jax.ShapeDtypeStruct((1, rows, length), kind) for name, kind in kinds.items()}
    step = train_step(stage.loss(model), optimizer, schedule(stage, 1000), 1.0)
    return jax.jit(step, donate_argnums=0).lower(state, {}, batch)


def compiled(args: argparse.Namespace, depth: int, *, again: bool = False) -> dict[str, Any]:
    """Compiles it; `again`, and measures the second time, with the first one's program on disk alone."""
    import jax

    hf = {**SHAPE, **(TOY if args.toy else {}), "num_hidden_layers": min(depth, 3) if args.toy else depth}
    seconds, cpu, lines = [], [], 0
    lowered({**SHAPE, **TOY, "num_hidden_layers": 1}, 1, 8)  # what is done once, imports before all
    with tempfile.TemporaryDirectory() as kept:
        jax.config.update("jax_compilation_cache_dir", kept if again else None)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        for _ in range(1 + again):
            jax.clear_caches()
            wall, used = time.perf_counter(), time.process_time()
            program = lowered(hf, 4, 32 if args.toy else 256)
            program.compile()
            seconds.append(time.perf_counter() - wall)
            cpu.append(time.process_time() - used)
            lines = len(program.as_text("hlo").splitlines())
    return measured(seconds[-1:], cpu[-1:], first_s=seconds[0], note=f"{lines} lines of HLO")


ROWS = [
    Row(
        f"{depth}",
        f"{depth} layers",
        {
            "from the cache": partial(compiled, depth=depth, again=True),
            "from nothing": partial(compiled, depth=depth),
        },
    )
    for depth in DEPTHS
]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    noted.main("compile", ROWS, parser, ("jax", "flax", "optax"), rounds=2, JAX_PLATFORMS="cpu")
