"""Times a fine-tuning step of a model folder, whole or with LoRA, ntjax beside transformers with torch, in one run.

    python scripts/bench/cpu_step.py models/smollm2-135m-instruct [--batch 4] [--length 256] [--steps 5] [--peers ...]

Both in fp32 with AdamW, no padding, every token learned; each in a process of its own, in turn (torch's idle threads
would slow down anything beside them); medians of the steps after each process's first. Needs the [test] extra, for
torch. Prints the rows for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np


def ntjax_step(folder: Path, ids: np.ndarray, **model_settings: Any) -> Callable[[], float]:
    """A function that takes one step and returns its loss."""
    import jax

    from ntjax.config import ModelConfig
    from ntjax.hf.files import read_config
    from ntjax.models import build
    from ntjax.optim import direction, schedule
    from ntjax.policy import adapters, load_policy
    from ntjax.stages.sft import Options
    from ntjax.step import initial_state, train_step

    stage = Options(stage_type="sft", learning_rate=1e-5)
    settings = ModelConfig(model_name_or_path=str(folder), **model_settings)
    model = build(read_config(folder))
    plan, _ = adapters(settings, model.specs, None)
    policy = load_policy(folder, model, settings, plan=plan)
    optimizer = direction(stage, policy.specs)
    state = initial_state(policy.trainable, optimizer)
    take = train_step(stage.loss(model), optimizer, schedule(stage, 1000), 1.0, policy.join)
    step = jax.jit(take, donate_argnums=0)
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
        state, metrics = step(state, policy.frozen, batch)
        return float(metrics["loss"].total / metrics["loss"].weight)

    return run


def lora_step(folder: Path, ids: np.ndarray, **model_settings: Any) -> Callable[[], float]:
    """The same with adapters of rank 16 on every linear map inside the layers."""
    from ntjax.config import LoraConfig

    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    return ntjax_step(folder, ids, use_lora=True, lora_config=lora, **model_settings)


def qlora_step(folder: Path, ids: np.ndarray) -> Callable[[], float]:
    """The same on 4-bit weights."""
    from ntjax.config import BnbConfig

    return lora_step(folder, ids, load_in_4bit=True, bnb_config=BnbConfig(use_double_quant=True))


def torch_step(folder: Path, ids: np.ndarray, *, lora: bool = False) -> Callable[[], float]:
    """The first with transformers and torch, or the second with PEFT."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    if lora:
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, settings)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-7, weight_decay=0.0)
    tokens = torch.tensor(ids, dtype=torch.long)

    def run() -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


PEERS: dict[str, Callable[[Path, np.ndarray], Callable[[], float]]] = {
    "ntjax": ntjax_step,
    "torch": torch_step,
    "ntjax, LoRA": lora_step,
    "torch, LoRA (PEFT)": partial(torch_step, lora=True),
    "ntjax, LoRA on NF4": qlora_step,
}


def measure(run: Callable[[], float], steps: int) -> list[dict[str, float]]:
    """Seconds, CPU seconds and the process's peak memory (GB) of each step after the first."""
    rows = []
    for _ in range(steps + 1):
        start, used = time.perf_counter(), time.process_time()
        loss = run()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        wall, cpu = time.perf_counter() - start, time.process_time() - used
        rows.append({"wall": wall, "cpu": cpu, "peak": peak, "loss": loss})
    return rows[1:]


def main() -> None:
    """Times the peers in turn and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="these alone")
    parser.add_argument("--peer", choices=PEERS, help="measure this one alone, as JSON")
    args = parser.parse_args()
    if args.peer:
        ids = np.random.default_rng(0).integers(100, 10_000, (args.batch, args.length)).astype(np.int32)
        print(json.dumps(measure(PEERS[args.peer](args.folder, ids), args.steps)))
        return
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in args.peers or PEERS}
    for _ in range(args.rounds):
        for name in rows:
            command = [sys.executable, *sys.argv, "--peer", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows[name] += json.loads(done.stdout.splitlines()[-1])
    print("| | s a step | tokens/s | CPU-s a step | peak GB |\n| --- | --- | --- | --- | --- |")
    for name, measured in rows.items():
        wall, cpu = (statistics.median(row[key] for row in measured) for key in ("wall", "cpu"))
        peak = max(row["peak"] for row in measured)
        print(f"| {name} | {wall:.2f} | {args.batch * args.length / wall:.0f} | {cpu:.1f} | {peak:.1f} |")


if __name__ == "__main__":
    main()
