"""Where the metrics of a stage go: its folder, TensorBoard, Weights & Biases, Trackio."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ntjax import hosts
from ntjax.metrics import MetricsLog, Tracked
from ntjax.prepare import Job


def open_log(job: Job) -> MetricsLog:
    """The log of the stage; of several processes only the first has one that keeps anything."""
    if not hosts.first():
        return MetricsLog(None)
    config, tracked = job.config, _tracked(job)
    wandb, trackio = (tracked if asked else None for asked in (config.use_wandb, config.use_trackio))
    return MetricsLog(job.folder, tensorboard=_tensorboard(job), wandb=wandb, trackio=trackio)


def _tensorboard(job: Job) -> Path | None:
    config = job.config
    if not config.use_tensorboard:
        return None
    return (
        Path(config.logging_dir) / job.stage.stage_name if config.logging_dir else job.folder / "tensorboard"
    )


def _tracked(job: Job) -> Tracked:
    config, run = job.config, job.folder.parent.name
    return Tracked(
        project=config.wandb_project or "ntjax",
        entity=config.wandb_entity,
        name=f"{config.task_name}/{run}/{job.stage.stage_name}",
        run_id=f"{config.task_name}-{run}-{job.stage.stage_name}",
        config=asdict(job.stage),
    )
