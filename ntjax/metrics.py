"""Metrics are sums with counts, and a run's log of them is `metrics.jsonl`.

Means add; averages of averages do not. A step returns `Metrics`, a `Window` adds them up between logging
steps, and a `MetricsLog` writes the quotients, one JSON object a logging step, to TensorBoard and W&B too.
A log that can't be written is warned about once and never ends a run.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ntjax.errors import ConfigError

LOG_NAME = "metrics.jsonl"
FIRST_KEYS = (
    "step",
    "epoch",
    "loss",
    "grad_norm",
    "learning_rate",
    "num_tokens",
    "tokens_per_second",
    "trained_tokens_per_second",
    "step_time",
)
log = logging.getLogger(__name__)


class Mean(NamedTuple):
    """A sum and the number of things summed: floats, or scalar jax arrays inside a step."""

    total: Any
    weight: Any


Metrics = dict[str, Mean]


def add(a: Mapping[str, Mean], b: Mapping[str, Mean]) -> Metrics:
    """The metrics of both together; a key may be in one only."""
    both = {key: Mean(a[key].total + b[key].total, a[key].weight + b[key].weight) for key in a if key in b}
    return {**a, **b, **both}


def finish(metrics: Mapping[str, Mean]) -> dict[str, float]:
    """The means; a metric of nothing (weight 0) is left out."""
    return {
        key: float(total) / float(weight) for key, (total, weight) in metrics.items() if float(weight) != 0
    }


@dataclass
class Window:
    """The metrics since the last logging step and the totals since the stage began, in float64 on the host.

    A checkpoint keeps `state()`, so a run resumed within a window logs the very numbers it would have logged.
    """

    sums: Metrics = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, Mean], totals: Mapping[str, float] | None = None) -> None:
        """Adds a step's metrics, and its share of running totals such as `num_tokens`."""
        self.sums = add(self.sums, {key: Mean(float(m.total), float(m.weight)) for key, m in metrics.items()})
        for key, value in (totals or {}).items():
            self.totals[key] = self.totals.get(key, 0) + value

    def finish(self) -> dict[str, float]:
        """The means of the window and the totals so far; the next window begins."""
        record = {**finish(self.sums), **self.totals}
        self.sums = {}
        return record

    def state(self) -> dict[str, Any]:
        """Plain JSON from which `from_state` makes an equal window."""
        return {"sums": {key: list(mean) for key, mean in self.sums.items()}, "totals": dict(self.totals)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Window:
        """The window that `state()` described."""
        return cls({key: Mean(*mean) for key, mean in state["sums"].items()}, dict(state["totals"]))


@dataclass(frozen=True)
class WandbSettings:
    """Where on Weights & Biases a stage is logged; a resumed run goes on under the same `run_id`."""

    project: str
    entity: str | None = None
    name: str | None = None
    run_id: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


class MetricsLog:
    """The log of a stage from step `start` on; what an earlier process logged after it is dropped."""

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: Path | None = None,
        wandb: WandbSettings | None = None,
        start: int = 0,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        rewind(folder, start)
        self._sinks: dict[str, Callable[[dict[str, Any]], None]] = {LOG_NAME: self._append}
        self._closers: list[Callable[[], None]] = []
        self._warned: set[str] = set()
        if wandb is not None:
            self._open_wandb(wandb, folder)
        if tensorboard is not None:
            self._open_tensorboard(tensorboard, start)
        self._file = (folder / LOG_NAME).open("ab", buffering=0)

    def write(self, record: Mapping[str, float | int]) -> None:
        """Logs one record; it has a `step`. Values that aren't finite are null in JSON, which has no NaN."""
        ordered = {key: record[key] for key in FIRST_KEYS if key in record} | dict(record)
        for name, sink in self._sinks.items():
            try:
                sink(ordered)
            except Exception as error:  # a lost log line never ends a run
                self._warn(name, error)

    def close(self) -> None:
        """Flushes and closes all of them."""
        self._file.close()
        for close in self._closers:
            close()

    def _warn(self, name: str, error: Exception) -> None:
        if name not in self._warned:
            log.warning("%s can't be written, training goes on: %s: %s", name, type(error).__name__, error)
        self._warned.add(name)

    def _append(self, record: dict[str, Any]) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
        line = json.dumps(finite, allow_nan=False).encode() + b"\n"
        end = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError("the line was cut short")
        except OSError:
            self._file.truncate(end)
            raise

    def _open_tensorboard(self, folder: Path, start: int) -> None:
        from tensorboardX import SummaryWriter

        writer = SummaryWriter(str(folder), purge_step=start + 1)

        def write(record: dict[str, Any]) -> None:
            for tag, value in tags(record).items():
                writer.add_scalar(tag, value, record["step"])
            writer.flush()

        self._sinks["TensorBoard"] = write
        self._closers.append(writer.close)

    def _open_wandb(self, settings: WandbSettings, folder: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "use_wandb is true, but wandb is not installed", fix='pip install "ntjax[wandb]"'
            ) from error
        try:
            run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=settings.name,
                id=settings.run_id,
                config=dict(settings.config),
                dir=str(folder),
                resume="allow",
            )
        except wandb.errors.UsageError as error:
            raise ConfigError(
                f"wandb refuses: {error}", fix="run `wandb login`, or set WANDB_MODE=offline"
            ) from error
        except Exception as error:  # the network, their servers
            self._warn("Weights & Biases", error)
            return
        run.define_metric("train/global_step")
        run.define_metric("*", step_metric="train/global_step", step_sync=True)
        self._sinks["Weights & Biases"] = lambda r: run.log({**tags(r), "train/global_step": r["step"]})
        self._closers.append(run.finish)


def tags(record: Mapping[str, float]) -> dict[str, float]:
    """The record under the names dashboards group by: `train/loss`, `eval/loss` for `eval_loss`."""
    named = {}
    for key, value in record.items():
        if key != "step":
            named[f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"] = value
    return named


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a stage folder; a last line cut short by a kill is left out."""
    path = folder / LOG_NAME
    return [json.loads(line) for line in _whole_lines(path)] if path.exists() else []


def rewind(folder: Path, step: int, name: str = LOG_NAME) -> None:
    """Drops the lines after `step`, so that the log of a resumed run is that of one that never stopped."""
    path = folder / name
    if not path.exists():
        return
    kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
    rewritten = path.with_name(f".{name}.rewound")
    rewritten.write_bytes(b"".join(kept))
    rewritten.replace(path)


def _whole_lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
