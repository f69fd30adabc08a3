"""The plans of docs/scaling.md: each compiled for devices that aren't here, as rows of a Markdown table.

    python scripts/bench/plans.py fit        # 7B and 70B on TPU slices and GPUs, with the settings --auto finds
    python scripts/bench/plans.py scaling    # 70B from 64 to 1024 chips at a constant batch per chip

TPUs need libtpu (`pip install ntjax[tpu]`), GPUs JAX's CUDA plugin (`pip install ntjax[cuda]`).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LORA = ["model.load_in_4bit=false"]
FIT: list[tuple[str, str, str, list[str]]] = [
    ("full SFT, 4096", "llama2_7b_sft", "v5e:4x4", ["--auto"]),
    ("full SFT, 4096", "llama2_7b_sft", "v5p:2x2x2", ["--auto"]),
    ("QLoRA, 2048", "llama2_7b_qlora", "v5e:2x2", []),
    ("DPO, 2 x 2048", "llama2_7b_dpo", "v5e:4x4", ["--auto"]),
    ("GRPO, 1024 + 1024", "llama2_7b_grpo", "v5p:4x4x4", ["--auto"]),
    ("70B full SFT, 4096", "llama3_70b_sft", "v5p:4x4x8", ["--auto"]),
    ("70B full SFT, 4096", "llama3_70b_sft", "v6e:16x16", ["--auto"]),
    ("full SFT, 4096", "llama2_7b_sft", "h100:8", ["--auto"]),
    ("LoRA, 2048", "llama2_7b_qlora", "h100:8", ["--auto", *LORA]),
    ("QLoRA, 2048", "llama2_7b_qlora", "h100:8", ["--auto"]),
    ("full SFT, 4096", "llama2_7b_sft", "h100:1", ["--auto"]),
    ("LoRA, 2048", "llama2_7b_qlora", "h100:1", ["--auto", *LORA]),
    ("QLoRA, 2048", "llama2_7b_qlora", "h100:1", ["--auto"]),
]
ROWS = ["stages.sft.per_device_train_batch_size=1", "stages.sft.gradient_accumulation_steps=2"]
SCALING: list[tuple[str, str, str, list[str]]] = [
    (
        f"{chips} chips",
        "llama3_70b_sft",
        f"v5p:{shape}",
        [*ROWS, 'stages.sft.remat=["attention","attention_out"]'],
    )
    for chips, shape in ((64, "4x4x4"), (128, "4x4x8"), (256, "4x8x8"), (512, "8x8x8"), (1024, "8x8x16"))
]


def planned(config: str, topology: str, extra: list[str]) -> tuple[list[dict[str, Any]], str, float]:
    """The plan's programs, the settings it found, and the seconds it took."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "ntjax.plan", "--config", f"configs/plan/{config}.toml", "--json"]
    ran = subprocess.run([*command, "--topology", topology, *extra], cwd=ROOT, capture_output=True, text=True)
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    if not found:
        sys.exit(ran.stderr)
    settings = found.pop()["settings"] if "settings" in found[-1] else "as in the config"
    return found, settings, time.perf_counter() - began


def row(name: str, topology: str, programs: list[dict[str, Any]], settings: str, spent: float) -> str:
    """Of the largest program for memory, and of a whole step for time."""
    largest = max(programs, key=lambda one: one["total"])
    seconds = sum(one["calls"] * (one["seconds"] or 0) for one in programs)
    train = programs[0]
    sent = sum(one["calls"] * one["sent"] for one in programs) / 1e9
    lines = [line for line in settings.splitlines() if " = " in line and "zero_stage" not in line]
    short = ", ".join(
        re.sub(r"per_device_train_batch_size|gradient_accumulation_steps", _short, x) for x in lines
    )
    fits = "yes" if largest["fits"] else "no"
    memory = f"{largest['total'] / 2**30:.1f} of {largest['capacity'] / 2**30:.1f} ({largest['program']})"
    kernels = ", ".join(sorted({name for one in programs for name in one["kernels"]}))
    use = f"{train['utilisation']:.0%}" if train["utilisation"] else ""
    return (
        f"| {name} | {topology} | {short or settings} | {memory} | {fits} | {sent:.0f} | {seconds:.2f} | {use} "
        f"| {kernels} | {spent:.0f} |"
    )


def _short(match: re.Match[str]) -> str:
    return {"per": "rows", "gra": "accumulation"}[match[0][:3]]


def main() -> None:
    """Prints the table named on the command line."""
    which = {"fit": FIT, "scaling": SCALING}[sys.argv[1]]
    only = sys.argv[2:]  # topologies
    print(
        "| what | devices | settings | GiB a device | fits | GB sent a step | s a step | MFU | kernels | planned in s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, config, topology, extra in which:
        if not only or topology in only:
            print(row(name, topology, *planned(config, topology, extra)), flush=True)


if __name__ == "__main__":
    main()
