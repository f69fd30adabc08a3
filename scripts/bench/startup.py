"""From the command to the end of SmolLM2-135M's first step, on a CPU: the table `startup` of docs/benchmarks.md.

    python scripts/bench/startup.py [--rounds N] [--only ROW ...] [--toy]

`python -X importtime -m ntjax.train --config configs/sft_smollm2.toml` with max_steps = 1 and without evaluation. Its
log says when a part was over; imports and compiling, which fall into several parts, are told as Python and JAX count
them. Compiled programs are kept in a folder that is empty at first; warm is a second run.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import noted
from cpu import model_of
from harness import Row, measured

ROOT = Path(__file__).parents[2]
SETTINGS = (
    "stages.sft.max_steps=1 stages.sft.eval_strategy=no stages.sft.do_eval=false stages.sft.save_strategy=no"
)
# What a line of the log ends.
ENDS = {
    "config": re.compile(r"^run folder: "),
    "data": re.compile(r"^sft_stage: \d+ examples"),
    "weights": re.compile(r"^sft_stage: trained are "),
}
STEP = "first step"
COMPILED = re.compile(r"Finished (?:tracing|jaxpr to MLIR|XLA compilation).* in ([\d.e-]+) sec")
IMPORTED = re.compile(
    r"^import time: +(\d+) \| +\d+ \| +(\w+)"
)  # microseconds of a module alone, its package


class Parts(NamedTuple):
    """Seconds of the parts of a run in order, of importing each package, and of compiling."""

    parts: dict[str, float]
    imports: Counter[str]
    compiling: float

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self.parts.items())
        most = ", ".join(f"{package} {seconds:.1f}" for package, seconds in self.imports.most_common(3))
        return f"{parts}; of these importing {self.imports.total():.1f} s ({most}), compiling {self.compiling:.1f} s"


def run(args: argparse.Namespace, cache: Path) -> Parts:
    """One run."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-X", "importtime", "-m", "ntjax.train", *SETTINGS.split()]
        command += ["--config", "configs/sft_smollm2.toml", f"base_output_dir={out}"]
        command += [f"model.model_name_or_path={model_of(args).resolve()}"]
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_LOG_COMPILES": "1"}
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        began = time.time()
        with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
            said: list[tuple[float, str]] = []
            told = threading.Thread(target=lambda: said.extend((time.time(), x) for x in process.stderr))
            told.start()
            at: dict[str, float] = {}
            for line in process.stdout:
                at |= {part: time.time() for part, end in ENDS.items() if end.match(line) and part not in at}
            told.join()
        if process.returncode:
            raise RuntimeError("".join(line for _, line in said if not IMPORTED.match(line))[-2000:])
        (metrics,) = Path(out).rglob(
            "metrics.jsonl"
        )  # of one line, written when the step's metrics are there
        at[STEP] = metrics.stat().st_mtime
    ends = [began, *at.values()]
    parts = {part: end - before for part, end, before in zip(at, ends[1:], ends, strict=False)}
    imports: Counter[str] = Counter()
    for when, line in said:
        if (found := IMPORTED.match(line)) and when <= at[STEP]:
            imports[found[2]] += int(found[1]) / 1e6  # type: ignore[assignment]
    compiling = [COMPILED.search(line) for when, line in said if at["weights"] < when <= at[STEP]]
    return Parts(parts, imports, sum(float(match[1]) for match in compiling if match))


def start(args: argparse.Namespace, *, warm: bool) -> dict[str, Any]:
    """A run with an empty cache; `warm`, the one after it."""
    with tempfile.TemporaryDirectory() as cache:
        if warm:
            run(args, Path(cache))
        before = used()
        found = run(args, Path(cache))
    whole, peak = sum(found.parts.values()), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return measured([whole], [used() - before], first_s=whole, note=str(found), peak_gb=peak * 1024 / 1e9)


def used() -> float:
    """CPU seconds of the runs so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


WHAT = "start of the command to the end of the first step"
ROWS = [
    Row("warm", f"{WHAT}, programs compiled before", {"ntjax": partial(start, warm=True)}, "15 s"),
    Row("cold", f"{WHAT}, nothing compiled before", {"ntjax": partial(start, warm=False)}),
]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "smollm2-135m-instruct")
    noted.main("startup", ROWS, parser, ("jax", "flax", "transformers"), rounds=2, JAX_PLATFORMS="cpu")
