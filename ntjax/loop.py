"""The loop over a stage's steps, and the step that it takes.

It never waits for the device: a step's metrics are fetched while the next step runs.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax

from ntjax import hosts, watchdog
from ntjax.checkpoint import Checkpoints
from ntjax.errors import ConfigError, Diverged, Preempted
from ntjax.feed import Fed, Feed, Planned, Questions, Streamed
from ntjax.layout import Layout
from ntjax.logs import open_log
from ntjax.mesh import on_host, place_batch, replicated
from ntjax.metrics import Metrics, Window, add, finish, read_metrics, rewind
from ntjax.models import Model
from ntjax.optim import direction, schedule
from ntjax.params import Params, Specs
from ntjax.parts import factors
from ntjax.policy import VALUE, Policy
from ntjax.prepare import Setup
from ntjax.progress import Progress
from ntjax.reference import reference_scores
from ntjax.result import origin
from ntjax.rollout import COMPLETIONS, Rollouts, Weights
from ntjax.signals import StopRequest
from ntjax.stages.base import StageConfig
from ntjax.step import Batch, Join, Step, TrainState, eval_step, initial_state, mix, train_step

MAX_SKIPPED = 5  # non-finite steps in a row before the run is called diverged
log = logging.getLogger(__name__)


def stage_step(
    stage: StageConfig, model: Model, specs: Specs, join: Join, layout: Layout, steps: int
) -> tuple[Step, optax.GradientTransformation]:
    """The stage's step, not compiled, and its optimizer; `specs` declare what is trained, of which `join` makes the
    model's weights."""
    assert stage.seed is not None
    optimizer, rate = direction(stage, specs), schedule(stage, steps)
    own = factors(stage, model.specs, {path: spec for path, spec in specs.items() if path != VALUE})

    def shared(gradients: Params) -> Params:
        return layout.shared(gradients, specs)

    loss, clip = stage.loss(model), stage.max_grad_norm
    return train_step(loss, optimizer, rate, clip, join, stage.seed, shared, own), optimizer


def fetching(step: Step, near: Any) -> Step:
    """The step whose optimizer's state lies in the host's memory, and is brought `near` for its own time."""

    def fetched(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        return step(replace(state, opt_state=jax.device_put(state.opt_state, near)), frozen, batch)

    return fetched


class Loop:
    """The loop over a stage's steps: what it counts, when it logs, evaluates and saves.

    `pending` is the step whose metrics are still on the device.
    """

    def __init__(
        self,
        setup: Setup,
        policy: Policy,
        reference: Params | None,
        checkpoints: Checkpoints,
        report: Callable[[], None] = lambda: None,
    ):
        job, self.stage = setup.job, setup.job.stage
        loss = self.stage.loss(setup.model)
        layout, specs = setup.layout, policy.specs
        step, optimizer = stage_step(self.stage, setup.model, specs, policy.join, layout, setup.train.steps)
        trainable = layout.put(policy.trainable, specs)
        state = initial_state(trainable, optimizer, lambda state: layout.of_state(state, specs))
        if getattr(self.stage, "sync_ref_model", False):
            assert reference is not None
            moving = {path: reference.pop(path) for path in state.params}
            state = replace(state, reference=moving)
        state = replace(state, step=jax.device_put(state.step, replicated(layout.mesh)))
        if job.config.mesh.offload_optimizer:
            near = jax.tree.map(lambda x: x.sharding, state.opt_state)
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
            log.info("the optimizer's state in the host's memory: %.1f MB", size / 1e6)
            state = replace(state, opt_state=jax.device_put(state.opt_state, on_host(near)))
            step = fetching(step, near)
        self.state = state
        # The step gives everything back where it was: else the second step would be compiled anew.
        places = jax.tree.map(lambda x: x.sharding, self.state)
        self.setup, self.checkpoints, self.report = setup, checkpoints, report
        self.frozen, self.reference = policy.frozen, reference
        self.step = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
        self.evaluate_batch = jax.jit(eval_step(loss, policy.join))
        self.score = reference_scores(setup)
        self.feed: Planned | Streamed | Rollouts
        if isinstance(setup.train, Questions):
            self.feed = Rollouts(setup, policy.join, self.score, self.weights)
        else:
            self.feed = setup.train
        self.log = open_log(job)
        self.vote = hosts.Vote(layout.mesh)
        self.shapes: set[Any] = set()  # of batches that a step is compiled for
        self.progress = Progress(self.stage.stage_name, self.feed.steps, shown=hosts.first())
        self.window = Window()
        self.done = 0  # steps dispatched
        self.epoch = 0.0  # passes over the data after `done` steps
        self.position: dict[str, Any] | None = None  # in a stream or a window, after `done` steps
        self.pending: tuple[int, Metrics, Fed] | None = None
        self.skipped = 0  # non-finite steps in a row
        self.last_record: dict[str, Any] = {}
        self.metric: float | None = None  # of the last step, if it was evaluated
        self.clock = time.perf_counter()

    def weights(self) -> Weights:
        """The policy and its reference after the steps dispatched."""
        reference = self.reference
        if self.state.reference is not None:
            reference = {**(reference or {}), **self.state.reference}
        return Weights(self.state.params, self.frozen, reference)

    def restore(self) -> None:
        """Goes on from the job's checkpoint, the newest intact one if none is named."""
        job = self.setup.job
        self.done, self.state, meta = self.checkpoints.restore(_abstract(self.state), job.resume_step)
        self.checkpoints.discard_after(self.done)
        self.window = Window.from_state(meta["window"])
        self.skipped, self.epoch, self.position = meta["skipped"], meta["epoch"], meta["position"]
        self.rewind(self.done)
        self.last_record = (read_metrics(job.folder) or [{}])[-1]
        self.progress = Progress(self.stage.stage_name, self.feed.steps, start=self.done, shown=hosts.first())
        log.info("%s: resuming at step %d of %d", self.stage.stage_name, self.done, self.feed.steps)

    def rewind(self, step: int) -> None:
        """Drops what was logged after `step`."""
        if hosts.first():
            self.log.rewind(step)
            rewind(self.setup.job.folder, step, COMPLETIONS)

    def run(self, stop: StopRequest) -> None:
        """Runs the steps that are left."""
        stage, feed = self.stage, self.feed
        steps_left = self.done < feed.steps
        self.clock = time.perf_counter()
        with self.progress, feed.open(self.done, self.position) as rows:
            for fed in rows:
                self.arm(fed.batch)
                self.state, metrics = self.step(self.state, self.frozen, self.prepared(fed.batch))
                self.collect()
                self.done, self.metric = self.done + 1, None
                self.epoch, self.position = fed.epoch, fed.position
                self.sync()
                self.pending = self.done, metrics, fed
                if self.setup.evaluation and due(stage.eval_strategy, stage.eval_steps, self.done, feed):
                    self.evaluate()
                if self.done < feed.steps and due(stage.save_strategy, stage.save_steps, self.done, feed):
                    self.save()  # the last one is saved with its evaluation, below
                if (asked := self.vote(stop.requested or 0)) and self.done < feed.steps:
                    self.preempt(signal.Signals(asked).name)
                watchdog.arm("rollout" if self.stage.rolls_out else "step")
            self.collect()
            if self.setup.evaluation and stage.eval_strategy == "no" and steps_left:
                self.evaluate()
            if stage.save_strategy != "no":
                self.save()

    def prepared(self, batch: dict[str, np.ndarray]) -> Batch:
        """The batch on the devices, with what the reference model says of it where the loss asks for that."""
        placed, reference = place_batch(batch, self.setup.layout.mesh), self.weights().reference
        if self.score is None or reference is None or isinstance(self.feed, Rollouts):
            return placed
        return {**placed, **self.score(reference, placed)}

    def arm(self, batch: Mapping[str, np.ndarray]) -> None:
        """Says how long the step may take: longer if it is compiled first."""
        shape = tuple((name, array.shape) for name, array in sorted(batch.items()))
        watchdog.arm("step" if shape in self.shapes else "compile")
        self.shapes.add(shape)

    def sync(self) -> None:
        """Moves the reference towards the policy where the stage asks for that (TR-DPO, arXiv:2404.09656)."""
        if self.state.reference is None or self.done % self.stage.ref_model_sync_steps:  # type: ignore[attr-defined]
            return
        share = self.stage.ref_model_mixup_alpha  # type: ignore[attr-defined]
        mixed = mix(self.state.reference, self.state.params, share)
        self.state = replace(self.state, reference=mixed)

    def collect(self) -> None:
        """Fetches the metrics of the step before, and writes them if they end a logging window."""
        if self.pending is None:
            return
        (step, metrics, fed), self.pending = self.pending, None
        fetched = jax.device_get(metrics)
        nonfinite = bool(fetched.pop("skipped").total)
        self.skipped = self.skipped + 1 if nonfinite else 0
        if self.skipped == MAX_SKIPPED:
            raise Diverged(
                f"gradients were not finite in {MAX_SKIPPED} steps in a row, the last of them step {step}",
                fix="lower learning_rate, or look at the rows of these steps",
            )
        latest = {name: float(fetched.pop(name).total) for name in ("grad_norm", "learning_rate")}
        trained = float(fetched.pop("trained", fetched["loss"]).weight)
        if nonfinite:
            self.progress.note(f"step {step}: gradients are not finite; weights are left as they were")
            fetched = {}
        self.window.add(fetched | fed.metrics, fed.tokens, trained)
        if step % self.stage.logging_steps == 0 or step == self.feed.steps:
            now = time.perf_counter()
            self.write(step, fed.epoch, latest | self.window.finish(now - self.clock))
            self.clock = now

    def write(self, step: int, epoch: float, record: dict[str, float]) -> None:
        """One line of metrics.jsonl."""
        self.last_record = {"step": step, "epoch": epoch, **record}
        self.log.write(self.last_record)
        log.debug("%s %s", self.stage.stage_name, self.last_record)
        self.progress.update(step, self.last_record)

    def evaluate(self) -> None:
        """The stage's metrics on the held-out rows."""
        self.collect()
        assert self.setup.evaluation is not None
        watchdog.arm("eval")
        started = time.perf_counter()
        means = finish(self.evaluated())
        record = {f"eval_{name}": value for name, value in means.items()}
        if self.stage.likelihood:
            record["eval_perplexity"] = float(np.exp(means["loss"]))
        record["eval_runtime"] = time.perf_counter() - started
        wanted = f"eval_{(self.stage.metric_for_best_model or self.stage.best_metric).removeprefix('eval_')}"
        if wanted not in record:
            known = ", ".join(name.removeprefix("eval_") for name in record)
            raise ConfigError(f"metric_for_best_model: there is no {wanted}", fix=f"there are {known}")
        self.metric = record[wanted]
        self.write(self.done, self.epoch, record)
        self.clock += time.perf_counter() - started  # evaluating is not part of a step's time

    def evaluated(self) -> Metrics:
        """What is counted over the held-out rows."""
        if isinstance(self.feed, Rollouts):
            return self.feed.evaluate()
        assert isinstance(self.setup.evaluation, Planned)
        total: Metrics = {}
        with self.setup.evaluation.open() as rows:
            for fed in rows:
                metrics = self.evaluate_batch(self.state.params, self.frozen, self.prepared(fed.batch))
                total = add(total, jax.device_get(metrics))
        total.pop("trained", None)
        return total

    def save(self) -> None:
        """A checkpoint of everything the next step depends on."""
        self.collect()
        watchdog.arm("save")
        meta = {
            "settings": self.setup.settings,
            "window": self.window.state(),
            "skipped": self.skipped,
            "epoch": self.epoch,
            "position": self.position,
            **origin(self.setup),
        }
        self.checkpoints.save(self.done, self.state, meta, self.metric)
        self.report()

    def preempt(self, signal: str) -> None:
        """Saves, waits until it is on disk, and ends the run with the exit code that says start me again."""
        self.save()
        self.checkpoints.close()
        hosts.part()
        folder, saved = self.setup.job.folder, self.checkpoints.latest()
        raise Preempted(
            f"stopped by {signal} after step {self.done} of {self.feed.steps}; step {saved} is saved in {folder}",
            interrupted=signal == "SIGINT",
            fix=f"go on with --resume {folder if self.stage.output_dir else folder.parent}",
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


def due(strategy: str, every: int | None, step: int, feed: Feed | Rollouts) -> bool:
    """Whether an evaluation or a save falls on this step."""
    if strategy == "epoch":
        return step % feed.steps_per_epoch == 0 or step == feed.steps
    return strategy == "steps" and every is not None and step % every == 0
