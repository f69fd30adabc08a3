"""Rows of which seconds aren't all: what a contestant returns as "note" stands behind its name in the table.

For the rest as `harness.main`, but that every contestant is written down as soon as it is measured, and that there may
be a limit: what isn't begun in time is told and not written.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import record
from harness import Row, figures, ratios

Json = dict[str, Any]
GRACE = 45.0  # seconds after the limit that what has begun is waited for


@dataclass
class Limit:
    """Seconds since the start that a contestant may begin in."""

    began: float
    seconds: float

    @property
    def left(self) -> float:
        """Of them."""
        return self.began + self.seconds - time.monotonic()


def main(
    name: str,
    rows: Sequence[Row],
    parser: argparse.ArgumentParser,
    packages: Sequence[str],
    *,
    rounds: int = 1,
    **env: str,
) -> None:
    """The command `NAME.py`, of `rounds` by default."""
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so many")
    parser.add_argument("--out", type=Path, default=record.FOLDER, help="where NAME/PROCESSOR.json is kept")
    if any(word.startswith("--contestant") for word in sys.argv):
        harness.main(name, rows, parser, packages, **env)
        return
    parser.add_argument("--rounds", type=int, default=rounds)
    known = [row.name for row in rows]
    parser.add_argument("--only", nargs="+", choices=known, metavar="ROW", help="these alone")
    parser.add_argument("--toy", action="store_true", help="tiny shapes; nothing is written")
    args = parser.parse_args()
    record.FOLDER, limit = args.out, Limit(time.monotonic(), args.seconds)
    head = {"command": f"python scripts/bench/{name}.py", "date": f"{datetime.date.today()}"}
    head |= {
        "machine": record.machine(env.get("JAX_PLATFORMS") != "cpu"),
        "versions": record.versions(packages),
    }
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **env}  # as harness.main
    failed = []
    for row in rows:
        if args.only and row.name not in args.only:
            continue
        if limit.left <= 0:
            print(f"not run, for want of time: {row.name}", flush=True)
            continue
        for known_yet in measure(row, args.rounds, environment, limit):
            if not args.toy:
                record.write(name, [known_yet], head, [one.what for one in rows])
        print(record.text(known_yet), flush=True)
        failed += [row.name for found in known_yet["figures"].values() if found.get("failed")]
    if failed:
        print(f"failed: {', '.join(failed)}", flush=True)
        sys.exit(
            1 if args.toy else 0
        )  # on real shapes a failure is a figure: it doesn't fit, or isn't installed


def measure(row: Row, rounds: int, environment: Mapping[str, str], limit: Limit) -> Any:
    """The record of a row after each contestant of each round."""
    runs: dict[str, list[Json]] = {who: [] for who in row.contestants}
    for turn in range(rounds):
        for who, before in runs.items():
            if before and "absent" in before[-1]:
                continue
            print(f"{row.name}: {who}, round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
            before.append(_child(row.name, who, environment, limit))
            measured = {who: those for who, those in runs.items() if those}
            yield _record(row, turn + 1, measured)


def _record(row: Row, rounds: int, runs: Mapping[str, list[Json]]) -> Json:
    found = {who: figures(those) for who, those in runs.items()}
    ratio, names = ratios(found), {who: _named(who, those[-1]) for who, those in runs.items()}
    return {
        "what": row.what,
        "asked": row.asked,
        "rounds": rounds,
        "figures": {names[who]: one for who, one in found.items()},
        "ratio": {names[who]: times for who, times in ratio.items()},
    }


def _named(who: str, run: Json) -> str:
    return f"{who}: {run['note']}" if run.get("note") else who


def _child(row: str, who: str, environment: Mapping[str, str], limit: Limit) -> Json:
    """What the contestant's process prints last, or the error that it ends with."""
    if limit.left <= 0:
        return {"absent": "not run, for want of time"}
    command = [sys.executable, *sys.argv, "--contestant", f"{row}/{who}"]
    wait = None if limit.seconds == float("inf") else limit.left + GRACE
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=wait)
    except subprocess.TimeoutExpired:
        return {"absent": f"stopped {GRACE:.0f} s after the limit", "failed": True}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    print(done.stderr[-4000:], file=sys.stderr, flush=True)
    return {"absent": _reason(done.stderr) or f"exit code {done.returncode}", "failed": True}


def _reason(said: str) -> str:
    """The first line of the last error in it."""
    lines = said.strip().splitlines()
    errors = [line for line in lines if line and not line[0].isspace() and "Error" in line.split(":")[0]]
    with suppress(IndexError):
        return [*lines[-1:], *errors][-1][:200].replace("|", "/")
    return ""
