"""Every stage on a CPU, beside transformers, TRL and Tunix: the table `cpu` of docs/benchmarks.md.

    python scripts/bench/cpu.py [--rounds N] [--only ROW ...] [--toy] [--tunix-python PATH]

A step alone is on random tokens without padding, every one learned; stages are trained on real rows, twice over, and
the second time is measured. AdamW (in torch the fused one), fp32 but for the row that says bf16, without gradient
checkpointing, on all sides. The peers need the [test] extra; Tunix wants an environment of its own with
google-tunix==0.1.5, whose Python is named.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from harness import Absent, Row, main, timed

ROOT = Path(__file__).parents[2]
Json = dict[str, Any]
PACKAGES = ("jax", "flax", "torch", "transformers", "trl", "peft")


class Size(NamedTuple):
    """What is measured: a step alone, taken so often, on so many rows of tokens; rows of data for SFT, and tokens of
    one that they are packed into; pairs for preferences; questions of a GRPO step, completions of each, their tokens.
    """

    batch: int
    length: int
    steps: int
    rows: int
    packed: int
    pairs: int
    prompts: int
    group: int
    new: int


REAL = Size(batch=4, length=256, steps=2, rows=12, packed=896, pairs=4, prompts=4, group=8, new=32)
TOY = Size(batch=2, length=16, steps=2, rows=12, packed=256, pairs=4, prompts=2, group=2, new=4)
ROWS_A_STEP, PAIRS_A_STEP = 4, 2
SHARED: Json = {"learning_rate": 1e-5, "lr_scheduler_type": "constant", "warmup_steps": 0}


def model_of(args: argparse.Namespace) -> Path:
    """The folder of the model; a tiny one with random weights is made once."""
    if not args.toy:
        return args.model
    folder = Path(tempfile.gettempdir()) / "ntjax-bench-tiny"
    if not (folder / "config.json").exists():
        subprocess.run([sys.executable, "-m", "tests.tiny", str(folder)], check=True, cwd=ROOT)
    return folder


def alone(module: str, function: str, args: argparse.Namespace, **settings: Any) -> Json:
    """A step alone of the peer `module`."""
    import numpy as np

    size, folder = TOY if args.toy else REAL, model_of(args)
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    ids = np.random.default_rng(0).integers(100, min(vocab, 10_000), (size.batch, size.length), np.int32)
    step = getattr(importlib.import_module(f"peers.{module}"), function)(folder, ids, **settings)
    return timed(step, size.steps, tokens=ids.size)


def stage(module: str, kind: str, args: argparse.Namespace, *, packed: bool = False) -> Json:
    """A stage on real rows, twice over, by the peer `module`; the second time is measured."""
    from peers import rows
    from peers.clock import Clock

    size, clock = TOY if args.toy else REAL, Clock()
    train = partial(importlib.import_module(f"peers.{module}").stage, clock, model_of(args), kind)
    data = rows.toy_rows() if args.toy else rows.real_rows(args.data)
    chosen = rows.answered(data[: size.rows]) if kind == "sft" else rows.preferred(data[: size.pairs])
    a_step = 1 if packed else ROWS_A_STEP if kind == "sft" else PAIRS_A_STEP
    packing = {"packing": True, "max_length": size.packed} if packed else {}
    train(chosen, num_train_epochs=2, per_device_train_batch_size=a_step, **packing, **SHARED)
    return clock.run(warm=len(clock.marks) // 2)


def grpo(module: str, args: argparse.Namespace) -> Json:
    """GRPO by the peer `module`, the same questions in every step. Ours marks a step once the next completions are
    drawn, and the last when it is over, which is therefore left out."""
    from peers import rows
    from peers.clock import Clock

    size, clock, ours = TOY if args.toy else REAL, Clock(), module == "by_ntjax"
    train = partial(importlib.import_module(f"peers.{module}").stage, clock, model_of(args), "grpo")
    data = rows.toy_rows() if args.toy else rows.real_rows(args.data)
    settings = SHARED | {"per_device_train_batch_size": size.prompts * size.group, "temperature": 1.0}
    settings |= {"num_generations": size.group, "max_completion_length": size.new}
    settings |= {"max_steps": 3, "reward_function": f"{rows.__file__}:digits"} if ours else {"max_steps": 2}
    train(rows.asked(data, size.prompts), **settings)
    return clock.run(warm=1, last=2)


def tunix(args: argparse.Namespace) -> Json:
    """A step alone by Tunix's trainer, in its own environment."""
    if args.tunix_python is None:
        raise Absent("no --tunix-python")
    size, script = TOY if args.toy else REAL, ROOT / "scripts" / "bench" / "peers" / "by_tunix.py"
    shape = [str(n) for n in (size.batch, size.length, size.steps)]
    command = [args.tunix_python, str(script), str(model_of(args) / "config.json"), *shape]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def beside_trl(kind: str) -> dict[str, Callable[[argparse.Namespace], Json]]:
    """A stage by ntjax and by TRL."""
    return {"ntjax": partial(stage, "by_ntjax", kind), "TRL": partial(stage, "by_trl", kind)}


full, lora = partial(alone, "by_ntjax", "step"), partial(alone, "by_ntjax", "lora_step")
torch = partial(alone, "by_torch", "step")
SHAPE = f"{REAL.batch} x {REAL.length} tokens"
DRAWN = f"{REAL.prompts} prompts x {REAL.group} completions of {REAL.new} tokens"
ROWS = [
    Row(
        "fp32",
        f"SFT step, {SHAPE}, fp32",
        {"ntjax": full, "torch": torch, "torch, compiled": partial(torch, compiled=True), "Tunix": tunix},
        "1.0 torch, 2 Tunix",
    ),
    Row(
        "bf16",
        f"SFT step, {SHAPE}, bf16",
        {
            "ntjax, fp32 weights": partial(full, dtype="bfloat16"),
            "torch, bf16 weights": partial(torch, dtype="bfloat16"),
            "torch, autocast": partial(torch, dtype="autocast"),
            "torch, autocast, compiled": partial(torch, dtype="autocast", compiled=True),
        },
        "1.4",
    ),
    Row(
        "lora",
        f"LoRA step, {SHAPE}, fp32",
        {
            "ntjax": lora,
            "ntjax, on NF4": partial(alone, "by_ntjax", "qlora_step"),
            "ntjax, all weights": full,
            "PEFT": partial(torch, lora=True),
        },
        "1.3 all weights; NF4 1.25 at most",
    ),
    Row(
        "sft",
        f"SFT, {ROWS_A_STEP} real rows a step, or as many packed into {REAL.packed} tokens",
        beside_trl("sft") | {"ntjax, packed": partial(stage, "by_ntjax", "sft", packed=True)},
        "1.5 TRL",
    ),
    Row("reward", f"reward model, {PAIRS_A_STEP} real pairs a step", beside_trl("reward")),
    Row("dpo", f"DPO, {PAIRS_A_STEP} real pairs a step", beside_trl("dpo"), "1.5"),
    Row(
        "grpo",
        f"GRPO step, {DRAWN}",
        {"ntjax": partial(grpo, "by_ntjax"), "TRL": partial(grpo, "by_trl")},
        "2",
    ),
]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "smollm2-135m-instruct")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "bench", help="where real rows are kept")
    parser.add_argument("--tunix-python", metavar="PATH", help="of an environment with google-tunix")
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    main("cpu", ROWS, parser, PACKAGES, JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="", **quiet)
