"""Times a full fine-tuning step of a model folder, ntjax beside transformers with torch, in one run.

    python scripts/bench/cpu_step.py models/smollm2-135m-instruct [--batch 4] [--length 256] [--steps 5] [--rounds 2]

Both in fp32 with AdamW, no padding, every token learned; each in a process of its own, in turn (torch's idle threads
would slow down anything beside them); medians of the steps after each process's first. Needs the [test] extra, for
torch. Prints the rows for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


def ntjax_step(folder: Path, ids: np.ndarray) -> Callable[[], float]:
    """A function that takes one step and returns its loss."""
    import jax

    from ntjax.hf.files import read_config
    from ntjax.hf.folder import load_params
    from ntjax.models import build
    from ntjax.optim import direction, schedule
    from ntjax.stages.sft import Options
    from ntjax.step import initial_state, train_step

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
    import torch
    from transformers import AutoModelForCausalLM

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


PEERS = {"ntjax": ntjax_step, "torch": torch_step}


def measure(run: Callable[[], float], steps: int) -> list[dict[str, float]]:
    """Seconds and CPU seconds of each step after the first."""
    rows = []
    for _ in range(steps + 1):
        start, used = time.perf_counter(), time.process_time()
        loss = run()
        rows.append({"wall": time.perf_counter() - start, "cpu": time.process_time() - used, "loss": loss})
    return rows[1:]


def main() -> None:
    """Times the peers in turn and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peer", choices=PEERS, help="measure this one alone, as JSON")
    args = parser.parse_args()
    if args.peer:
        ids = np.random.default_rng(0).integers(100, 10_000, (args.batch, args.length)).astype(np.int32)
        print(json.dumps(measure(PEERS[args.peer](args.folder, ids), args.steps)))
        return
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in PEERS}
    for _ in range(args.rounds):
        for name in PEERS:
            command = [sys.executable, *sys.argv, "--peer", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows[name] += json.loads(done.stdout.splitlines()[-1])
    print("| | s a step | tokens/s | CPU-s a step |\n| --- | --- | --- | --- |")
    for name, measured in rows.items():
        wall, cpu = (statistics.median(row[key] for row in measured) for key in ("wall", "cpu"))
        print(f"| {name} | {wall:.2f} | {args.batch * args.length / wall:.0f} | {cpu:.1f} |")


if __name__ == "__main__":
    main()
