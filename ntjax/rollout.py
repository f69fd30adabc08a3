"""Completions drawn from the policy as it is, judged, and fed to the steps that learn from them.

A window of completions is drawn at once, and trained on for one or more steps. What is left of it is part of the
position in the data, so a run that is broken off within a window goes on with the very same completions.

Axes: N completions of a window, T time of prompt and completion, C time of completions, F rewards.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from ntjax import hosts
from ntjax.data.loader import rounded
from ntjax.feed import Fed, Questions
from ntjax.judge import Verdict, rewarded
from ntjax.layout import Layout
from ntjax.mesh import own_share, place_batch
from ntjax.metrics import Mean, Metrics, append_lines
from ntjax.params import Params
from ntjax.prepare import Setup
from ntjax.sampler import Sampler
from ntjax.stages.rollout import RolloutConfig
from ntjax.step import Join
from ntjax.window import Drawn, difference, length_metrics, packed, unpacked, window_arrays

COMPLETIONS = "completions.jsonl"
SHOWN = 3  # completions that log_completions shows of a window
log = logging.getLogger(__name__)


class Weights(NamedTuple):
    """The policy's as they are now, and the reference's."""

    trainable: Params
    frozen: Params
    reference: Params | None


class Rollouts:
    """The feed of a stage that draws its own completions from the policy, which `weights()` gives as it is."""

    def __init__(
        self,
        setup: Setup,
        join: Join,
        reference_scores: Callable[[Params, Any], Any] | None,
        weights: Callable[[], Weights],
    ):
        assert isinstance(setup.job.stage, RolloutConfig)
        assert isinstance(setup.train, Questions)
        assert setup.judge is not None
        self.stage, self.questions, self.judge = setup.job.stage, setup.train, setup.judge
        self.held_out = setup.evaluation if isinstance(setup.evaluation, Questions) else None
        self.setup, self.weights, self.join = setup, weights, join
        self.shape = self.questions.geometry
        self.reference_scores = reference_scores
        self.policy_scores = _over_microbatches(self.stage.policy_scores(setup.model), join)
        self.sampler = self._sampler()
        self.ended: float | None = None  # when the last window was complete
        self.trained_tokens = 0  # fed since then

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.questions.steps

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the prompts."""
        return self.questions.steps_per_epoch

    @contextmanager
    def open(self, start: int = 0, position: dict[str, Any] | None = None) -> Iterator[Iterator[Fed]]:
        """The steps from `start` on. Each is drawn when it is asked for, from the weights of that moment."""
        yield self._feed(start, position or {"asked": 0, "window": 0, "state": {}, "rewards": None})

    def _feed(self, start: int, position: dict[str, Any]) -> Iterator[Fed]:
        at = dict(position)
        left_over, used = at.pop("left", None), at.pop("used", self.shape.steps)
        arrays = unpacked(left_over)
        if at["rewards"] is not None:
            self.judge.load_state(at["rewards"])
        for step in range(start, self.steps):
            metrics: Metrics = {}
            if used == self.shape.steps:
                arrays, metrics, at = self._window(at, step)
                used, left_over = 0, packed(arrays) if self.shape.steps > 1 else None
            rows = self.questions.order(at["window"] - 1)[used]
            used += 1
            batch = {name: array[rows] for name, array in arrays.items()}
            left = {"left": left_over, "used": used} if used < self.shape.steps else {}
            tokens = int((batch["segments"] > 0).sum())
            self.trained_tokens += tokens
            epoch = (step + 1) / self.steps_per_epoch
            yield Fed(_own_rows(batch, self.setup.layout), tokens, epoch, at | left, metrics)

    def _window(self, at: Mapping[str, Any], step: int) -> tuple[dict[str, np.ndarray], Metrics, dict]:
        """The arrays [N, ...] of the next window, what is to be logged of it, and the position after it."""
        policy = self.weights()
        jax.block_until_ready(policy.trainable)
        began = time.perf_counter()
        speed: Metrics = {}
        if self.ended is not None:
            speed["trainer/tokens_per_second"] = Mean(self.trained_tokens, began - self.ended)
        params = self._joined(policy)
        wanted = self.shape.completions // self.shape.group
        drawn, asked = self._draw(params, at["asked"], wanted, step), at["asked"] + wanted
        if getattr(self.stage, "dynamic_sample", False):
            drawn, asked, resampled = self._refilled(drawn, params, asked, step)
            speed |= resampled
        count = sum(len(completion.tokens) for completion in drawn.completions)
        speed["sampler/tokens_per_second"] = Mean(count, time.perf_counter() - began)
        arrays = self._arrays(drawn)
        arrays |= self._scores(arrays, policy)  # the devices work while the rewards are computed
        verdict = drawn.verdict()
        judged = self.stage.judged(arrays, verdict.scores, at["state"])
        lengths = length_metrics(drawn.completions)
        metrics = verdict.metrics | judged.metrics | lengths | speed | difference(arrays)
        self._record(drawn, verdict, judged, step + 1)
        arrays |= judged.arrays
        if "old_logps" in arrays:
            del arrays["sampler_logps"]  # the loss compares only where there is nothing better
        arrays = {name: array for name, array in arrays.items() if name not in ("stopped", "lengths")}
        after = {
            "asked": asked,
            "window": at["window"] + 1,
            "state": judged.state,
            "rewards": self.judge.state(),
        }
        self.ended, self.trained_tokens = time.perf_counter(), 0
        return arrays, metrics, after

    def _joined(self, policy: Weights) -> Params:
        """The policy's weights as the sampler reads them token after token: none is on another row's device."""
        params = self.join(policy.frozen, policy.trainable, None)
        model, layout = self.setup.model, self.setup.layout
        return layout.gathered({path: params[path] for path in model.specs}, model.specs, model.config.dtype)

    def _draw(self, params: Params, asked: int, groups: int, step: int) -> Drawn:
        """A group of completions of each of the next prompts; the rewards are set to work on them."""
        numbers = [self.questions.number(asked + i) for i in range(groups)]
        return self._drawn(self.sampler, params, self.questions, numbers, self.shape.group, asked, step)

    def _drawn(
        self,
        sampler: Sampler,
        params: Params,
        questions: Questions,
        numbers: Sequence[int],
        group: int,
        asked: int,
        step: int,
    ) -> Drawn:
        prompts = [questions.prompts.kept[number] for number in numbers]
        seed, first = questions.seed, asked * group
        completions = sampler(params, prompts, group=group, seed=seed, first_row=first)
        decode = self.setup.tokenizer.decode
        texts = [decode(completion.tokens, skip_special_tokens=True) for completion in completions]
        each = [number for number in numbers for _ in range(group)]
        epoch = step / self.steps_per_epoch
        state = {"global_step": step, "max_steps": self.steps, "epoch": epoch}
        state["num_train_epochs"] = self.stage.num_train_epochs
        ids = [completion.tokens for completion in completions]
        batch = rewarded(questions.prompts, each, ids, texts, state)
        return Drawn(each, completions, texts, self.judge.submit(batch))

    def _refilled(self, drawn: Drawn, params: Params, asked: int, step: int) -> tuple[Drawn, int, Metrics]:
        """Groups whose rewards are all the same replaced by those of further prompts (arXiv:2503.14476, eq. 11).

        After `max_resample_times` rounds, what is still missing is made up of the groups that were to be replaced.
        """
        group, wanted = self.shape.group, self.shape.completions
        kept: Drawn | None = None
        spare: Drawn | None = None
        for round_ in range(self.stage.max_resample_times + 1):  # type: ignore[attr-defined]
            verdict = drawn.verdict()
            rewards = verdict.totals(self.stage.reward_weights).reshape(-1, group)
            varied = rewards.max(axis=1) > rewards.min(axis=1)
            rows = np.arange(rewards.size).reshape(-1, group)
            useful = drawn.picked(rows[varied].ravel().tolist(), verdict)
            told_once = replace(verdict, logged={}, failures=())
            useless = drawn.picked(rows[~varied].ravel().tolist(), told_once)
            kept = useful if kept is None else kept + useful
            spare = useless if spare is None else spare + useless
            missing = (wanted - len(kept.numbers)) // group
            if not missing or round_ == self.stage.max_resample_times:  # type: ignore[attr-defined]
                break
            drawn, asked = self._draw(params, asked, missing, step), asked + missing
        assert kept is not None
        assert spare is not None
        dropped = len(spare.numbers) // group - missing
        if missing:
            kept = kept + spare.picked(range(missing * group), spare.verdict())
        return kept, asked, {"sampler/groups_resampled": Mean(float(dropped), 1.0)}

    def _arrays(self, drawn: Drawn) -> dict[str, np.ndarray]:
        """Prompts and completions as the model reads them, in rows whose lengths are few over a run."""
        kept = self.questions.prompts
        prompts = [kept.kept[number] for number in drawn.numbers]
        return window_arrays(
            prompts,
            drawn.completions,
            rounded(max(len(prompt.tokens) for prompt in prompts), int(kept.lengths.max())),
            rounded(max(len(c.tokens) for c in drawn.completions), self.stage.completion_length),
            self.questions.pad_id,
        )

    def _scores(self, arrays: Mapping[str, np.ndarray], policy: Weights) -> dict[str, np.ndarray]:
        """What the policy and the reference say of the window, as the stage asks: [N, C] each."""
        if self.policy_scores is None and self.reference_scores is None:
            return {}
        shape = (-1, self.shape.rows)
        rows = {
            name: array.reshape(*shape, *array.shape[1:])
            for name, array in arrays.items()
            if name not in ("stopped", "lengths", "sampler_logps")
        }
        placed = place_batch(_own_rows(rows, self.setup.layout), self.setup.layout.mesh)
        found: dict[str, Any] = {}
        if self.policy_scores is not None:
            found |= self.policy_scores(policy.trainable, policy.frozen, placed)
        if self.reference_scores is not None:
            assert policy.reference is not None
            found |= self.reference_scores(policy.reference, placed)
        mask = arrays["mask"]
        return {name: hosts.whole(array).reshape(mask.shape) * mask for name, array in found.items()}

    def evaluate(self) -> Metrics:
        """Rewards and lengths of completions of the held-out prompts, from the weights as they are."""
        assert self.held_out is not None
        policy = self.weights()
        params = self._joined(policy)
        group = getattr(self.stage, "num_generations_eval", None) or self.shape.group
        sampler = self._sampler(evaluating=True)
        numbers = list(range(len(self.held_out.prompts)))
        drawn = self._drawn(sampler, params, self.held_out, numbers, group, 0, 0)
        verdict = drawn.verdict()
        totals = verdict.totals(self.stage.reward_weights)
        reward = {"reward": Mean(float(np.nansum(totals)), float((~np.isnan(totals)).sum()))}
        return verdict.metrics | reward | length_metrics(drawn.completions)

    def _sampler(self, *, evaluating: bool = False) -> Sampler:
        setup = self.setup
        sampling = self.stage.sampling(setup.stop_ids, evaluating=evaluating)
        layout = setup.layout
        slots = self.stage.sampler_slots * layout.rows * layout.sequence
        return Sampler(setup.model, sampling, slots=slots, tokenizer=setup.tokenizer)

    def _record(self, drawn: Drawn, verdict: Verdict, judged: Any, step: int) -> None:
        """The window's lines of completions.jsonl; some of them are shown, where that is asked for."""
        if jax.process_index() != 0:
            return
        lines = []
        for row, number in enumerate(drawn.numbers):
            scores = dict(zip(self.judge.labels, verdict.scores[row].tolist(), strict=True))
            lines.append(
                {
                    "step": step,
                    "prompt": self.questions.prompts.kept[number].said,
                    "completion": drawn.texts[row],
                    "rewards": {name: None if score != score else score for name, score in scores.items()},
                    "reward": _number(judged.rewards[row]),
                    "advantage": _number(judged.advantages[row]),
                    "tokens": len(drawn.completions[row].tokens),
                    "finished": drawn.completions[row].finished,
                    **({"extra": {k: v[row] for k, v in verdict.extra.items()}} if verdict.extra else {}),
                }
            )
        append_lines(self.setup.job.folder / COMPLETIONS, lines)
        if self.stage.log_completions:
            self._show(lines)

    def _show(self, lines: Sequence[Mapping[str, Any]]) -> None:
        every = self.shape.group if self.stage.log_unique_prompts else 1
        for line in lines[::every][: self.stage.num_completions_to_print or SHOWN]:
            shown = {name: line[name] for name in ("prompt", "completion", "reward", "advantage")}
            log.info("%s", json.dumps(shown, ensure_ascii=False, default=str))


def _over_microbatches(score: Callable[[Params, Any], Any] | None, join: Join) -> Any:
    """(trainable, frozen, microbatches) -> what `score` says of each; compiled."""
    if score is None:
        return None

    def scored(trainable: Params, frozen: Params, batch: Any) -> Any:
        params = join(frozen, trainable, None)
        return jax.lax.map(lambda micro: score(params, micro), batch)

    return jax.jit(scored)


def _own_rows(batch: Mapping[str, np.ndarray], layout: Layout) -> dict[str, np.ndarray]:
    """This process's rows of arrays [microbatches, rows, ...]."""
    index, count = own_share(layout.mesh)
    return {name: np.split(array, count, axis=1)[index] for name, array in batch.items()}


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
