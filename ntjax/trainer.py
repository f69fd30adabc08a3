"""Trains one stage: from a model folder to a model folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import jax

from ntjax import hosts, watchdog
from ntjax.checkpoint import Checkpoints
from ntjax.loop import Loop
from ntjax.policy import Policy, load_policy, size, with_values
from ntjax.prepare import Setup
from ntjax.record import Best, better
from ntjax.reference import with_reference
from ntjax.result import export
from ntjax.runs import mark_done
from ntjax.signals import StopRequest
from ntjax.stages.base import StageConfig

log = logging.getLogger(__name__)


def train(setup: Setup, stop: StopRequest, report: Callable[[], None] = lambda: None) -> None:
    """Trains the stage to its end and leaves a Hugging Face folder, or saves and raises `Preempted` on a signal.
    `report` is called at every save."""
    job, stage = setup.job, setup.job.stage
    job.folder.mkdir(parents=True, exist_ok=True)
    policy = start(setup)
    setup, reference = with_reference(setup, policy)
    checkpoints = Checkpoints(job.folder, keep=stage.save_total_limit, best=best_mode(stage))
    loop = Loop(setup, policy, reference, checkpoints, report)
    # The loop's now, which lets them go when a checkpoint replaces them.
    policy = replace(policy, trainable={})
    try:
        watchdog.arm("restore")
        if job.resume and hosts.of_first(checkpoints.latest) is not None:
            loop.restore()
        else:
            checkpoints.discard_after(-1)
            loop.rewind(0)
        loop.run(stop)
        checkpoints.close()
    except BaseException:
        if jax.process_count() == 1:  # of several, the others may not come to finish a save together
            checkpoints.close()
        raise
    finally:
        loop.log.close()
        if setup.judge:
            setup.judge.close()
    watchdog.arm("save")
    export(setup, policy, loop.best_params())
    if hosts.first():
        mark_done(job.folder, {"steps": setup.train.steps, "last": loop.last_record})
    hosts.sync(f"{stage.stage_name} is done")
    watchdog.disarm()


def start(setup: Setup) -> Policy:
    """The stage's weights before its first step."""
    job, stage, specs = setup.job, setup.job.stage, setup.model.specs
    assert stage.seed is not None
    policy = load_policy(
        job.source,
        setup.model,
        job.config.model,
        plan=setup.adapters,
        adapter=setup.adapter,
        seed=stage.seed,
        layout=setup.layout,
        frozen=setup.frozen,
    )
    if stage.values:
        policy = with_values(policy, setup.model.config.embed, job.before)
    trained, frozen = size(policy.trainable), size(policy.frozen)
    log.info(
        "%s: trained are %s",
        stage.stage_name,
        f"{trained}, frozen are {frozen}" if policy.frozen else trained,
    )
    return replace(policy, frozen=setup.layout.put(policy.frozen, specs))


def best_mode(stage: StageConfig) -> Best | None:
    """Whether the best checkpoint is the one with the lowest or the highest metric; None without evaluation."""
    if not stage.do_eval:
        return None
    return better(stage.metric_for_best_model or stage.best_metric, stage.greater_is_better)
