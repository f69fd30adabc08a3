"""Training steps on one GPU, beside transformers, PEFT, bitsandbytes and TRL in torch: the table `gpu` of
docs/benchmarks.md.

    python scripts/bench/gpu.py [--seconds N] [--only ROW ...] [--out FOLDER] [--toy]
    python scripts/bench/gpu.py --profile ROW --trace FOLDER    # what ntjax's step spends its time on

Random weights of the shapes of Llama-3.2-1B and 3B and Llama-2-7B, random tokens, AdamW, bf16 on fp32 weights where all
are trained, LoRA of rank 16 on every linear map inside the layers. Nothing is recomputed but where a row says so. MFU
is of 6 FLOPs a weight and token (4 where weights are frozen, 2 more for a reference) and causal attention's lower
half, against the chip's peak in bf16 (`ntjax/estimate/chips.py`).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import noted
from harness import Row
from peers.llamas import SHAPES, flops

Json = dict[str, Any]
STEPS, FEW = 10, 2  # measured, and of GRPO, whose steps take long


def by(module: str, kind: str, shape: str, sizes: Json, toy: Json, **settings: Any) -> Callable[..., Json]:
    """The contestant that `peers.<module>` has for a kind of step."""

    def contestant(args: argparse.Namespace) -> Json:
        hf = SHAPES["toy" if args.toy else shape]
        run = getattr(importlib.import_module(f"peers.{module}"), kind)
        count = 2 if args.toy else FEW if kind == "grpo" else STEPS
        traced = {"trace": args.trace} if module == "gpu_ntjax" else {}
        found = run(hf, **(toy if args.toy else sizes), steps=count, **settings, **traced)
        return found | _noted(found, hf, sizes, kind, bool(settings.get("lora")))

    return contestant


def _noted(found: Json, hf: Json, sizes: Json, kind: str, frozen: bool) -> Json:
    """MFU where the device's peak is known."""
    from ntjax.estimate.chips import CHIPS, KINDS

    name = found.get("device") or _torch_device()
    if kind == "grpo" or name not in KINDS:
        return {}
    each = flops(hf, sizes["length"], frozen=frozen, reference=kind == "dpo")
    speed = sum(found["tokens"]) / sum(found["seconds"])
    return {"note": f"MFU {speed * each / CHIPS[KINDS[name]].flops:.0%}"}


def _torch_device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def row(
    name: str, kind: str, shape: str, what: str, sizes: Json, toy: Json, *peers: Any, **settings: Any
) -> Row:
    """ntjax and its `peers`, each (name, module, its own settings); `settings` are everybody's."""
    contestants = {"ntjax": by("gpu_ntjax", kind, shape, sizes, toy, **settings)}
    for who, module, own in peers:
        contestants[who] = by(module, kind, shape, sizes, toy, **{**settings, **own})
    return Row(name, what, contestants)


TORCH, COMPILED = (
    ("transformers", "gpu_torch", {}),
    ("transformers, compiled", "gpu_torch", {"compiled": True}),
)
PEFT, PEFT_COMPILED = ("PEFT", "gpu_torch", {}), ("PEFT, compiled", "gpu_torch", {"compiled": True})
BNB, TRL = ("PEFT, bitsandbytes", "gpu_torch", {}), ("TRL", "gpu_trl", {})
TWO, ONE, SMALL = {"rows": 2, "length": 4096}, {"rows": 1, "length": 4096}, {"rows": 2, "length": 64}
PAIRS, FEW_PAIRS = {"rows": 2, "length": 2048}, {"rows": 2, "length": 64}
DRAWN = {"prompts": 8, "group": 8, "asked": 256, "new": 512, "micro": 8}
FEW_DRAWN = {"prompts": 2, "group": 2, "asked": 16, "new": 8, "micro": 2}
FULL_3B = "full SFT, 3B, 1 x 4096, layers recomputed"
# In order of value: time may end before they do, and torch.compile takes much of it.
ROWS = [
    row("1b", "sft", "1B", "full SFT, 1B, 2 x 4096", TWO, SMALL, TORCH, COMPILED),
    row("7b-lora", "sft", "7B", "LoRA, 7B in bf16, 1 x 4096", ONE, SMALL, PEFT, lora=True),
    row("1b-dpo", "dpo", "1B", "DPO, 1B, 2 pairs of 2 x 2048", PAIRS, FEW_PAIRS, TORCH, TRL),
    row("1b-grpo", "grpo", "1B", "GRPO, 1B, 8 prompts x 8, 256 + 512 tokens", DRAWN, FEW_DRAWN, TORCH, TRL),
    row("7b-qlora", "sft", "7B", "QLoRA, 7B in NF4, 1 x 4096", ONE, SMALL, BNB, lora=True, four=True),
    row("3b", "sft", "3B", FULL_3B, ONE, SMALL, TORCH, COMPILED, remat=True),
    row("7b-lora-compiled", "sft", "7B", "LoRA, 7B, torch compiled", ONE, SMALL, PEFT_COMPILED, lora=True),
    row("1b-dpo-compiled", "dpo", "1B", "DPO, 1B, torch compiled", PAIRS, FEW_PAIRS, COMPILED),
]


def profile(name: str, args: argparse.Namespace) -> None:
    """Prints the instructions of ntjax's step that take the most time."""
    from peers.gpu_ntjax import longest

    (chosen,) = (one for one in ROWS if one.name == name)
    found = chosen.contestants["ntjax"](args)
    print(f"{chosen.what}: {min(found['seconds']):.4g} s a step")
    for instruction, seconds in longest(args.trace):
        print(f"{seconds:10.4g} s  {instruction}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", choices=[one.name for one in ROWS], metavar="ROW", help="of ntjax alone")
    parser.add_argument("--trace", type=Path, help="an empty folder for the trace")
    packages = ("jax", "flax", "optax", "torch", "transformers", "peft", "trl", "bitsandbytes", "flash-attn")
    named, _ = parser.parse_known_args()
    if named.profile:
        profile(named.profile, argparse.Namespace(toy="--toy" in sys.argv, trace=named.trace))
    else:
        noted.main("gpu", ROWS, parser, packages)
