"""A run: the stages of a config in order, each from the result of the one before."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntjax import hosts, watchdog
from ntjax.config import Config, refuse_unbuilt, to_toml
from ntjax.errors import ConfigError, InputMissing, Preempted
from ntjax.metrics import require_tracker
from ntjax.runs import Resume, find_resume, is_done, make_latest, new_run, refuse_used, unmark
from ntjax.signals import StopRequest
from ntjax.stages.base import StageConfig

if TYPE_CHECKING:
    from ntjax.prepare import Setup

ADAPTER_CONFIG, ADAPTER_FOLDER = "adapter_config.json", "adapter"
log = logging.getLogger("ntjax")


def run(
    config: Config, *, resume: str | None = None, stages: Sequence[str] = (), allow_changed: bool = False
) -> Path:
    """Runs the config's stages, or those named, and returns the run's folder.

    With `resume` (see `runs.find_resume`) finished stages are skipped and the one that was broken off goes on.
    """
    refuse_unbuilt(config)
    for tracker, asked in {"wandb": config.use_wandb, "trackio": config.use_trackio}.items():
        if asked:
            require_tracker(tracker, config.where(f"use_{tracker}"))
    chosen = chosen_stages(config, stages)
    resolved = to_toml(config)
    hosts.same("program", hosts.program())
    hosts.same("config", resolved)
    where = Resume.read(hosts.of_first(lambda: _found(config, resume)))
    if not where:
        for stage in chosen:
            refuse_used(stage, config.where(f"stages.{config.stages.index(stage)}.output_dir"))
    folder = where.run if where else Path(hosts.of_first(lambda: str(new_run(config))))
    if where and hosts.first():
        make_latest(config, folder)
    _log_to(folder / "train.log")
    for warning in config.warnings:
        log.warning("warning: %s", warning)
    log.info("%s", resolved)
    log.info("run folder: %s", folder)
    if not where and hosts.first():
        (folder / "config.toml").write_text(resolved)
    with StopRequest() as stop:
        _run_stages(config, chosen, folder, where, allow_changed, stop)
    log.info("done: %s", folder)
    return folder


def _found(config: Config, resume: str | None) -> list[Any] | None:
    found = find_resume(config, resume) if resume else None
    return found.written() if found else None


def _run_stages(
    config: Config,
    chosen: Sequence[StageConfig],
    run_folder: Path,
    where: Resume | None,
    allow_changed: bool,
    stop: StopRequest,
) -> None:
    from ntjax.prepare import Job, prepare
    from ntjax.reporting.live import Live
    from ntjax.trainer import train

    names = [stage.stage_name for stage in config.stages]
    named = names.index(where.stage) if where and where.stage else None
    report = Live(run_folder, first=hosts.first())
    for index, stage in enumerate(config.stages):
        folder = stage_folder(config, stage, run_folder)
        if stage not in chosen:
            continue
        watchdog.arm("restore")
        if named is not None and index >= named and hosts.first():
            unmark(folder)  # the stage that was named goes on, and what was made from it is made anew
        if where and hosts.of_first(partial(is_done, folder)):
            log.info("%s is done already", stage.stage_name)
            continue
        start = find_start(config, stage, _source(config, index, run_folder))
        goes_on = where is not None and (named is None or index <= named)
        step = where.step if where and index == named else None
        log.info("%s starts from %s", stage.stage_name, start)
        job = Job(config, stage, start.source, folder, start.base, start.adapter)
        earlier = {s.stage_name: stage_folder(config, s, run_folder) for s in config.stages[:index]}
        job = replace(job, results=earlier)
        setup = prepare(replace(job, resume=goes_on, resume_step=step, allow_changed=allow_changed))
        hosts.same("stage", json.dumps(setup.settings, indent=1, default=str))
        # A resumed run may have other settings of those that are free to change, or allowed to.
        if hosts.first():
            (run_folder / "config.toml").write_text(to_toml(config))
        if stop.requested:
            raise Preempted(
                f"stopped by {stop.requested.name} before {stage.stage_name} began",
                interrupted=stop.requested.name == "SIGINT",
                fix=f"go on with --resume {run_folder}",
            )
        if warning := shortage(setup):
            log.warning("warning: %s", warning)
        report.begin(setup.layout)
        train(setup, stop, report.update)
        report.update(ended=True)


def shortage(setup: Setup) -> str | None:
    """What `ntjax.plan` would say of a stage that is too large for the devices there are, on paper."""
    from ntjax.estimate.target import target

    devices, job = target(None), setup.job
    if devices.memory is None:
        return None
    from ntjax.estimate import paper
    from ntjax.estimate.programs import Programs

    return paper.shortage(Programs(job.config, job.stage, setup.model.hf, setup.layout), devices)


def chosen_stages(config: Config, names: Sequence[str]) -> list[StageConfig]:
    """The stages called `names` (by name or type), all of them by default, in the config's order."""
    known = [
        stage for stage in config.stages if not names or {stage.stage_name, stage.stage_type} & _forms(names)
    ]
    for name in names:
        if not any({stage.stage_name, stage.stage_type} & _forms([name]) for stage in config.stages):
            allowed = ", ".join(stage.stage_name for stage in config.stages)
            raise ConfigError(
                f"there is no stage {name!r}", where="--stages", fix=f"the config has {allowed}"
            )
    return known


def _forms(names: Sequence[str]) -> set[str]:
    return {*names, *(f"{name}_stage" for name in names)}


def stage_folder(config: Config, stage: StageConfig, run_folder: Path) -> Path:
    """Where a stage writes: its `output_dir`, else a folder of its name in the run's."""
    return Path(stage.output_dir) if stage.output_dir else run_folder / stage.stage_name


def _source(config: Config, index: int, run_folder: Path) -> str:
    """What a stage starts from: `load_from` (a folder, a repository or a stage of this run), else the result of the
    nearest earlier stage that has one, else the model."""
    named = config.stages[index].load_from
    folders = [stage_folder(config, config.stages[at], run_folder) for at in _origins(config, index)]
    results = folders if named else [folder for folder in folders if is_done(folder)]
    return str(results[-1]) if results else named or config.model.model_name_or_path


def goes_back_to(config: Config, stage: StageConfig) -> str:
    """The model that a stage starts from before anything is trained: of the stages that it goes on from, the first's
    `load_from`, else the config's model."""
    index = config.stages.index(stage)
    while origins := _origins(config, index):
        index = origins[-1]
    return config.stages[index].load_from or config.model.model_name_or_path


def _origins(config: Config, index: int) -> list[int]:
    """Places of the earlier stages that a stage may go on from: the one that `load_from` names, if any, else all. A
    reward model is no start for what isn't one."""
    stage = config.stages[index]
    names = _forms([stage.load_from]) if stage.load_from else None
    return [
        at
        for at, other in enumerate(config.stages[:index])
        if (other.stage_name in names if names else stage.scores or not other.scores)
    ]


@dataclass(frozen=True)
class Start:
    """Weights, what people and PEFT call them, and the PEFT folder of an adapter on them."""

    source: Path
    base: str
    adapter: Path | None = None

    def __str__(self) -> str:
        if self.adapter is None:
            return str(self.source)
        return f"{self.base} with the adapter in {self.adapter}"


def find_start(config: Config, stage: StageConfig, name: str) -> Start:
    """What the folder or repository `name` means to a stage.

    A stage's folder holds its model with the adapter merged, and the adapter beside it: with LoRA the next stage
    goes on with the adapter, on the base it was trained on, unless PiSSA or `merge_adapter` starts a new one. A folder
    with nothing but an adapter stands for it and its base.
    """
    from ntjax.hf.hub import locate
    from ntjax.hf.peft import read_adapter_config

    def found(name: str) -> tuple[Path, str]:
        folder = locate(name, cache_dir=config.model.cache_dir, folders=[config.path.parent])
        return folder, name if folder.parent.name == "snapshots" else str(folder.resolve())

    source, base = found(name)
    alone = (source / ADAPTER_CONFIG).exists() and not (source / "config.json").exists()
    adapter = source if alone else source / ADAPTER_FOLDER
    pissa = str(config.model.lora_config.init_lora_weights).startswith("pissa")
    afresh = stage.merge_adapter or pissa or not config.model.use_lora
    if not alone and (afresh or not (adapter / ADAPTER_CONFIG).exists()):
        return Start(source, base)
    if alone and afresh and config.model.use_lora:
        raise ConfigError(
            f"{source} is an adapter without its model, so a new one on the merged weights would have no base to name",
            where=config.where(f"stages.{config.stages.index(stage)}.merge_adapter"),
            fix="go on with the adapter: without merge_adapter and PiSSA",
        )
    named = read_adapter_config(adapter)[1]
    if named is None:
        where = str(adapter / ADAPTER_CONFIG)
        raise InputMissing(
            "it doesn't say which model it is for", where=where, fix="write base_model_name_or_path"
        )
    return Start(*found(named), adapter)


def _log_to(path: Path) -> None:
    """What is logged goes to the terminal and to the run's train.log; the log has each step's metrics as well, which
    the terminal shows as progress. Of several processes only the first logs more than warnings."""
    log.setLevel(logging.DEBUG)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    told: list[tuple[logging.Handler, int]] = [(logging.StreamHandler(sys.stdout), logging.INFO)]
    told += [(logging.FileHandler(path), logging.DEBUG)]
    for handler, level in told if hosts.first() else [(logging.StreamHandler(), logging.WARNING)]:
        handler.setLevel(level)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
