"""Times a full fine-tuning step of a model folder, ntjax beside transformers with torch, in one run.

    python scripts/bench/cpu_step.py models/smollm2-135m-instruct [--batch 4] [--length 256] [--steps 5]

Both in fp32 with AdamW, no padding, every token learned; a step of each in turn, medians of the steps after the first.
Needs the [test] extra, for torch. Prints a row for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from ntjax.hf.files import read_config
from ntjax.hf.folder import load_params
from ntjax.models import build
from ntjax.optim import direction, schedule
from ntjax.stages.sft import Options
from ntjax.step import initial_state, train_step


def ntjax_step(folder: Path, ids: np.ndarray) -> Callable[[], float]:
    """A function that takes one step and returns its loss."""
    stage = Options(stage_type="sft", learning_rate=1e-5)
    model = build(read_config(folder))
    optimizer = direction(stage, model.specs)
    state = initial_state(load_params(folder, model.specs, dtype="float32"), optimizer)
    step = jax.jit(train_step(stage.loss(model), optimizer, schedule(stage, 1000), 1.0), donate_argnums=0)
    mask = np.ones(ids.shape, bool)
    mask[:, 0] = False
    batch = {
        "tokens": ids[None],
        "mask": mask[None],
        "segments": np.ones((1, *ids.shape), np.int32),
        "positions": np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), (1, *ids.shape)),
    }

    def run() -> float:
        nonlocal state
        state, metrics = step(state, {}, batch)
        return float(metrics["loss"].total / metrics["loss"].weight)

    return run


def torch_step(folder: Path, ids: np.ndarray) -> Callable[[], float]:
    """The same with transformers and torch."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7, weight_decay=0.0)
    tokens = torch.tensor(ids, dtype=torch.long)

    def run() -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


def main() -> None:
    """Times both and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    ids = np.random.default_rng(0).integers(100, 10_000, (args.batch, args.length)).astype(np.int32)
    runs = {"ntjax": ntjax_step(args.folder, ids), "torch": torch_step(args.folder, ids)}
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(args.steps + 1):
        for name, run in runs.items():
            start, used = time.perf_counter(), time.process_time()
            loss = run()
            if index:
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - used)
            print(f"{name} step {index}: loss {loss:.4f}, {time.perf_counter() - start:.2f} s", flush=True)
    print("\n| | s a step | tokens/s | CPU-s a step |\n| --- | --- | --- | --- |")
    for name in runs:
        seconds = statistics.median(wall[name])
        print(f"| {name} | {seconds:.2f} | {ids.size / seconds:.0f} | {statistics.median(cpu[name]):.1f} |")


if __name__ == "__main__":
    main()
