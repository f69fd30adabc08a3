"""All that judges completions: functions in worker processes, models on the devices, and the cost of length.

Axes: N completions, F rewards; P prompts, K completions of each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ntjax.data.prompts import Prompts
from ntjax.errors import ConfigError
from ntjax.hf.hub import locate
from ntjax.metrics import Mean, Metrics
from ntjax.rewards import Batch, Rewards
from ntjax.scorer import Scorer
from ntjax.stages.rollout import RolloutConfig

if TYPE_CHECKING:
    from ntjax.layout import Layout
    from ntjax.prepare import Job

OVERLONG = "soft_overlong_punishment"


def rewarded(
    prompts: Prompts,
    numbers: Sequence[int],
    ids: Sequence[Sequence[int]],
    texts: Sequence[str],
    state: Mapping[str, Any],
) -> Batch:
    """What rewards are given: conversational prompts are answered by messages, text by text, as in TRL."""
    said = [prompts.kept[number].said for number in numbers]
    answers = [
        [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text
        for prompt, text in zip(said, texts, strict=True)
    ]
    return Batch(said, answers, [list(each) for each in ids], prompts.columns(numbers), dict(state))


def tryout(prompts: Prompts) -> Batch:
    """The first prompts with an answer that no policy has drawn, for a first call."""
    numbers = range(min(2, len(prompts)))
    state = {"global_step": 0, "max_steps": 0, "epoch": 0.0, "num_train_epochs": 0.0}
    return rewarded(prompts, numbers, [[0]] * len(numbers), ["The answer is 0."] * len(numbers), state)


@dataclass(frozen=True)
class Verdict:
    """`scores` [N, F] float64, NaN where a reward has nothing to say; columns and metrics that functions logged."""

    labels: tuple[str, ...]
    scores: np.ndarray
    extra: Mapping[str, list[Any]] = field(default_factory=dict)
    logged: Mapping[str, list[float]] = field(default_factory=dict)
    failures: tuple[str, ...] = ()

    @property
    def metrics(self) -> Metrics:
        """TRL's metrics of each reward, and those that functions logged."""
        found: Metrics = {}
        for name, column in zip(self.labels, self.scores.T, strict=True):
            there = column[~np.isnan(column)]
            if len(there):
                found[f"rewards/{name}/mean"] = Mean(float(there.mean()), 1.0)
                found[f"rewards/{name}/std"] = Mean(float(there.std(ddof=1)) if len(there) > 1 else 0.0, 1.0)
        if self.failures:
            found["rewards/failures"] = Mean(float(len(self.failures)), 1.0)
        logged = {name: Mean(float(sum(values)), float(len(values))) for name, values in self.logged.items()}
        return found | logged

    def totals(self, weights: Sequence[float] | None) -> np.ndarray:
        """[N] the weighted sums, NaN where nothing judged; columns after the weights given count once."""
        each = np.ones(self.scores.shape[1])
        each[: len(weights or ())] = weights or ()
        unjudged = np.isnan(self.scores).all(axis=1)
        return np.where(unjudged, np.nan, np.nansum(self.scores * each, axis=1))

    def right(self, group: int, threshold: float) -> Metrics:
        """Of each reward the share of completions that reach the threshold, and pass@k for one and for all `group` of a
        prompt."""
        scores, found = self.scores.reshape(-1, group, len(self.labels)), {}
        for number, label in enumerate(self.labels):
            told = scored(scores[:, :, number], threshold, sorted({1, group}))
            for name in told.keys() - {"mean", "std"}:
                if (value := told[name]) is not None:
                    found[f"rewards/{label}/{name}"] = Mean(value, 1.0)
        return found

    def picked(self, rows: Sequence[int]) -> Verdict:
        """That on some of the completions."""
        extra = {name: [column[row] for row in rows] for name, column in self.extra.items()}
        return Verdict(self.labels, self.scores[list(rows)], extra, self.logged, self.failures)

    def __add__(self, other: Verdict) -> Verdict:
        count, more = len(self.scores), len(other.scores)
        names = dict.fromkeys((*self.extra, *other.extra))
        extra = {
            name: [*self.extra.get(name, [None] * count), *other.extra.get(name, [None] * more)]
            for name in names
        }
        both = dict.fromkeys((*self.logged, *other.logged))
        logged = {name: [*self.logged.get(name, ()), *other.logged.get(name, ())] for name in both}
        scores = np.concatenate([self.scores, other.scores])
        return Verdict(self.labels, scores, extra, logged, self.failures + other.failures)


class Judge:
    """Functions and models, whose columns after each other are put in `order`, and then the punishment of completions
    that near `overlong` = (most tokens, the last of them that cost). `close` it: functions have processes of their own.
    """

    def __init__(
        self,
        functions: Rewards | None,
        models: Sequence[Scorer] = (),
        overlong: tuple[int, int] | None = None,
        *,
        order: Sequence[int] | None = None,
    ):
        self.functions, self.models, self.overlong = functions, models, overlong
        named = [*(functions.labels if functions else ()), *(model.label for model in models)]
        self.order = range(len(named)) if order is None else order
        self.labels = (
            *_distinct([named[column] for column in self.order]),
            *([OVERLONG] if overlong else ()),
        )

    def close(self) -> None:
        """Ends the functions' processes."""
        if self.functions:
            self.functions.close()

    def load(self) -> None:
        """Reads the models' weights."""
        for model in self.models:
            model.load()

    def submit(self, batch: Batch) -> Callable[[], Verdict]:
        """Sets the functions to work; the verdict is that of all, waited for."""
        pending = self.functions.submit(batch) if self.functions and jax.process_index() == 0 else None
        columns = [model(batch.prompts, batch.completions) for model in self.models]
        found: list[Verdict] = []

        def verdict() -> Verdict:
            if not found:
                found.append(self._verdict(pending, columns, batch))
            return found[0]

        return verdict

    def _verdict(self, pending: Any, columns: Sequence[np.ndarray], batch: Batch) -> Verdict:
        scores = list(columns)
        extra, logged, failures = {}, {}, ()
        if pending is not None:
            scored = pending.result()
            scores = [*scored.scores.T, *scores]
            extra, logged, failures = scored.extra, scored.metrics, tuple(scored.failures)
        elif self.functions:
            scores = [np.zeros(len(batch.prompts)) for _ in self.functions.labels] + scores
        scores = [scores[column] for column in self.order]
        if self.overlong:
            scores.append(self._overlong(batch))
        return Verdict(self.labels, _agreed(np.stack(scores, axis=1)), extra, logged, failures)

    def _overlong(self, batch: Batch) -> np.ndarray:
        from ntjax.losses.advantages import overlong_penalty

        assert self.overlong
        return np.asarray(
            overlong_penalty(np.array([len(ids) for ids in batch.completion_ids]), *self.overlong)
        )

    def state(self) -> dict[str, Any] | None:
        """What the functions remember, as JSON."""
        return self.functions.state() if self.functions else None

    def load_state(self, state: dict[str, Any]) -> None:
        """Functions go on from what they remembered."""
        if self.functions:
            self.functions.load_state(state)


def scored(scores: np.ndarray, threshold: float, pass_at: Sequence[int]) -> dict[str, float | None]:
    """What is told of one reward's scores [P, K], NaN where it abstained; None where nothing was judged."""
    judged = ~np.isnan(scores)
    right = judged & (np.nan_to_num(scores) >= threshold)
    told = {"mean": mean(scores), "std": float(np.nanstd(scores)) if judged.any() else None}
    told["accuracy"] = mean(np.where(judged, right, np.nan))
    return told | {f"pass@{k}": passes(right.sum(axis=1), judged.sum(axis=1), k) for k in pass_at}


def passes(right: np.ndarray, drawn: np.ndarray, k: int) -> float | None:
    """The chance that one of k completions is right, estimated without bias from `right` [P] of `drawn` [P] that are
    (arXiv:2107.03374, eq. 1): the mean over prompts of which k or more were judged, None if there are none."""
    pairs = zip(right.tolist(), drawn.tolist(), strict=True)
    found = [1 - math.comb(n - c, k) / math.comb(n, k) for c, n in pairs if n >= k]
    return float(np.mean(found)) if found else None


def mean(values: np.ndarray) -> float | None:
    """Of those that are numbers; None if there are none."""
    return None if np.isnan(values).all() else float(np.nanmean(values))


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number to those that were there before."""
    before = Counter[str]()
    found = []
    for name in names:
        before[name] += 1
        found.append(name if before[name] == 1 else f"{name}_{before[name]}")
    return found


def _agreed(scores: np.ndarray) -> np.ndarray:
    """The first process's scores on all of them: functions run there alone."""
    if jax.process_count() == 1:
        return scores
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(scores))


def open_judge(job: Job, prompts: Prompts, layout: Layout, rows: int) -> Judge:
    """What rewards a stage's completions; functions are tried out on two rows.

    A reward is a function, a folder with a scoring model (run on `rows` completions at a time), or "stage:NAME":
    what that stage of this run made.
    """
    config, stage = job.config, job.stage
    assert isinstance(stage, RolloutConfig)
    path = f"stages.{config.stages.index(stage)}"
    where = config.where(f"{path}.reward_model_path")
    folders = [_model_folder(job, name, where) for name in stage.rewards]
    functions = [name for name, folder in zip(stage.rewards, folders, strict=True) if folder is None]
    models = [
        Scorer(
            folder,
            layout=layout,
            rows=rows,
            dtype=config.compute_dtype(stage),
            attention=config.model.attention,
            template=stage.chat_template_kwargs,
        )
        for folder in folders
        if folder is not None
    ]
    rewards = None
    if functions:
        rewards = Rewards(
            functions,
            config.path.parent,
            where=config.where(f"{path}.reward_function"),
            timeout=stage.reward_timeout,
            on_error=stage.reward_errors,
            budget=stage.reward_error_budget,
        )
        if jax.process_index() == 0:
            rewards.check(tryout(prompts))
    cache = getattr(stage, "soft_punish_cache", None)
    overlong = (stage.completion_length, cache) if cache else None
    places = np.argsort(
        [folder is not None for folder in folders], kind="stable"
    )  # of the columns in the config
    return Judge(rewards, models, overlong, order=np.argsort(places).tolist())


def _model_folder(job: Job, name: str, where: str) -> Path | None:
    """The model that a reward's name means; None where it names a function."""
    if name.startswith("stage:"):
        wanted = name.removeprefix("stage:")
        for known in (wanted, f"{wanted}_stage"):
            if known in job.results:
                return job.results[known]
        raise ConfigError(
            f"{name}: there is no such stage before this one",
            where=where,
            fix=f"name one of {', '.join(job.results)}" if job.results else "add a reward stage before it",
        )
    config = job.config
    if name == job.stage.reward_model_path:  # type: ignore[attr-defined]
        return locate(name, cache_dir=config.model.cache_dir, folders=[config.path.parent])
    folders = [config.path.parent / name, Path(name)]
    return next((folder for folder in folders if (folder / "config.json").exists()), None)
