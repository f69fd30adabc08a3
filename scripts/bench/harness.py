"""How the tables of docs/benchmarks.md are measured: rows, each of ntjax and its peers, a process a measurement.

    python scripts/bench/NAME.py [--rounds N] [--only ROW ...] [--toy]

The contestants of a row take turns, round after round, so that what else the machine does falls on all of them; figures
are medians over all rounds. They are left in docs/bench/NAME/PROCESSOR.json, from which `tables.py` writes the
document; `--toy` tries every row on a tiny model and leaves nothing. Standard library alone: a contestant imports what
it needs, in its own process (`--contestant ROW/WHO`, which prints one line of JSON).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from record import machine, text, versions, write

Json = dict[str, Any]


class Absent(Exception):
    """A contestant can't be had here; the message, which says why, stands in the table."""


@dataclass(frozen=True)
class Row:
    """`name` is for --only; the first of the contestants is held against the others; `asked` says what its ratio to
    the fastest of them should be."""

    name: str
    what: str
    contestants: Mapping[str, Callable[[argparse.Namespace], Json]]
    asked: str = ""


def timed(step: Callable[[], float], steps: int, tokens: int | None = None) -> Json:
    """Measures `steps` calls of a step of so many tokens that returns its loss, after a first one that warms up."""
    walls, cpus, losses = [], [], []
    for _ in range(steps + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        losses.append(step())
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    counts = [tokens] * steps if tokens else None
    return measured(walls[1:], cpus[1:], tokens=counts, first_s=walls[0], loss=losses[:3])


def measured(seconds: Sequence[float], cpu: Sequence[float], **rest: Any) -> Json:
    """What a contestant returns: seconds and CPU seconds of each step, its `tokens` (or None), `first_s` for what went
    before, the first losses, and the process's peak memory in GB, which an accelerator's may replace."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
    return {"seconds": [*seconds], "cpu": [*cpu], "tokens": None, "peak_gb": peak, "loss": [], **rest}


def figures(runs: Sequence[Json]) -> Json:
    """Medians over the steps of all runs; where steps differ in tokens, tokens/s is a run's, the median of them."""
    if "absent" in runs[-1]:
        return runs[-1]
    seconds, cpu = ([x for run in runs for x in run[key]] for key in ("seconds", "cpu"))
    found = {
        "seconds": statistics.median(seconds),
        "seconds_from_to": [min(seconds), max(seconds)],
        "steps": len(seconds),
        "tokens_per_s": None,
        "cpu": statistics.median(cpu),
        "peak_gb": max(run["peak_gb"] for run in runs),
        "first_s": statistics.median(run["first_s"] for run in runs),
        "loss": runs[0]["loss"],
    }
    if all(run["tokens"] for run in runs):
        same = {count for run in runs for count in run["tokens"]}
        whole = statistics.median(sum(run["tokens"]) / sum(run["seconds"]) for run in runs)
        found["tokens_per_s"] = same.pop() / found["seconds"] if len(same) == 1 else whole
    return found


def ratios(found: Mapping[str, Json]) -> dict[str, float]:
    """How many times as fast as each of the others the first is, by tokens/s where both have it, else by step."""
    first, *_ = found.values()
    if "absent" in first:
        return {}
    return {who: _times(first, other) for who, other in list(found.items())[1:] if "absent" not in other}


def _times(one: Json, other: Json) -> float:
    if one["tokens_per_s"] and other["tokens_per_s"]:
        return one["tokens_per_s"] / other["tokens_per_s"]
    return other["seconds"] / one["seconds"]


def main(
    name: str, rows: Sequence[Row], parser: argparse.ArgumentParser, packages: Sequence[str], **env: str
) -> None:
    """The command `NAME.py`; its contestants have `env` in their environment, and versions of `packages` are kept."""
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", nargs="+", choices=[row.name for row in rows], metavar="ROW", help="these alone"
    )
    parser.add_argument("--toy", action="store_true", help="a tiny model; nothing is written")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant:
        row, _, who = args.contestant.partition("/")
        print(json.dumps(_one(next(one for one in rows if one.name == row).contestants[who], args)))
        return
    if not args.toy and "model" in args and not (args.model / "config.json").exists():
        parser.error(f"there is no model in {args.model}: scripts/demo leaves one there, --toy does without")
    head = {"command": f"python scripts/bench/{name}.py", "date": f"{datetime.date.today()}"}
    head |= {"machine": machine(env.get("JAX_PLATFORMS") != "cpu"), "versions": versions(packages)}
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **env}  # torch's idle threads would spin
    failed = []
    for row in rows:
        if args.only and row.name not in args.only:
            continue
        record = measure(row, args.rounds, environment)
        failed += [row.name for found in record["figures"].values() if found.get("failed")]
        print(text(record), flush=True)
        if not args.toy:
            write(name, [record], head, [one.what for one in rows])
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _one(contestant: Callable[[argparse.Namespace], Json], args: argparse.Namespace) -> Json:
    try:
        return contestant(args)
    except Absent as reason:
        return {"absent": str(reason)}


def measure(row: Row, rounds: int, environment: Mapping[str, str]) -> Json:
    """The record of a row: each round runs every contestant once, as this command with the same arguments."""
    runs: dict[str, list[Json]] = {who: [] for who in row.contestants}
    for turn in range(rounds):
        for who, before in runs.items():
            if before and "absent" in before[-1]:
                continue
            print(f"{row.name}: {who}, round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
            before.append(_child([*sys.argv, "--contestant", f"{row.name}/{who}"], environment))
    found = {who: figures(those) for who, those in runs.items()}
    return {
        "what": row.what,
        "asked": row.asked,
        "rounds": rounds,
        "figures": found,
        "ratio": ratios(found),
    }


def _child(arguments: Sequence[str], environment: Mapping[str, str]) -> Json:
    """The line of JSON that a contestant's process ends with; if it fails, what it says is shown and its end kept."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    print(done.stderr, file=sys.stderr, flush=True)
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return {"absent": said[-1][:200], "failed": True}
