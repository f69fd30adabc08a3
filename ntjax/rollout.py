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
from typing import Any, NamedTuple

import jax
import numpy as np

from ntjax import hosts
from ntjax.data.grouped import joined
from ntjax.data.sizes import rounded
from ntjax.drawing import Drawing
from ntjax.feed import Fed, Questions
from ntjax.judge import Verdict
from ntjax.mesh import own_share, place_batch
from ntjax.metrics import Mean, Metrics, append_lines
from ntjax.params import Params
from ntjax.prepare import Setup
from ntjax.sampler import Completion
from ntjax.stages.rollout import RolloutConfig
from ntjax.step import Join
from ntjax.window import Drawn, difference, length_metrics, packed, shown, told, unpacked, window_arrays

COMPLETIONS = "completions.jsonl"
SCORES = ("old_logps", "old_values", "ref_logps")  # what models say of a window before it is trained on
SHOWN = 3  # completions that log_completions shows of a window
log = logging.getLogger(__name__)


class Weights(NamedTuple):
    """The policy's as they are now, and the reference's."""

    trainable: Params
    frozen: Params
    reference: Params | None


class Window(NamedTuple):
    """Completions that are drawn, what the policy and the reference said of them then, and how far the prompts were
    asked; their rewards are being worked on."""

    drawn: Drawn
    arrays: dict[str, np.ndarray]
    asked: int
    step: int  # steps that were done by then
    metrics: Metrics


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
        self.setup, self.weights, self.join = setup, weights, join
        self.shape = self.questions.geometry
        self.reference_scores = reference_scores
        self.policy_scores = _over_microbatches(self.stage.policy_scores(setup.model), join)
        self.draw = Drawing(setup)
        self.judge.load()  # before a sampler asks what room there is
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
        """The steps from `start` on. A window is drawn when its first step is asked for, from the weights of that
        moment; with `generate_ahead` when the window before it is begun, whose training its rewards don't hold up."""
        yield self._feed(start, position or {"asked": 0, "window": 0, "state": {}, "rewards": None})

    def _feed(self, start: int, position: dict[str, Any]) -> Iterator[Fed]:
        at = dict(position)
        left_over, used = at.pop("left", None), at.pop("used", self.shape.steps)
        arrays = unpacked(left_over)
        if at["rewards"] is not None:
            self.judge.load_state(at["rewards"])
        kept = at.pop("ahead", None)
        ahead = self._restored(kept) if kept else None
        for step in range(start, self.steps):
            metrics: Metrics = {}
            if used == self.shape.steps:
                arrays, metrics, at = self._judged(ahead or self._window(at["asked"], step), at, step)
                used, left_over, ahead, kept = 0, packed(arrays) if self.shape.steps > 1 else None, None, None
                if self.stage.generate_ahead and step + self.shape.steps < self.steps:
                    ahead = self._window(at["asked"], step)
                    kept = self._kept(ahead)
                self.ended, self.trained_tokens = time.perf_counter(), 0
            rows = self._regrouped(self.questions.order(at["window"] - 1)[used])
            used += 1
            batch = {name: array[rows] for name, array in arrays.items()}
            left = {"left": left_over, "used": used} if used < self.shape.steps else {}
            left |= {"ahead": kept} if kept else {}
            tokens = int((batch["segments"] > 0).sum())
            self.trained_tokens += tokens
            epoch = (step + 1) / self.steps_per_epoch
            yield Fed(self._shown(batch), tokens, epoch, at | left, metrics)

    def _regrouped(self, rows: np.ndarray) -> np.ndarray:
        """A step's rows of the window [microbatches, rows], a prompt's together where that changes nothing."""
        if not (self.setup.shares and self.stage.regroups):
            return rows
        flat = rows.reshape(-1)
        return flat[np.argsort(flat // self.shape.group, kind="stable")].reshape(rows.shape)

    def _window(self, asked: int, step: int) -> Window:
        """The next window, drawn from the policy as it is."""
        policy = self.weights()
        jax.block_until_ready(policy.trainable)
        began = time.perf_counter()
        speed: Metrics = {}
        if self.ended is not None:
            speed["trainer/tokens_per_second"] = Mean(self.trained_tokens, began - self.ended)
        params = self._joined(policy)
        wanted = self.shape.completions // self.shape.group
        drawn, asked = self.draw.next(params, asked, wanted, step), asked + wanted
        if getattr(self.stage, "dynamic_sample", False):
            drawn, asked, resampled = self.draw.refilled(drawn, params, asked, step)
            speed |= resampled
        count = sum(len(completion.tokens) for completion in drawn.completions)
        speed["sampler/tokens_per_second"] = Mean(count, time.perf_counter() - began)
        arrays = self._arrays(drawn)
        arrays |= self._scores(arrays, policy)  # the devices work while the rewards are computed
        return Window(drawn, arrays, asked, step, speed)

    def _judged(
        self, window: Window, at: Mapping[str, Any], step: int
    ) -> tuple[dict[str, np.ndarray], Metrics, dict]:
        """The arrays [N, ...] that a window is trained on, what is to be logged of it, and the position after it."""
        drawn, arrays = window.drawn, window.arrays
        verdict = drawn.verdict()
        judged = self.stage.judged(arrays, verdict.scores, at["state"])
        lengths = length_metrics(drawn.completions)
        metrics = verdict.metrics | judged.metrics | lengths | window.metrics | difference(arrays)
        self._record(drawn, verdict, judged, step + 1)
        arrays = arrays | judged.arrays
        if "old_logps" in arrays:
            del arrays["sampler_logps"]  # the loss compares only where there is nothing better
        arrays = {name: array for name, array in arrays.items() if name not in ("stopped", "lengths")}
        after = {
            "asked": window.asked,
            "window": at["window"] + 1,
            "state": judged.state,
            "rewards": self.judge.state(),
        }
        return arrays, metrics, after

    def _kept(self, window: Window) -> dict[str, Any]:
        """A window that waits for its turn, as JSON; `_restored` has it judged anew."""
        completions = [list(vars(completion).values()) for completion in window.drawn.completions]
        arrays = {name: window.arrays[name] for name in SCORES if name in window.arrays}
        return {
            "numbers": window.drawn.numbers,
            "completions": completions,
            "scores": packed(arrays),
            "asked": window.asked,
            "step": window.step,
        }

    def _restored(self, kept: Mapping[str, Any]) -> Window:
        completions = [Completion(*fields) for fields in kept["completions"]]
        group = self.shape.group
        groups = [completions[at : at + group] for at in range(0, len(completions), group)]
        drawn = self.draw.submitted(kept["numbers"][::group], enumerate(groups), group, kept["step"])
        arrays = self._arrays(drawn) | unpacked(kept["scores"])
        return Window(drawn, arrays, kept["asked"], kept["step"], {})

    def _joined(self, policy: Weights) -> Params:
        """The policy's weights as the sampler reads them token after token: none is on another row's device."""
        return self.setup.model.gathered(self.join(policy.frozen, policy.trainable, None))

    def _arrays(self, drawn: Drawn) -> dict[str, np.ndarray]:
        """Prompts and completions as the model reads them, in rows whose lengths are few over a run."""
        kept = self.questions.prompts
        prompts = [kept.kept[number] for number in drawn.numbers]
        asked = {"prompt": np.array(drawn.numbers)} if self.setup.vision else {}
        return asked | window_arrays(
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
        placed = place_batch(self._shown(rows), self.setup.layout.mesh)
        found: dict[str, Any] = {}
        if self.policy_scores is not None:
            found |= self.policy_scores(policy.trainable, policy.frozen, placed)
        if self.reference_scores is not None:
            assert policy.reference is not None
            found |= self.reference_scores(policy.reference, placed)
        mask = arrays["mask"]
        return {name: hosts.whole(array).reshape(mask.shape) * mask for name, array in found.items()}

    def _shown(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """This process's rows of arrays [microbatches, rows, ...], with what their prompts show, or with each prompt
        once if they are shared."""
        layout, prompts = self.setup.layout, self.questions.prompts.kept
        if self.setup.shares:
            batch = joined(batch, layout.rows, self.questions.pad_id)
        return shown(batch, own_share(layout.mesh), layout.rows, prompts, self.setup.vision)

    def evaluate(self) -> Metrics:
        """Rewards and lengths of completions of the held-out prompts, from the weights as they are."""
        draw, params = Drawing(self.setup, evaluating=True), self._joined(self.weights())
        group = getattr(self.stage, "num_generations_eval", None) or self.shape.group
        remembered = self.judge.state()  # what the training's completions taught the functions
        drawn = draw(params, range(len(draw.questions.prompts)), group, 0, 0)
        verdict, threshold = drawn.verdict(), self.stage.eval_threshold
        if remembered is not None:
            self.judge.load_state(remembered)
        totals = verdict.totals(self.stage.reward_weights)
        reward = {"reward": Mean(float(np.nansum(totals)), float((~np.isnan(totals)).sum()))}
        right = {} if threshold is None else verdict.right(group, threshold)
        return verdict.metrics | reward | right | length_metrics(drawn.completions)

    def _record(self, drawn: Drawn, verdict: Verdict, judged: Any, step: int) -> None:
        """The window's lines of completions.jsonl; some of them are shown, where that is asked for."""
        if jax.process_index() != 0:
            return
        lines = told(drawn, verdict, judged, step, self.questions.prompts)
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
