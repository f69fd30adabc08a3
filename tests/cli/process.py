"""Commands of ntjax in processes of their own.

A process is forked from a server that has the imports done but no device opened: what remains of a run of the
tiny model is two seconds. `cold` runs `python -m ntjax.NAME` itself, imports and all.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

TIMED = {"tokens_per_second", "trained_tokens_per_second", "step_time", "eval_runtime"}
PRELOADED = (
    *("ntjax.trainer", "ntjax.pipeline", "ntjax.sampler", "ntjax.inspect", "ntjax.generate"),
    *("transformers.models.llama.configuration_llama", "transformers.tokenization_utils_tokenizers"),
    *("transformers.models.auto.tokenization_auto", "jaxlib.mlir.dialects.mhlo", "ntjax.models.llama"),
    *(f"ntjax.losses.{name}" for name in ("nll", "preference", "reward", "grpo", "ppo")),
    *(f"ntjax.stages.{name}" for name in ("pretrain", "sft", "reward", "dpo", "grpo", "ppo")),
    *("orbax.checkpoint", "datasets", "grain", "safetensors", "rich.progress"),
)
PATIENCE = 120  # seconds

servers = get_context("forkserver")
servers.set_forkserver_preload(list(PRELOADED))


@dataclass(frozen=True)
class Result:
    """How a command ended; -9 is a kill."""

    code: int
    out: str
    err: str


@dataclass
class Running:
    """A command that is under way; what it prints is in two files."""

    process: BaseProcess
    files: tuple[Path, Path]

    def until(self, happened: Callable[[], Any]) -> None:
        """Waits until something is seen to have happened; the command must still be running then."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            assert self.process.is_alive(), f"ended before it happened: {self.wait()}"
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def send(self, number: signal.Signals) -> Result:
        """Sends a signal, and how the command took it."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        return self.wait()

    def wait(self) -> Result:
        """How it ended."""
        self.process.join(PATIENCE)
        if self.process.exitcode is None:
            self.process.kill()
        code = self.process.exitcode
        assert code is not None, f"still running after {PATIENCE} s"
        return Result(code, *(file.read_text() for file in self.files))


def devices(count: int) -> dict[str, str]:
    """The environment of a command that sees so many devices; code is compiled for it as for the tests."""
    several = f"device_count={count}"
    return {"XLA_FLAGS": re.sub(r"device_count=\d+", several, os.environ["XLA_FLAGS"])}


def start(folder: Path, args: tuple[str, ...], env: Mapping[str, str], prints: Path) -> Running:
    """Starts `ntjax ARGS...` in `folder`."""
    files = prints.with_suffix(".out"), prints.with_suffix(".err")
    process = servers.Process(target=_command, args=(folder, args, dict(env), files))
    process.start()
    return Running(process, files)


def _command(folder: Path, args: tuple[str, ...], env: dict[str, str], files: tuple[Path, Path]) -> None:
    """What `python -m ntjax.NAME` does."""
    os.chdir(folder)
    os.environ.update(env)
    for stream, path in enumerate(files, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv = [f"ntjax.{args[0]}", *args[1:]]
    runpy.run_module(f"ntjax.{args[0]}", run_name="__main__", alter_sys=True)


def cold(
    folder: Path, args: tuple[str, ...], env: Mapping[str, str], program: Sequence[str] | None = None
) -> Result:
    """Runs `python -m ntjax.NAME ...`, or `program NAME ...`, in `folder`, from nothing."""
    command = [*program, *args] if program else [sys.executable, "-m", f"ntjax.{args[0]}", *args[1:]]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **env}, capture_output=True, text=True, timeout=PATIENCE
    )
    return Result(done.returncode, done.stdout, done.stderr)


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    """Writes a jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def metrics(stage: Path) -> list[dict[str, Any]]:
    """The lines of a stage's metrics.jsonl, without what the clock says."""
    path = stage / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [{key: value for key, value in json.loads(line).items() if key not in TIMED} for line in lines]


def losses(stage: Path) -> list[float]:
    """The loss of each logging step."""
    return [record["loss"] for record in metrics(stage) if "loss" in record]


def checkpoints(stage: Path) -> list[int]:
    """Steps that are saved in a stage folder."""
    return sorted(
        int(path.name.partition("-")[2]) for path in stage.glob("checkpoint-*") if path.suffix == ""
    )
