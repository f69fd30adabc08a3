"""What a checkpoint folder says of itself, read without jax.

`checkpoint-500/record/metadata` is JSON: what the run stored with the state (`meta`), a `metric`, the dtype,
shape and digest of each leaf, and a checksum over all of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ntjax.errors import CheckpointError

Best = Literal["min", "max"]


class DamageError(Exception):
    """A checkpoint isn't what was written."""


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is."""
    return folder / f"checkpoint-{step}"


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    names = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(name[1]) for name in names if name)


def read_meta(folder: Path, step: int) -> dict[str, Any]:
    """What the run stored with the state at `step`; raises `CheckpointError` if it can't be read."""
    try:
        return read_record(folder, step)["meta"]
    except DamageError as error:
        where = str(checkpoint_folder(folder, step))
        raise CheckpointError(str(error), where=where, fix="resume from an older checkpoint") from error


def saved_metrics(folder: Path) -> dict[int, float | None]:
    """The metric of each complete checkpoint; None where it has none or can't be read."""
    metrics: dict[int, float | None] = {}
    for step in saved_steps(folder):
        try:
            metrics[step] = read_record(folder, step)["metric"]
        except DamageError:
            metrics[step] = None
    return metrics


def better(metric: str, greater: bool | None) -> Best:
    """Whether the best value of a metric is its lowest or its highest, where `greater` doesn't say: losses are low."""
    if greater is None:
        greater = not metric.endswith(("loss", "perplexity"))
    return "max" if greater else "min"


def best_step(metrics: Mapping[int, float | None], mode: Best | None) -> int | None:
    """The earliest step with the lowest ("min") or highest ("max") finite metric."""
    finite = {step: value for step, value in metrics.items() if value is not None and math.isfinite(value)}
    if mode is None or not finite:
        return None
    sign = 1 if mode == "min" else -1
    return min(finite, key=lambda step: (sign * finite[step], step))


def retained(metrics: Mapping[int, float | None], keep: int | None, mode: Best | None) -> set[int]:
    """Steps to keep: the latest `keep` of them, from which a run resumes, and the best."""
    if keep is None:
        return set(metrics)
    best = best_step(metrics, mode)
    return set(sorted(metrics)[-keep:]) | (set() if best is None else {best})


def new_record(
    meta: Mapping[str, Any], metric: float | None, leaves: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """A record complete with its checksum; a metric that isn't finite is none."""
    body = {
        "meta": dict(meta),
        "metric": metric if metric is not None and math.isfinite(metric) else None,
        "leaves": dict(leaves),
    }
    body = json.loads(json.dumps(body))  # as it will be read: no tuples, string keys
    return {**body, "sha256": _checksum(body)}


def read_record(folder: Path, step: int) -> dict[str, Any]:
    """The record of `step`; raises `DamageError` unless it is exactly what was written."""
    path = checkpoint_folder(folder, step) / "record" / "metadata"
    try:
        record = json.loads(path.read_bytes())
        checksum = record.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamageError(f"{path.relative_to(folder)} can't be read ({error})") from error
    if checksum != _checksum(record):
        raise DamageError(f"{path.relative_to(folder)} is not what was written: its checksum differs")
    return record


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
