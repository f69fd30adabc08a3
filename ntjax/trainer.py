"""Trains one stage: from a model folder to a model folder.

`prepare` does everything that can go wrong cheaply (data, tokenizer, plan) before weights are read; `train` runs the
loop. The loop never waits for the device: a step's metrics are fetched while the next step runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ntjax.checkpoint import Checkpoints
from ntjax.config import Config, dataset_for
from ntjax.data.loader import Plan, batches
from ntjax.errors import ConfigError, Diverged, Preempted
from ntjax.mesh import make_mesh, place_batch, replicated
from ntjax.metrics import Mean, MetricsLog, Window
from ntjax.models import Model, build
from ntjax.optim import direction, schedule
from ntjax.params import Params
from ntjax.progress import Progress
from ntjax.runs import check_unchanged, mark_done
from ntjax.signals import StopRequest
from ntjax.stages.base import StageConfig
from ntjax.step import TrainState, eval_step, initial_state, train_step

MAX_SKIPPED = 5  # non-finite steps in a row before the run is called diverged


@dataclass(frozen=True)
class Job:
    """A stage to run: what it starts from, where it writes, and whether it goes on from a checkpoint there."""

    config: Config
    stage: StageConfig
    source: Path
    folder: Path
    resume: bool = False
    resume_step: int | None = None  # None: the newest
    allow_changed: bool = False


@dataclass(frozen=True)
class Data:
    """Examples and the plan that says which of them each step sees."""

    plan: Plan
    examples: Any  # ntjax.data.encode.Encoded

    def tokens(self, step: int) -> int:
        """Tokens, padding left out, that a step reads over all processes."""
        return sum(int(self.plan.lengths[row]) for slots in self.plan.slots(step) for slot in slots for row in slot)


@dataclass(frozen=True)
class Setup:
    """All that a stage needs but its weights."""

    job: Job
    tokenizer: Any
    model: Model
    mesh: jax.sharding.Mesh
    train: Data
    eval: Data | None
    fingerprint: dict[str, Any]


def prepare(job: Job) -> Setup:
    """Reads everything but the weights; every error that data or settings can cause is raised here."""
    config, stage = job.config, job.stage
    remat = config.model.gradient_checkpointing if stage.gradient_checkpointing is None else stage.gradient_checkpointing
    model = build(read_config(job.source), dtype=config.compute_dtype(stage), remat=remat)
    tokenizer = load_tokenizer(job.source)
    check_vocab(tokenizer, model.config.vocab)
    rows, held_out = stage_rows(config, stage)
    encode = stage.encoder(config, tokenizer)
    train = encode_rows(rows, encode, max_bad_rows=..., vocab_size=model.config.vocab)
    mesh = make_mesh()
    return Setup(job, tokenizer, model, mesh, train, held_out, fingerprint)


def train(setup: Setup) -> None:
    """Trains the stage to its end and leaves a Hugging Face folder, or saves and raises `Preempted` on a signal."""
    from ntjax.hf.folder import load_params

    job, stage = setup.job, setup.job.stage
    job.folder.mkdir(parents=True, exist_ok=True)
    place = replicated(setup.mesh)
    specs = setup.model.specs
    params = load_params(job.source, specs, dtype=job.config.model.param_dtype, sharding=lambda path: place)
    state = initial_state(params, direction(stage, specs))
    checkpoints = Checkpoints(job.folder, keep=stage.save_total_limit, best=best_mode(stage))
    loop = Loop(setup, state, checkpoints)
    try:
        if job.resume and checkpoints.latest() is not None:
            loop.restore()
        loop.run()
    finally:
        checkpoints.close()
        loop.log.close()
    export(setup, loop.best_params())
    mark_done(job.folder, {"steps": setup.train.plan.steps, **loop.last_record})


class Loop:
    """The loop over a stage's steps: what it counts, when it logs, evaluates and saves.

    `pending` is the step whose metrics are still on the device.
    """

    def __init__(self, setup: Setup, state: TrainState, checkpoints: Checkpoints):
        job, stage, plan = setup.job, setup.job.stage, setup.train.plan
        loss = _loss(setup)
        optimizer = direction(stage, setup.model.specs)
        step = train_step(loss, optimizer, schedule(stage, plan.steps), stage.max_grad_norm)
        self.setup, self.state, self.checkpoints = setup, state, checkpoints
        self.stage, self.plan = stage, plan
        self.step = jax.jit(step, donate_argnums=0)
        self.evaluate_batch = jax.jit(eval_step(loss))
        self.log = MetricsLog(job.folder, **trackers(job))
        self.window = Window()
        self.done = 0  # steps dispatched
        self.pending: tuple[int, dict[str, Mean]] | None = None
        self.skipped = 0  # non-finite steps in a row
        self.last_record: dict[str, Any] = {}
        self.last_eval: float | None = None
        self.clock = time.perf_counter()

    def restore(self) -> None:
        """Goes on from the job's checkpoint, the newest intact one if none is named."""
        job = self.setup.job
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state)
        self.done, self.state, meta = self.checkpoints.restore(abstract, job.resume_step)
        check_unchanged(meta["settings"], self.setup.fingerprint, allowed=job.allow_changed)
        self.checkpoints.discard_after(self.done)
        self.window = Window.from_state(meta["window"])
        self.last_eval = meta["metric"]
        self.log.rewind(self.done)
        print(f"resuming {self.stage.stage_name} at step {self.done} of {self.plan.steps}", flush=True)

    def run(self) -> None:
        """Runs the steps that are left."""
        stage, plan, setup = self.stage, self.plan, self.setup
        rows = batches(
            plan,
            setup.train.examples,
            setup.tokenizer.pad_token_id,
            start=self.done,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        with StopRequest() as stop, Progress(stage.stage_name, plan.steps, start=self.done) as self.progress:
            for batch in rows:
                self.state, metrics = self.step(self.state, {}, place_batch(batch, setup.mesh))
                self.collect()
                self.done += 1
                self.pending = self.done, metrics
                if due(stage.eval_strategy, stage.eval_steps, self.done, plan) and setup.eval:
                    self.evaluate()
                if due(stage.save_strategy, stage.save_steps, self.done, plan):
                    self.save()
                if stop.requested:
                    self.preempt(stop.requested.name)
            self.collect()
            if stage.save_strategy != "no":
                self.save()

    def collect(self) -> None:
        """Fetches the metrics of the step before, and writes them if they end a logging window."""
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending = None
        fetched = jax.device_get(metrics)
        self.skipped = self.skipped + 1 if fetched["skipped"].total else 0
        if self.skipped == MAX_SKIPPED:
            raise Diverged(
                f"the gradients of {MAX_SKIPPED} steps in a row, the last of them {step}, are not finite",
                fix="lower learning_rate, or resume from an earlier checkpoint with other data",
            )
        if fetched["skipped"].total:
            self.progress.note(f"step {step}: gradients are not finite, weights left as they were")
        self.window.add(fetched, tokens=self.setup.train.tokens(step - 1))
        if step % self.stage.logging_steps == 0 or step == self.plan.steps:
            self.write(step, self.window.finish(time.perf_counter() - self.clock))
            self.clock = time.perf_counter()

    def write(self, step: int, record: dict[str, float]) -> None:
        """One line of metrics.jsonl."""
        self.last_record = {"step": step, "epoch": step / self.plan.steps_per_epoch, **record}
        self.log.write(self.last_record)
        self.progress.update(step, self.last_record)

    def evaluate(self) -> None:
        """Loss and perplexity on the held-out rows, and the stage's other metrics."""
        self.collect()
        assert self.setup.eval is not None
        started = time.perf_counter()
        data, total = self.setup.eval, {}
        for batch in batches(data.plan, data.examples, self.setup.tokenizer.pad_token_id):
            metrics = self.evaluate_batch(self.state.params, place_batch(batch, self.setup.mesh))
            total = jax.tree.map(np.add, total, jax.device_get(metrics)) if total else jax.device_get(metrics)
        record = {f"eval_{name}": float(m.total / m.weight) for name, m in total.items() if m.weight}
        record["eval_perplexity"] = float(np.exp(record["eval_loss"]))
        record["eval_runtime"] = time.perf_counter() - started
        self.last_eval = record.get(f"eval_{self.stage.metric_for_best_model.removeprefix('eval_')}")
        self.write(self.done, record)
        self.clock += time.perf_counter() - started  # evaluation is not part of a step's time

    def save(self) -> None:
        """A checkpoint of everything the next step depends on."""
        self.collect()
        if self.done in self.checkpoints.steps():
            return
        meta = {"settings": self.setup.fingerprint, "window": self.window.state(), "metric": self.last_eval}
        self.checkpoints.save(self.done, self.state, meta, self.last_eval)

    def preempt(self, signal: str) -> None:
        """Saves, waits until it is on disk, and ends the run with the exit code that says start me again."""
        self.save()
        self.checkpoints.wait()
        raise Preempted(
            f"stopped by {signal}; step {self.done} of {self.plan.steps} is saved in {self.setup.job.folder}",
            interrupted=signal == "SIGINT",
            fix=f"go on with --resume {self.setup.job.folder.parent}",
        )

    def best_params(self) -> Params:
        """The weights to export: the last, or the best checkpoint's if the stage asks for them."""
        best = self.checkpoints.best() if self.stage.load_best_model_at_end else None
        if best is None or best == self.done:
            return self.state.params
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state)
        return self.checkpoints.restore(abstract, best)[1].params


def due(strategy: str, every: int, step: int, plan: Plan) -> bool:
    """Whether an evaluation or a save falls on this step."""
    if strategy == "epoch":
        return step % plan.steps_per_epoch == 0 or step == plan.steps
    return strategy == "steps" and step % every == 0


def export(setup: Setup, params: Params) -> None:
    """The stage's folder becomes a Hugging Face model."""
    from ntjax.hf.folder import save_params
    from ntjax.hf.tokenizer import save_tokenizer

    job = setup.job
    save_params(job.folder, params, setup.model.specs, dtype=export_dtype(job.config, setup.model.hf), config=setup.model.hf)
    save_tokenizer(setup.tokenizer, job.folder)
