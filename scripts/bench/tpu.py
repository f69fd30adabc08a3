"""The plans of docs/scaling.md: each compiled for devices that aren't here, as rows of a Markdown table.

    python scripts/bench/tpu.py fit            # 7B and 70B on TPU slices and GPUs, with the settings --auto finds
    python scripts/bench/tpu.py scaling        # 70B from 64 to 1024 chips at a constant batch per chip
    python scripts/bench/tpu.py collectives    # what is sent in a step of 7B and of 70B, and what for
    python scripts/bench/tpu.py --toy          # all three on a tiny model and four chips

TPUs need libtpu (`pip install ntjax[tpu]`), GPUs JAX's CUDA plugin (`pip install ntjax[cuda]`).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

Json = dict[str, Any]
ROOT = Path(__file__).parents[2]
PLANS = ROOT / "configs" / "plan"


class Asked(NamedTuple):
    """A row: the config in configs/plan, the devices, and what else the command is given."""

    what: str
    config: str
    topology: str
    extra: tuple[str, ...] = ()


AUTO, LORA = ("--auto",), ("--auto", "model.load_in_4bit=false")
FIT = [
    Asked("full SFT, 4096", "llama2_7b_sft", "v5e:4x4", AUTO),
    Asked("full SFT, 4096", "llama2_7b_sft", "v5p:2x2x2", AUTO),
    Asked("QLoRA, 2048", "llama2_7b_qlora", "v5e:2x2"),
    Asked("LLaVA-1.5-7B QLoRA, 1024", "llava15_7b_qlora", "v5e:1x1"),
    Asked("LLaVA-1.5-7B full SFT, 2048", "llava15_7b_sft", "v5e:4x4", AUTO),
    Asked("DPO, 2 x 2048", "llama2_7b_dpo", "v5e:4x4", AUTO),
    Asked("GRPO, 1024 + 1024", "llama2_7b_grpo", "v5p:4x4x4", AUTO),
    Asked("70B full SFT, 4096", "llama3_70b_sft", "v5p:4x4x8", AUTO),
    Asked("70B full SFT, 4096", "llama3_70b_sft", "v6e:16x16", AUTO),
    Asked("full SFT, 4096", "llama2_7b_sft", "h100:8", AUTO),
    Asked("LoRA, 2048", "llama2_7b_qlora", "h100:8", LORA),
    Asked("QLoRA, 2048", "llama2_7b_qlora", "h100:8", AUTO),
    Asked("full SFT, 4096", "llama2_7b_sft", "h100:1", AUTO),
    Asked("LoRA, 2048", "llama2_7b_qlora", "h100:1", LORA),
    Asked("QLoRA, 2048", "llama2_7b_qlora", "h100:1", AUTO),
]


def step_of(rows: int, micros: int, remat: str) -> tuple[str, ...]:
    """Settings of an SFT step."""
    return (
        f"stages.sft.per_device_train_batch_size={rows}",
        f"stages.sft.gradient_accumulation_steps={micros}",
        f"stages.sft.remat={remat}",
    )


KEPT = '["attention","attention_out"]'
SHAPES = {64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8", 1024: "8x8x16"}
SCALING = [
    Asked(f"{chips} chips", "llama3_70b_sft", f"v5p:{shape}", step_of(1, 2, KEPT))
    for chips, shape in SHAPES.items()
]
COLLECTIVES = [
    Asked("7B full SFT, 4096", "llama2_7b_sft", "v5e:4x4", step_of(1, 4, KEPT)),
    Asked("70B full SFT, 4096", "llama3_70b_sft", "v5p:4x4x8", step_of(1, 2, '"minimal"')),
]
TOY: Json = {"model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512}
TOY |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
SMALL = ("stages.sft.max_length=256", *step_of(1, 2, KEPT))


def planned(asked: Asked) -> tuple[list[Json], str, float]:
    """The plan's programs, the settings it found, and the seconds it took."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "ntjax.plan", "--config", f"configs/plan/{asked.config}.toml", "--json"]
    command += ["--topology", asked.topology, *asked.extra]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    if not found:
        sys.exit(ran.stderr)
    settings = found.pop()["settings"] if "settings" in found[-1] else "as in the config"
    return found, settings, time.perf_counter() - began


PLAN_HEAD = (
    "| what | devices | settings | GiB a device | fits | GB sent a step | s a step | MFU | kernels | planned in s |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def plan_lines(asked: Asked) -> Iterator[str]:
    """A line: of the largest program for memory, and of a whole step for time."""
    programs, settings, spent = planned(asked)
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
    yield (
        f"| {asked.what} | {asked.topology} | {short or settings} | {memory} | {fits} | {sent:.0f} | {seconds:.2f} "
        f"| {use} | {kernels} | {spent:.0f} |"
    )


def _short(match: re.Match[str]) -> str:
    return {"per": "rows", "gra": "accumulation"}[match[0][:3]]


SENT_HEAD = (
    "| what | devices | collective | MB each | times | GB sent | for | needed by sharding |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


NOT_KNOWN, SUMS = "not known", "numbers, and gradients of norms"


def sent_lines(asked: Asked) -> Iterator[str]:
    """A line for each size of each kind of collective of a step, the largest share of what is sent first."""
    programs, _, _ = planned(asked)
    hf = json.loads((_model(asked) / "config.json").read_text())
    layers = hf["num_hidden_layers"]
    uses = 2 * layers * next(int(x.partition("=")[2]) for x in asked.extra if "accumulation_steps=" in x)
    total = math.prod(int(size) for size in asked.topology.partition(":")[2].split("x"))
    of: dict[tuple[Any, ...], list[float]] = defaultdict(lambda: [0, 0.0])
    for one in programs[0]["collectives"]:
        what = f"{one['kind']} along {' + '.join(one['axes'])}, {one['devices']} devices"
        summed = of[(what, one["kind"], one["bytes"], purpose(one, hf, total))]
        share = 1.0 if one["kind"] == "collective-permute" else 1 - 1 / one["devices"]
        summed[0] += one["times"]
        summed[1] += one["times"] * one["bytes"] * share * (2 if one["kind"] == "all-reduce" else 1)
    for (what, kind, size, use), (times, sent) in sorted(of.items(), key=lambda item: -item[1][1]):
        yield (
            f"| {asked.what} | {asked.topology} | {what} | {size / 1e6:.3g} | {times} | {sent / 1e9:.3g} "
            f"| {use} | {needed(kind, use, times, uses)} |"
        )


def purpose(collective: Json, hf: Json, devices: int) -> str:
    """What a collective is for, by its kind and size. With groups of fewer than all devices, weights come in two
    stages, of which one gives a part. Shards whose number doesn't divide evenly are padded, by less than 2%."""
    kind, size, group = collective["kind"], collective["bytes"], collective["devices"]
    if kind == "collective-permute":
        return "edges of padded shards"
    if kind == "all-reduce" and size <= 4 * (2 * hf["num_hidden_layers"] + 1) * hf["hidden_size"] + 1000:
        return SUMS
    side, width = ("weights", 2) if kind == "all-gather" else ("gradients", 4)
    for part in (1, devices // group):
        for together in (1, 2, 3, 4):
            for name, numbers in matrices(hf).items():
                if 1 <= size * part / (numbers * width * together) < 1.02:
                    return f"{side}: {f'{together} of ' * (together > 1)}{name}{', a part' * (part > 1)}"
    return NOT_KNOWN


def needed(kind: str, use: str, times: int, uses: int) -> str:
    """Whether weights split over `fsdp` need it: each layer's once forward and once backward, `uses` in all, and its
    gradients to go where they are kept."""
    if use in (NOT_KNOWN, SUMS):
        return "yes" if use == SUMS else ""
    if kind == "collective-permute":
        return "no"
    if kind == "all-reduce":
        return "half: every device is sent all of the sum"
    enough = uses * len(use.removesuffix(", a part").partition(": ")[2].split(", "))
    return f"{enough} times" if kind == "all-gather" and times > enough else "yes"


def matrices(hf: Json) -> dict[str, int]:
    """Numbers of each kind of matrix of a Llama."""
    embed, mlp, heads = hf["hidden_size"], hf["intermediate_size"], hf["num_attention_heads"]
    kept = embed * hf.get("num_key_value_heads", heads) // heads * embed
    own = {"q, k, v, o": kept} if kept == embed * embed else {"q, o": embed * embed, "k, v": kept}
    return {**own, "gate, up, down": embed * mlp, "embedding, head": hf["vocab_size"] * embed}


def _model(asked: Asked) -> Path:
    """The folder of the config.json."""
    given = [word.partition("=")[2] for word in asked.extra if word.startswith("model.model_name_or_path=")]
    if given:
        return Path(given[0])
    named = re.search(
        r'^model_name_or_path = "(.*?)"', (PLANS / f"{asked.config}.toml").read_text(), re.MULTILINE
    )
    assert named is not None
    return PLANS / named[1]


TABLES = {
    "fit": (FIT, PLAN_HEAD, plan_lines),
    "scaling": (SCALING, PLAN_HEAD, plan_lines),
    "collectives": (COLLECTIVES, SENT_HEAD, sent_lines),
}


def main() -> None:
    """Prints the table named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", nargs="?", choices=TABLES)
    parser.add_argument("--only", nargs="+", metavar="TOPOLOGY", help="these devices alone")
    parser.add_argument("--toy", action="store_true", help="tables on a tiny model and four chips")
    args = parser.parse_args()
    if not args.toy and args.table is None:
        parser.error(f"name a table: {', '.join(TABLES)}")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(TOY))
        toy = Asked("tiny", "llama2_7b_sft", "v5e:2x2", (f"model.model_name_or_path={folder}", *SMALL))
        for name in [args.table] if args.table else TABLES:
            rows, head, lines = TABLES[name]
            print(head)
            for asked in [toy] if args.toy else rows:
                if not args.only or asked.topology in args.only:
                    print("\n".join(lines(asked)), flush=True)


if __name__ == "__main__":
    main()
