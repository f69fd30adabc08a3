"""Trains one stage: from a model folder to a model folder.

The loop never waits for the device: a step's metrics are fetched while the next step runs.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ntjax.checkpoint import Checkpoints
from ntjax.data.loader import Plan, batches
from ntjax.errors import ConfigError, Diverged, Preempted
from ntjax.hf.folder import load_params, save_params
from ntjax.hf.tokenizer import pad_id, save_generation_config, save_tokenizer
from ntjax.mesh import place_batch, replicated
from ntjax.metrics import Metrics, MetricsLog, WandbSettings, Window, add, finish, read_metrics
from ntjax.optim import direction, schedule
from ntjax.params import Params
from ntjax.prepare import Data, Job, Setup
from ntjax.progress import Progress
from ntjax.runs import mark_done
from ntjax.signals import StopRequest
from ntjax.stages.base import StageConfig
from ntjax.step import TrainState, eval_step, initial_state, train_step

MAX_SKIPPED = 5  # non-finite steps in a row before the run is called diverged
log = logging.getLogger(__name__)


def train(setup: Setup, stop: StopRequest) -> None:
    """Trains the stage to its end and leaves a Hugging Face folder, or saves and raises `Preempted` on a signal."""
    job, stage = setup.job, setup.job.stage
    job.folder.mkdir(parents=True, exist_ok=True)
    place = replicated(setup.mesh)
    specs, dtype = setup.model.specs, job.config.model.param_dtype
    params = load_params(job.source, specs, dtype=dtype, sharding=lambda path: place)
    # All of it as the step gives it back: else the second step would be compiled anew.
    state = jax.device_put(initial_state(params, direction(stage, specs)), place)
    checkpoints = Checkpoints(job.folder, keep=stage.save_total_limit, best=best_mode(stage))
    loop = Loop(setup, state, checkpoints)
    try:
        if job.resume and checkpoints.latest() is not None:
            loop.restore()
        else:
            checkpoints.discard_after(-1)
            loop.log.rewind(0)
        loop.run(stop)
    finally:
        checkpoints.close()
        loop.log.close()
    export(setup, loop.best_params())
    mark_done(job.folder, {"steps": setup.train.plan.steps, "last": loop.last_record})


def best_mode(stage: StageConfig) -> Any:
    """Whether the best checkpoint is the one with the lowest or the highest metric; None without evaluation."""
    if not stage.do_eval:
        return None
    higher = stage.greater_is_better
    if higher is None:
        higher = not (stage.metric_for_best_model or "loss").endswith(("loss", "perplexity"))
    return "max" if higher else "min"


class Loop:
    """The loop over a stage's steps: what it counts, when it logs, evaluates and saves.

    `pending` is the step whose metrics are still on the device.
    """

    def __init__(self, setup: Setup, state: TrainState, checkpoints: Checkpoints):
        job, self.stage, self.plan = setup.job, setup.job.stage, setup.train.plan
        loss = self.stage.loss(setup.model)
        optimizer = direction(self.stage, setup.model.specs)
        step = train_step(loss, optimizer, schedule(self.stage, self.plan.steps), self.stage.max_grad_norm)
        self.setup, self.state, self.checkpoints = setup, state, checkpoints
        self.step = jax.jit(step, donate_argnums=0)
        self.evaluate_batch = jax.jit(eval_step(loss))
        self.log = MetricsLog(job.folder, tensorboard=_tensorboard(job), wandb=_wandb(job))
        self.progress = Progress(self.stage.stage_name, self.plan.steps)
        self.window = Window()
        self.done = 0  # steps dispatched
        self.pending: tuple[int, Metrics] | None = None
        self.skipped = 0  # non-finite steps in a row
        self.last_record: dict[str, Any] = {}
        self.last_metric: float | None = None
        self.clock = time.perf_counter()

    def restore(self) -> None:
        """Goes on from the job's checkpoint, the newest intact one if none is named."""
        job = self.setup.job
        self.done, self.state, meta = self.checkpoints.restore(_abstract(self.state), job.resume_step)
        self.checkpoints.discard_after(self.done)
        self.window = Window.from_state(meta["window"])
        self.last_metric, self.skipped = meta["metric"], meta["skipped"]
        self.log.rewind(self.done)
        self.last_record = (read_metrics(job.folder) or [{}])[-1]
        self.progress = Progress(self.stage.stage_name, self.plan.steps, start=self.done)
        log.info("%s: resuming at step %d of %d", self.stage.stage_name, self.done, self.plan.steps)

    def run(self, stop: StopRequest) -> None:
        """Runs the steps that are left."""
        stage, plan, mesh = self.stage, self.plan, self.setup.mesh
        rows = _batches(self.setup.train, self.setup.tokenizer, start=self.done)
        steps_left = self.done < plan.steps
        self.clock = time.perf_counter()
        with self.progress:
            for batch in rows:
                self.state, metrics = self.step(self.state, {}, place_batch(batch, mesh))
                self.collect()
                self.done += 1
                self.pending = self.done, metrics
                if self.setup.evaluation and due(stage.eval_strategy, stage.eval_steps, self.done, plan):
                    self.evaluate()
                if self.done < plan.steps and due(stage.save_strategy, stage.save_steps, self.done, plan):
                    self.save()  # the last one is saved with its evaluation, below
                if stop.requested and self.done < plan.steps:
                    self.preempt(stop.requested.name)
            self.collect()
            if self.setup.evaluation and stage.eval_strategy == "no" and steps_left:
                self.evaluate()
            if stage.save_strategy != "no":
                self.save()

    def collect(self) -> None:
        """Fetches the metrics of the step before, and writes them if they end a logging window."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        fetched = jax.device_get(metrics)
        nonfinite = bool(fetched.pop("skipped").total)
        self.skipped = self.skipped + 1 if nonfinite else 0
        if self.skipped == MAX_SKIPPED:
            raise Diverged(
                f"gradients were not finite in {MAX_SKIPPED} steps in a row, the last of them step {step}",
                fix="lower learning_rate, or look at the rows of these steps",
            )
        latest = {name: float(fetched.pop(name).total) for name in ("grad_norm", "learning_rate")}
        trained = float(fetched["loss"].weight)
        if nonfinite:
            self.progress.note(f"step {step}: gradients are not finite; weights are left as they were")
            fetched = {}
        self.window.add(fetched, self.setup.train.tokens(step - 1), trained)
        if step % self.stage.logging_steps == 0 or step == self.plan.steps:
            now = time.perf_counter()
            self.write(step, latest | self.window.finish(now - self.clock))
            self.clock = now

    def write(self, step: int, record: dict[str, float]) -> None:
        """One line of metrics.jsonl."""
        self.last_record = {"step": step, "epoch": self.plan.epoch(step), **record}
        self.log.write(self.last_record)
        log.debug("%s %s", self.stage.stage_name, self.last_record)
        self.progress.update(step, self.last_record)

    def evaluate(self) -> None:
        """Loss and perplexity on the held-out rows, and the stage's other metrics."""
        self.collect()
        assert self.setup.evaluation is not None
        started = time.perf_counter()
        total: Metrics = {}
        for batch in _batches(self.setup.evaluation, self.setup.tokenizer):
            metrics = self.evaluate_batch(self.state.params, place_batch(batch, self.setup.mesh))
            total = add(total, jax.device_get(metrics))
        means = finish(total)
        record = {f"eval_{name}": value for name, value in means.items()}
        record["eval_perplexity"] = float(np.exp(means["loss"]))
        record["eval_runtime"] = time.perf_counter() - started
        wanted = f"eval_{(self.stage.metric_for_best_model or 'loss').removeprefix('eval_')}"
        if wanted not in record:
            known = ", ".join(name.removeprefix("eval_") for name in record)
            raise ConfigError(f"metric_for_best_model: there is no {wanted}", fix=f"there are {known}")
        self.last_metric = record[wanted]
        self.write(self.done, record)
        self.clock += time.perf_counter() - started  # evaluating is not part of a step's time

    def save(self) -> None:
        """A checkpoint of everything the next step depends on."""
        self.collect()
        meta = {
            "settings": self.setup.settings,
            "window": self.window.state(),
            "metric": self.last_metric,
            "skipped": self.skipped,
            "source": str(self.setup.job.source),
            "hf": self.setup.model.hf,
        }
        self.checkpoints.save(self.done, self.state, meta, self.last_metric)

    def preempt(self, signal: str) -> None:
        """Saves, waits until it is on disk, and ends the run with the exit code that says start me again."""
        self.save()
        self.checkpoints.wait()
        folder, saved = self.setup.job.folder, self.checkpoints.latest()
        raise Preempted(
            f"stopped by {signal} after step {self.done} of {self.plan.steps}; step {saved} is saved in {folder}",
            interrupted=signal == "SIGINT",
            fix=f"go on with --resume {folder.parent}",
        )

    def best_params(self) -> Params:
        """The weights to export: the last, or the best checkpoint's if the stage asks for them."""
        best = self.checkpoints.best() if self.stage.load_best_model_at_end else None
        if best is None or best == self.done:
            return self.state.params
        log.info("%s: the best checkpoint is that of step %d", self.stage.stage_name, best)
        return self.checkpoints.restore(_abstract(self.state), best)[1].params


def _abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _batches(data: Data, tokenizer: Any, start: int = 0) -> Any:
    return batches(
        data.plan,
        data.examples,
        pad_id(tokenizer),
        start=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def due(strategy: str, every: int | None, step: int, plan: Plan) -> bool:
    """Whether an evaluation or a save falls on this step."""
    if strategy == "epoch":
        return step % plan.steps_per_epoch == 0 or step == plan.steps
    return strategy == "steps" and every is not None and step % every == 0


def _tensorboard(job: Job) -> Path | None:
    config = job.config
    if not config.use_tensorboard:
        return None
    return (
        Path(config.logging_dir) / job.stage.stage_name if config.logging_dir else job.folder / "tensorboard"
    )


def _wandb(job: Job) -> WandbSettings | None:
    config = job.config
    if not config.use_wandb:
        return None
    run = job.folder.parent.name
    return WandbSettings(
        project=config.wandb_project or "ntjax",
        entity=config.wandb_entity,
        name=f"{config.task_name}/{run}/{job.stage.stage_name}",
        run_id=f"{run}-{job.stage.stage_name}",
        config=asdict(job.stage),
    )


def export(setup: Setup, params: Params) -> None:
    """The stage's folder becomes a Hugging Face model, in `model.dtype`."""
    job = setup.job
    dtype = job.config.model.dtype
    save_params(job.folder, params, setup.model.specs, dtype=dtype, config=setup.model.hf)
    save_tokenizer(setup.tokenizer, job.folder)
    save_generation_config(job.folder, job.source, setup.tokenizer)
