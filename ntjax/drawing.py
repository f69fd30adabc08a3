"""Completions of prompts, drawn from a policy's weights, on which the rewards are set to work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from ntjax.feed import Questions
from ntjax.judge import rewarded
from ntjax.metrics import Mean, Metrics
from ntjax.params import Params
from ntjax.prepare import Setup
from ntjax.sampler import Completion, Group, Sampler
from ntjax.stages.rollout import RolloutConfig
from ntjax.window import Drawn


class Drawing:
    """Draws completions of a stage's prompts, or as it evaluates of those that are held out."""

    def __init__(self, setup: Setup, *, evaluating: bool = False):
        questions = setup.evaluation if evaluating else setup.train
        assert isinstance(setup.job.stage, RolloutConfig)
        assert isinstance(questions, Questions)
        assert setup.judge is not None
        self.setup, self.stage, self.questions, self.judge = setup, setup.job.stage, questions, setup.judge
        sampling = self.stage.sampling(setup.stop_ids, evaluating=evaluating)
        if setup.vision:
            sampling = replace(sampling, never=(setup.vision.image_id,))
        slots = self.stage.sampler_slots * setup.layout.rows * setup.layout.sequence
        words = {"tokenizer": setup.tokenizer, "vision": setup.vision, "weights": self.stage.sampler_weights}
        self.sampler = Sampler(setup.model, sampling, slots=slots, **words)

    def __call__(self, params: Params, numbers: Sequence[int], group: int, asked: int, step: int) -> Drawn:
        """`group` completions of each of the prompts of these numbers, before which so many were `asked`; `step` steps
        were done."""
        prompts = [self.questions.prompts.kept[number] for number in numbers]
        seed, first = self.questions.seed, asked * group
        drawn = self.sampler.groups(params, prompts, group=group, seed=seed, first_row=first)
        return self.submitted(numbers, drawn, group, step)

    def next(self, params: Params, asked: int, groups: int, step: int) -> Drawn:
        """A group of completions of each of the next prompts."""
        numbers = [self.questions.number(asked + i) for i in range(groups)]
        return self(params, numbers, self.questions.geometry.group, asked, step)

    def submitted(self, numbers: Sequence[int], drawn: Iterable[Group], group: int, step: int) -> Drawn:
        """Groups of completions of the prompts of these numbers, in any order. Rewards are set to work on a part when
        it and all before it are there, while others are still drawn."""
        many = (self.stage.reward_batch_size or len(numbers) * group) // group
        parts = [
            self._submitted([numbers[place] for place in places for _ in range(group)], completions, step)
            for places, completions in in_parts(drawn, len(numbers), max(many, 1))
        ]
        return Drawn.of(parts)

    def _submitted(self, each: list[int], completions: list[Completion], step: int) -> Drawn:
        decode, train = self.setup.tokenizer.decode, self.setup.train
        texts = [decode(completion.tokens, skip_special_tokens=True) for completion in completions]
        state = {"global_step": step, "max_steps": train.steps, "epoch": step / train.steps_per_epoch}
        state["num_train_epochs"] = self.stage.num_train_epochs
        ids = [completion.tokens for completion in completions]
        batch = rewarded(self.questions.prompts, each, ids, texts, state)
        return Drawn(each, completions, texts, self.judge.submit(batch))

    def refilled(self, drawn: Drawn, params: Params, asked: int, step: int) -> tuple[Drawn, int, Metrics]:
        """Groups whose rewards are all the same replaced by those of further prompts (arXiv:2503.14476, eq. 11).

        After `max_resample_times` rounds, what is still missing is made up of the groups that were to be replaced.
        """
        group, wanted = self.questions.geometry.group, self.questions.geometry.completions
        kept: list[Drawn] = []
        spare: list[Drawn] = []
        for round_ in range(self.stage.max_resample_times + 1):  # type: ignore[attr-defined]
            verdict = drawn.verdict()
            rewards = verdict.totals(self.stage.reward_weights).reshape(-1, group)
            varied = rewards.max(axis=1) > rewards.min(axis=1)
            rows = np.arange(rewards.size).reshape(-1, group)
            told_once = replace(verdict, logged={}, failures=())
            kept.append(drawn.picked(rows[varied].ravel().tolist(), verdict))
            spare.append(drawn.picked(rows[~varied].ravel().tolist(), told_once))
            missing = (wanted - sum(len(part.numbers) for part in kept)) // group
            if not missing or round_ == self.stage.max_resample_times:  # type: ignore[attr-defined]
                break
            drawn, asked = self.next(params, asked, missing, step), asked + missing
        rest = Drawn.of(spare)
        dropped = len(rest.numbers) // group - missing
        if missing:
            kept.append(rest.picked(range(missing * group), rest.verdict()))
        return Drawn.of(kept), asked, {"sampler/groups_resampled": Mean(float(dropped), 1.0)}


def in_parts(drawn: Iterable[Group], count: int, many: int) -> Iterator[tuple[range, list[Completion]]]:
    """Places of prompts and their completions, `many` prompts at a time in the order of `count` prompts, each part as
    soon as it is complete."""
    there: dict[int, list[Completion]] = {}
    first = 0
    for place, completions in drawn:
        there[place] = completions
        while first < count and there.keys() >= set(part := range(first, min(first + many, count))):
            yield part, [completion for at in part for completion in there[at]]
            first += many
