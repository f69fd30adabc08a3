"""How good a model is on rows: their likelihood, or the rewards of what it answers.

Axes: B slots, S pairs of a slot, P prompts, K completions of each, N = P * K completions, F rewards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntjax.config import Config
from ntjax.data.loader import Examples, Plan
from ntjax.data.prompts import Prompts
from ntjax.data.sizes import PARTS
from ntjax.feed import Planned
from ntjax.hf.tokenizer import pad_id, stop_ids
from ntjax.judge import Judge, Verdict, mean, rewarded, scored
from ntjax.loaded import LoadedModel
from ntjax.mesh import place_batch
from ntjax.metrics import Mean, Metrics, add, append_lines, finish
from ntjax.models import Model
from ntjax.params import Params
from ntjax.progress import Progress
from ntjax.stages.base import StageConfig
from ntjax.stages.rollout import RolloutConfig
from ntjax.step import Batch, Loss, eval_step
from ntjax.window import Drawn, length_metrics, lines_of

CALL = 512  # completions that rewards judge at once, while the next are drawn
LINES = 10  # lines of progress where nobody watches
START = {"global_step": 0, "max_steps": 0, "epoch": 0.0, "num_train_epochs": 0.0}


def likelihoods(model: LoadedModel, config: Config, examples: Examples) -> dict[str, float]:
    """The metrics of the config's stage over its examples, as the trainer evaluates them; of preferences without a head
    of scores, `preferences`. A language model's have `perplexity` and `learned_tokens` too."""
    stage, layout = config.stages[0], model.layout
    assert stage.per_device_eval_batch_size is not None
    plan = Plan(
        examples.lengths,
        stage.row_length,
        stage.per_device_eval_batch_size * layout.rows,
        shuffle=False,
        packing=stage.packs,
        in_order=stage.packs_in_order,
        fills=stage.fills and model.vision is None,
        groups=layout.rows,
        parts=PARTS.get(layout.platform, 1),
    )
    feed = Planned(plan, examples, pad_id(model.tokenizer), vision=model.vision, groups=layout.rows)
    own = model.as_in(config)
    counted = preferences(stage, own) if stage.stage_type == "dpo" else stage.loss(own)
    step, total = jax.jit(eval_step(counted)), Metrics()
    with Progress("eval", plan.steps) as progress, feed.open() as steps:
        for number, fed in enumerate(steps, 1):
            found = step(model.params, {}, place_batch(fed.batch, layout.mesh))
            total = add(total, {name: Mean(*map(float, mean)) for name, mean in found.items()})
            if number % -(-plan.steps // LINES) == 0:
                progress.update(number, finish(total))
    return _told(stage, total)


def _told(stage: StageConfig, total: Metrics) -> dict[str, float]:
    means = finish(total)
    if stage.likelihood:
        means |= {"perplexity": math.exp(means["loss"]), "learned_tokens": total["loss"].weight}
    return means


def preferences(stage: StageConfig, model: Model) -> Loss:
    """Log-probabilities of chosen and rejected completions, in nats, summed over their tokens: how often the chosen one
    is the likelier (`accuracy`), and by how much (`margin`)."""
    sums = stage.reference_scores(model)
    assert sums is not None

    def counted(params: Params, batch: Batch) -> Metrics:
        valid, logps = batch["pairs"], sums(params, batch)["ref_logps"]  # [B, S], [B, 2, S]
        chosen, rejected = (jnp.where(valid, logps[:, side], 0.0) for side in (0, 1))
        count = valid.sum(dtype=jnp.float32)
        return {
            "accuracy": Mean((chosen > rejected).sum(dtype=jnp.float32), count),
            "margin": Mean((chosen - rejected).sum(), count),
            "logps/chosen": Mean(chosen.sum(), count),
            "logps/rejected": Mean(rejected.sum(), count),
        }

    return counted


@dataclass(frozen=True)
class Answers:
    """Completions of prompts, K of each, prompt by prompt, and the verdict on all of them."""

    completions: Sequence[Any]
    verdict: Verdict
    group: int
    weights: Sequence[float] | None = None

    def summary(self, threshold: float, pass_at: Sequence[int]) -> dict[str, Any]:
        """`rewards`: for each its mean and std, and of those that reached the threshold `accuracy`, their share, and
        pass@k; `reward` is the mean of the weighted sums, and lengths have TRL's names."""
        scores = self.verdict.scores.reshape(-1, self.group, len(self.verdict.labels))
        each = {
            label: scored(scores[:, :, number], threshold, pass_at)
            for number, label in enumerate(self.verdict.labels)
        }
        totals = self.verdict.totals(self.weights)
        logged = {name: float(np.mean(values)) for name, values in self.verdict.logged.items()}
        lengths = finish(length_metrics(self.completions))
        return {"rewards": each, "reward": mean(totals), **logged, **lengths}


@dataclass(frozen=True)
class Asking:
    """Draws `group` completions of each prompt as the config's stage evaluates, and has them judged; each is kept in
    the file `out`, where there is one."""

    model: LoadedModel
    config: Config
    prompts: Prompts
    judge: Judge
    group: int
    out: Path | None = None

    @property
    def stage(self) -> RolloutConfig:
        """Says how completions are drawn."""
        stage = self.config.stages[0]
        assert isinstance(stage, RolloutConfig)
        return stage

    @cached_property
    def drawn(self) -> dict[str, Any]:
        """How, as `LoadedModel.complete` is told."""
        stops = tuple(stop_ids(self.model.folder, self.model.tokenizer))
        sampling = vars(self.stage.sampling(stops, evaluating=True))
        return {name: value for name, value in sampling.items() if name != "never"}

    def __call__(self) -> Answers:
        """All of them. Raises UserCodeError for what a reward function did wrong."""
        self.judge.load()  # before a sampler asks what room there is
        verdict: Verdict | None = None
        completions: list[Any] = []
        with Progress("eval", len(self.prompts) * self.group) as progress:
            for drawn in _lagging(self._draw(progress)):
                found = drawn.verdict()
                verdict = found if verdict is None else verdict + found
                completions += drawn.completions
                if self.out is not None:
                    append_lines(self.out, lines_of(drawn, found, self.prompts))
                reward = mean(verdict.totals(self.stage.reward_weights))
                progress.update(len(completions), {} if reward is None else {"reward": reward})
        assert verdict is not None
        return Answers(completions, verdict, self.group, self.stage.reward_weights)

    def _draw(self, progress: Progress) -> Iterator[Drawn]:
        """Completions of some prompts after the other; rewards are at work on them."""
        many, seed = max(1, CALL // self.group), self.stage.seed
        assert seed is not None
        for first in range(0, len(self.prompts), many):
            numbers = range(first, min(first + many, len(self.prompts)))
            completions = self.model.complete(
                [self.prompts.kept[number] for number in numbers],
                num_completions=self.group,
                seed=seed,
                first_row=first * self.group,
                slots=self.stage.sampler_slots,
                progress=partial(_further, progress, first * self.group),
                **self.drawn,
            )
            texts = [self.model.text(completion) for completion in completions]
            each = [number for number in numbers for _ in range(self.group)]
            ids = [completion.tokens for completion in completions]
            batch = rewarded(self.prompts, each, ids, texts, START)
            yield Drawn(each, completions, texts, self.judge.submit(batch))


def _further(progress: Progress, before: int, done: int) -> None:
    progress.update(before + done)


def _lagging(drawn: Iterator[Drawn]) -> Iterator[Drawn]:
    """The same, each when the next has been drawn: rewards had that long."""
    before: Drawn | None = None
    for one in drawn:
        if before is not None:
            yield before
        before = one
    if before is not None:
        yield before
