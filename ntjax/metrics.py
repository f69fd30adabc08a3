"""Metrics are sums with counts, and a run's log of them is `metrics.jsonl`.

Means add; averages of averages do not. A step returns `Metrics`, a `Window` adds them up between logging
steps, and a `MetricsLog` writes the quotients, one JSON object a logging step, to TensorBoard, W&B and Trackio too.
A log that can't be written is warned about once and never ends a run.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
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
WANDB, TRACKIO = "Weights & Biases", "Trackio"
log = logging.getLogger(__name__)
_LOST = "%s can't be written, training goes on: %s: %s"


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
    """What happened since the last logging step, in float64 on the host; `num_tokens` since the stage began.

    A checkpoint keeps `state()`, so a run resumed within a window logs the very means it would have logged;
    speeds are of the steps this process has done.
    """

    sums: Metrics = field(default_factory=dict)
    num_tokens: int = 0
    timed: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("steps", "tokens", "trained"), 0))

    def add(self, metrics: Mapping[str, Mean], tokens: int, trained: float | None = None) -> None:
        """Adds a step that read `tokens` tokens, `trained` of them with a loss (default: its weight)."""
        self.sums = add(self.sums, {key: Mean(float(m.total), float(m.weight)) for key, m in metrics.items()})
        self.num_tokens += tokens
        self.timed["steps"] += 1
        self.timed["tokens"] += tokens
        self.timed["trained"] += float(metrics["loss"].weight) if trained is None else trained

    def finish(self, seconds: float) -> dict[str, float]:
        """The record of the window, which took `seconds`; the next one begins."""
        record = {
            **finish(self.sums),
            "num_tokens": self.num_tokens,
            "tokens_per_second": self.timed["tokens"] / seconds,
            "trained_tokens_per_second": self.timed["trained"] / seconds,
            "step_time": seconds / max(self.timed["steps"], 1),
        }
        self.sums, self.timed = {}, dict.fromkeys(self.timed, 0)
        return record

    def state(self) -> dict[str, Any]:
        """Plain JSON from which `from_state` makes an equal window."""
        return {"sums": {key: list(mean) for key, mean in self.sums.items()}, "num_tokens": self.num_tokens}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Window:
        """The window that `state()` described."""
        return cls({key: Mean(*mean) for key, mean in state["sums"].items()}, state["num_tokens"])


@dataclass(frozen=True)
class Tracked:
    """As what a tracker knows a stage; a resumed run goes on under its `run_id` on W&B, under its `name` in Trackio."""

    project: str
    entity: str | None = None
    name: str | None = None
    run_id: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


class MetricsLog:
    """The log of a stage; one that goes on from a checkpoint is rewound to it before it is written to. Without a folder
    nothing is kept."""

    def __init__(
        self,
        folder: Path | None,
        *,
        tensorboard: Path | None = None,
        wandb: Tracked | None = None,
        trackio: Tracked | None = None,
    ):
        self.folder, self.tensorboard = folder, tensorboard
        self._start = 0
        self._tensorboard: Any = None  # opened by the first write
        self._runs: dict[str, Any] = {}  # of trackers; None is one that can't be reached
        if folder and wandb:
            self._runs[WANDB] = _start_wandb(wandb, folder)
        if folder and trackio:
            self._runs[TRACKIO] = _start_trackio(trackio)
        self._warned: set[str] = set()
        if folder:
            folder.mkdir(parents=True, exist_ok=True)

    def rewind(self, step: int) -> None:
        """Drops what was logged after `step`: a resumed run then has the log of one that never stopped."""
        if self.folder:
            rewind(self.folder, step)
        self._start = step

    def write(self, record: Mapping[str, float | int]) -> None:
        """Logs one record; it has a `step`. Values that aren't finite are null in JSON, which has no NaN."""
        ordered = {key: record[key] for key in FIRST_KEYS if key in record} | dict(record)
        sinks: dict[str, Callable[[dict[str, Any]], None]]
        sinks = {LOG_NAME: self._append, "TensorBoard": self._to_tensorboard}
        sinks |= {name: partial(SENT[name], run) for name, run in self._runs.items() if run is not None}
        for name, sink in sinks.items():
            try:
                sink(ordered)
            except Exception as error:  # a lost log line never ends a run
                if name not in self._warned:
                    log.warning(_LOST, name, type(error).__name__, error)
                self._warned.add(name)

    def close(self) -> None:
        """Flushes and closes TensorBoard's and the trackers'."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        for run in self._runs.values():
            if run is not None:
                run.finish()

    def _append(self, record: dict[str, Any]) -> None:
        if self.folder is None:
            return
        finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
        _append(self.folder / LOG_NAME, json.dumps(finite, allow_nan=False) + "\n")

    def _to_tensorboard(self, record: dict[str, Any]) -> None:
        if self.tensorboard is None:
            return
        if self._tensorboard is None:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.tensorboard), purge_step=self._start + 1)
        for tag, value in tags(record).items():
            self._tensorboard.add_scalar(tag, value, record["step"])
        self._tensorboard.flush()


def require_tracker(name: str, where: str | None = None) -> None:
    """Raises `ConfigError` at the setting's place `where` unless the package `name`, wandb or trackio, is installed."""
    try:
        import_module(name)
    except ImportError as error:
        fix = f'pip install "ntjax[{name}]"'
        raise ConfigError(f"use_{name} is true, but {name} is not installed", where=where, fix=fix) from error


def _start_wandb(settings: Tracked, folder: Path) -> Any:
    """A run on W&B, or None with a warning if it can't be reached."""
    require_tracker("wandb")
    import wandb

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
        fix = "run `wandb login`, or set WANDB_MODE=offline"
        raise ConfigError(f"wandb refuses: {error}", fix=fix) from error
    except Exception as error:  # the network, their servers
        log.warning(_LOST, WANDB, type(error).__name__, error)
        return None
    run.define_metric("train/global_step")
    run.define_metric("*", step_metric="train/global_step", step_sync=True)
    return run


def _start_trackio(settings: Tracked) -> Any:
    """A run of Trackio, kept on this machine unless its TRACKIO_SPACE_ID says otherwise, or None with a warning."""
    require_tracker("trackio")
    import trackio

    try:
        return trackio.init(
            project=settings.project,
            name=settings.name,
            config=dict(settings.config),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
        )
    except Exception as error:  # the disk, the network
        log.warning(_LOST, TRACKIO, type(error).__name__, error)
        return None


# A step given to W&B must not go back, as it does where a run is resumed: there it is a metric like the others.
SENT: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    WANDB: lambda run, record: run.log({**tags(record), "train/global_step": record["step"]}),
    TRACKIO: lambda run, record: run.log(tags(record), step=record["step"]),
}


def tags(record: Mapping[str, float]) -> dict[str, float]:
    """The record under the names dashboards group by: `train/loss`, `eval/loss` for `eval_loss`."""
    named = {}
    for key, value in record.items():
        if key != "step":
            named[f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"] = value
    return named


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Adds JSON lines to a file; what isn't JSON is written as its text, what can't be written is warned about."""
    text = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
    try:
        _append(path, text)
    except OSError as error:
        log.warning(_LOST, path.name, type(error).__name__, error)


def _append(path: Path, text: str) -> None:
    """Adds lines to a file, all of them or, where the disk is full, none: half a line would spoil the next."""
    lines = text.encode()
    with path.open("ab", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        try:
            if file.write(lines) != len(lines):
                raise OSError("the line was cut short")
        except OSError:
            file.truncate(end)
            raise


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a stage folder; a last line cut short by a kill is left out."""
    path = folder / LOG_NAME
    return [json.loads(line) for line in _whole_lines(path)] if path.exists() else []


def rewind(folder: Path, step: int, name: str = LOG_NAME) -> None:
    """Drops the lines after `step` from a log of JSON lines, and a last line cut short."""
    path = folder / name
    if not path.exists():
        return
    kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
    rewritten = path.with_name(f".{name}.rewound")
    rewritten.write_bytes(b"".join(kept))
    rewritten.replace(path)


def _whole_lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
