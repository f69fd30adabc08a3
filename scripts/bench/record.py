"""What is kept of a table, docs/bench/NAME/PROCESSOR.json: rows, the machine, the versions of packages.

Ratios are of a processor: each has a record of its own.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "docs" / "bench"
KINDS = {"family": "cpu family", "model": "model"}
Json = dict[str, Any]


def write(name: str, rows: Sequence[Json], head: Json, order: Sequence[str]) -> None:
    """docs/bench/`name`/PROCESSOR.json: `head`, and `rows` in the place of those of the same "what". The others are
    kept if they are in `order`, which is the order they have, and are of the same machine and versions."""
    path = FOLDER / name / f"{processor(head['machine'])}.json"
    known: dict[str, Json] = {}
    if path.exists():
        before = json.loads(path.read_text())
        if all(before[key] == head[key] for key in ("machine", "versions")):
            known = {row["what"]: row for row in before["rows"]}
        else:
            print(f"{path} is of another machine or other versions: begun anew", file=sys.stderr)
    known |= {row["what"]: {"date": head["date"], **row} for row in rows}
    record = {**head, "rows": [known[what] for what in order if what in known]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(record) + "\n")


def text(record: Json) -> str:
    """As JSON, to four digits."""
    short = json.loads(json.dumps(record), parse_float=lambda number: float(f"{float(number):.4g}"))
    return json.dumps(short, indent=1)


def machine(accelerator: bool) -> Json:
    """What is measured on."""
    gpu = ""
    if accelerator and shutil.which("nvidia-smi"):
        ask = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpu = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0))
    return {
        "cores": cores,
        "cpu": cpu(Path("/proc/cpuinfo").read_text()),
        "memory_gb": round(memory / 1e9),
        "accelerator": gpu or None,
    }


def cpu(info: str) -> str:
    """The first processor that Linux tells of; by family and model too, which virtual machines leave out of names."""
    told = dict(re.findall(r"^([^:\n]*?)\s*: (.*)$", info.partition("\n\n")[0], re.MULTILINE))
    return ", ".join(
        [told.get("model name", "unknown"), *(f"{x} {told[k]}" for x, k in KINDS.items() if k in told)]
    )


def processor(machine: Json) -> str:
    """What a machine computes with, as the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", (machine["accelerator"] or machine["cpu"]).lower()).strip("-")


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
