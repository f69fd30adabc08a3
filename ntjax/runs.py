"""Run folders: where a run writes, how a finished stage is told from a broken one, where a resumed run goes on.

{base_output_dir}/{task_name}/{YYYYmmdd_HHMMSS}/{stage}_stage/checkpoint-N
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ntjax.checkpoint import saved_steps
from ntjax.config import Config
from ntjax.errors import ConfigError, InputMissing
from ntjax.metrics import LOG_NAME
from ntjax.stages.base import StageConfig

DONE = "stage.json"  # written last, so its presence says that the stage's folder is whole


@dataclass(frozen=True)
class Resume:
    """Where to go on: a run folder, and, if a stage or a checkpoint was named, which."""

    run: Path
    stage: str | None = None
    step: int | None = None

    def written(self) -> list[Any]:
        """As JSON, for `read`."""
        return [str(self.run), self.stage, self.step]

    @staticmethod
    def read(written: list[Any] | None) -> Resume | None:
        """What `written` wrote."""
        return Resume(Path(written[0]), *written[1:]) if written else None


def new_run(config: Config) -> Path:
    """A fresh run folder, with {task_name}/latest pointing at it."""
    task = _task(config)
    stamp = time.strftime("%Y%m%d_%H%M%S")
    run = task / stamp
    for attempt in range(1, 100):
        if not run.exists():
            break
        run = task / f"{stamp}_{attempt}"
    try:
        run.mkdir(parents=True)
        _point_to(run)
    except OSError as error:
        raise ConfigError(
            f"base_output_dir = {config.base_output_dir}: the run's folder can't be made: {error}",
            where=config.where("base_output_dir"),
            fix="name a folder that can be written, here or with --output-dir",
        ) from error
    return run


def make_latest(config: Config, run: Path) -> None:
    """{task_name}/latest is this run, begun before, if it is one of the task's."""
    if run.parent == _task(config).resolve():
        _point_to(run)


def begun_since(config: Config, moment: float) -> bool:
    """Whether a run of the task was begun or gone on with since a moment, in seconds since 1970; file systems may have
    clocks of their own."""
    latest = _task(config) / "latest"
    return latest.is_symlink() and latest.lstat().st_mtime > moment - 60


def _task(config: Config) -> Path:
    return Path(str(config.base_output_dir)) / config.task_name


def _point_to(run: Path) -> None:
    link = run.parent / f".latest.{os.getpid()}"
    link.symlink_to(run.name)
    link.replace(run.parent / "latest")


def refuse_used(stage: StageConfig, where: str) -> None:
    """A new run's stage doesn't write into what another left in its `output_dir`: `ConfigError` at `where`."""
    folder = Path(stage.output_dir) if stage.output_dir else None
    if folder and (saved_steps(folder) or is_done(folder) or (folder / LOG_NAME).exists()):
        raise ConfigError(
            f"output_dir = {folder}: another run of a stage is in there",
            where=where,
            fix="go on with that run by --resume, or name another folder",
        )


def find_resume(config: Config, wanted: str) -> Resume | None:
    """What `--resume wanted` means: a run, stage or checkpoint folder, or "auto": this task's latest run, if any."""
    latest = _task(config) / "latest"
    if wanted == "auto":
        return Resume(latest.resolve()) if latest.exists() else None
    folder = Path(wanted).resolve()
    if not folder.is_dir():
        raise InputMissing(
            f"there is no folder {wanted} to resume from", fix="name a run, a stage or a checkpoint-N"
        )
    checkpoint = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    if checkpoint:
        step = int(checkpoint[1])
        if step not in saved_steps(folder.parent):
            raise InputMissing(f"{wanted} isn't a whole checkpoint", fix=_offer(folder.parent))
        of = _stage_in(folder.parent, config, latest)
        if of is None:
            raise InputMissing(
                f"{wanted}: no stage of this config is called {folder.parent.name!r}",
                fix="resume with the config it was made by",
            )
        return replace(of, step=step)
    if (of := _stage_in(folder, config, latest)) is not None:
        return of
    if not (folder / "config.toml").exists():
        raise InputMissing(
            f"{wanted} is not a run, and no stage of this config is called {folder.name!r}",
            fix="name a run folder (the one with config.toml), a stage folder in it, or a checkpoint-N",
        )
    return Resume(folder)


def _stage_in(folder: Path, config: Config, latest: Path) -> Resume | None:
    """The stage that writes to a folder, if any: its own `output_dir`, the latest run's as no later one may
    write there; else a folder of its name in a run's."""
    own = {Path(s.output_dir).resolve(): s.stage_name for s in config.stages if s.output_dir}
    if folder in own and latest.exists():
        return Resume(latest.resolve(), own[folder])
    return (
        Resume(folder.parent, folder.name) if folder.name in {s.stage_name for s in config.stages} else None
    )


def _offer(folder: Path) -> str:
    steps = saved_steps(folder)
    return (
        f"{folder} has {', '.join(f'checkpoint-{step}' for step in steps)}" if steps else f"{folder} has none"
    )


def is_done(folder: Path) -> bool:
    """Whether the stage that writes to `folder` ended."""
    return (folder / DONE).exists()


def mark_done(folder: Path, summary: dict[str, Any]) -> None:
    """Says that the stage's folder is whole."""
    part = folder / (DONE + ".part")
    part.write_text(json.dumps(summary, indent=1) + "\n")
    part.replace(folder / DONE)


def unmark(folder: Path) -> None:
    """Forgets that the stage ended: it is being continued from an earlier checkpoint."""
    (folder / DONE).unlink(missing_ok=True)


def check_unchanged(saved: dict[str, Any], now: dict[str, Any], *, allowed: bool) -> None:
    """A resumed stage must be the stage that was started: `ConfigError` listing what differs, unless `allowed`."""
    changed = [
        f"{key}: {saved.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
    ]
    if changed and not allowed:
        raise ConfigError(
            "this stage was started with other settings: " + "; ".join(changed),
            fix="resume with the settings it had, or pass --allow-changed to go on with these",
        )
