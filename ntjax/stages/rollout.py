"""What stages share that draw completions from the policy and have them rewarded.

Axes: B rows, T time of prompt and completion together, C time of completions, D embed, N completions of a window,
F rewards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ntjax.config.settings import UnfitError, check, setting, settings_of
from ntjax.stages.base import StageConfig, standing

if TYPE_CHECKING:
    import numpy as np

    from ntjax.config import DatasetConfig
    from ntjax.data.files import Rows
    from ntjax.data.pictures import Vision
    from ntjax.data.prompts import Prompts
    from ntjax.metrics import Metrics
    from ntjax.models import Model
    from ntjax.params import Params
    from ntjax.sampler import Sampling
    from ntjax.step import Batch

SAMPLER = "the sampler is the trainer's own model, and there is no second engine"
# What generation_kwargs may change.
DRAWN = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop_strings"}


@dataclass(frozen=True)
class Geometry:
    """How a window of completions is drawn and trained on.

    It holds `parts` steps' worth of completions, each step of `accumulation` microbatches of `rows` (over all
    devices), `group` completions a prompt; they are gone over `epochs` times.
    """

    rows: int
    accumulation: int
    parts: int
    epochs: int
    group: int

    @property
    def completions(self) -> int:
        """Completions of a window."""
        return self.rows * self.accumulation * self.parts

    @property
    def steps(self) -> int:
        """Optimizer steps of a window."""
        return self.parts * self.epochs

    def steps_per_epoch(self, prompts: int) -> int:
        """Optimizer steps in one pass over the prompts."""
        return -(-prompts * self.group * self.epochs // (self.rows * self.accumulation))


class Judged(NamedTuple):
    """What a stage makes of a window's scores: arrays [N, ...] for its loss, each row's reward and advantage
    for people, metrics, and the state for the next window."""

    arrays: dict[str, np.ndarray]
    rewards: np.ndarray
    advantages: np.ndarray
    metrics: Metrics
    state: dict[str, Any]


@dataclass(frozen=True)
class RolloutConfig(StageConfig):
    """Settings of drawing and of rewards; `per_device_train_batch_size` counts completions."""

    reward_function: tuple[str, ...] | None = setting(None, aliases=("reward_functions", "reward_funcs"))
    reward_weights: tuple[float, ...] | None = setting(None)
    reward_model_path: str | None = setting(None, aliases=("reward_model_name_or_path",))
    reward_batch_size: int | None = setting(None, at_least=1)  # completions a call is given; None: a window
    reward_timeout: float = setting(60.0, above=0)  # seconds a call may take
    reward_errors: str = setting("raise", choices=("raise", "mask"))
    reward_error_budget: int = setting(10, at_least=0)  # calls that may fail before the run does
    max_length: int = setting(1024, at_least=1, aliases=("max_seq_length", "max_prompt_length"))
    temperature: float = setting(1.0, above=0)
    top_p: float = setting(1.0, above=0, at_most=1)
    top_k: int = setting(0, at_least=0)
    min_p: float | None = setting(None, at_least=0, at_most=1)
    repetition_penalty: float = setting(1.0, above=0)
    stop_strings: tuple[str, ...] = setting(())
    sampler_slots: int = setting(64, at_least=1, aliases=("local_rollout_forward_batch_size",))
    sampler_weights: str = setting("auto", choices=("auto", "copied", "held"))
    generate_ahead: bool = setting(False)  # one window: by the policy as it was a window before
    generation_kwargs: dict[str, Any] = setting({})
    chat_template_kwargs: dict[str, Any] = setting({})
    eval_temperature: float | None = setting(None, at_least=0)  # 0: greedy; None: that of training
    eval_threshold: float | None = setting(None)  # the reward from which a completion counts as right
    log_completions: bool = setting(False)
    num_completions_to_print: int | None = setting(None, at_least=1)
    log_unique_prompts: bool = setting(False)

    best_metric: ClassVar[str] = "reward"
    rolls_out: ClassVar[bool] = True
    # Reward functions see every column.
    inherent = {**StageConfig.inherent, "remove_unused_columns": False}

    @property
    def completion_length(self) -> int:
        """Most tokens of a completion."""
        raise NotImplementedError

    @property
    def row_length(self) -> int:
        return self.max_length + self.completion_length

    @property
    def regroups(self) -> bool:
        """Whether it is all the same in which microbatch of its step a completion is."""
        return False

    def geometry(self, devices: int) -> Geometry:
        """The shape of a window on so many devices."""
        raise NotImplementedError

    def total_steps(self, shape: Geometry, prompts: int) -> int:
        """Optimizer steps in all."""
        if self.max_steps > 0:
            return self.max_steps
        return math.ceil(self.num_train_epochs * shape.steps_per_epoch(prompts))

    def judged(self, window: Mapping[str, np.ndarray], scores: np.ndarray, state: dict[str, Any]) -> Judged:
        """Advantages and what else the loss needs, of a window and its scores [N, F] (NaN: none), on the host.

        `window` has `mask` and `lengths` and `stopped`, and what `policy_scores` and `reference_scores` found.
        """
        raise NotImplementedError

    def policy_scores(self, model: Model) -> Callable[[Params, Batch], Batch] | None:
        """(the policy's weights, a microbatch) -> arrays [B, C] of it as it was when it drew; None if none are
        looked at."""
        raise NotImplementedError

    def encode(
        self,
        rows: Rows,
        tokenizer: Any,
        dataset: DatasetConfig,
        formatting_func: Callable[..., Any] | None,
        vocab: int,
        vision: Vision | None = None,
    ) -> Prompts:
        """The prompts of every row; those longer than `max_length` are dropped."""
        from ntjax.data.prompts import PromptEncoder, encode_prompts
        from ntjax.data.rows import shown_rows

        template = self.chat_template_kwargs
        return encode_prompts(
            shown_rows(rows, dataset, vision),
            PromptEncoder(tokenizer, dataset, self.max_length, formatting_func, template, vision),
            max_bad_rows=dataset.max_bad_rows,
            vocab_size=vocab,
            workers=dataset.preprocessing_num_workers,
        )

    def sampling(self, stop_ids: tuple[int, ...], *, evaluating: bool = False) -> Sampling:
        """How completions are drawn."""
        from ntjax.sampler import Sampling

        declared = settings_of(type(self))
        said = {name: check(value, declared[name]) for name, value in self.generation_kwargs.items()}
        by = replace(self, **said, generation_kwargs={})
        cold = self.eval_temperature if evaluating else None
        return Sampling(
            max_new_tokens=self.completion_length,
            temperature=self.temperature if cold is None else cold,
            top_k=by.top_k,
            top_p=by.top_p,
            min_p=by.min_p or 0.0,
            repetition_penalty=by.repetition_penalty,
            stop_ids=stop_ids,
            stop_strings=by.stop_strings,
        )

    @property
    def rewards(self) -> list[str]:
        """The names of what rewards, in the order of their weights."""
        model = [self.reward_model_path] if self.reward_model_path else []
        return [*(self.reward_function or ()), *model]

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from super().conflicts()
        if not self.rewards:
            yield (
                "reward_function",
                f"a {self.stage_type} stage needs reward_function or reward_model_path",
            )
        if self.reward_weights is not None and len(self.reward_weights) != len(self.rewards):
            yield "reward_weights", f"{len(self.reward_weights)} weights for {len(self.rewards)} rewards"
        yield from (("generation_kwargs", said) for said in self._unfit())

    def idle(self) -> Iterator[tuple[str, str]]:
        yield from super().idle()
        if not self.log_completions:
            for name in ("num_completions_to_print", "log_unique_prompts"):
                yield name, "completions are shown with log_completions = true"
        if not self.do_eval:
            for name in ("eval_temperature", "eval_threshold", "num_generations_eval"):
                yield name, "nothing is evaluated; eval_strategy says when"

    def _unfit(self) -> Iterator[str]:
        """What is wrong with `generation_kwargs`."""
        for name, value in sorted(self.generation_kwargs.items()):
            if name not in DRAWN:
                yield f"no {name} can be set here, but {', '.join(sorted(DRAWN))}"
                continue
            try:
                found = check(value, settings_of(type(self))[name])
            except UnfitError as error:
                yield f"{name} = {value!r}: {error}"
                continue
            if name == "temperature" and found != self.temperature:
                yield f"temperature = {value!r}, but the stage's, which losses go by, is {self.temperature}"


class Scored(NamedTuple):
    """Of completions [B, C]: log-probs of their tokens, entropies, and the hidden states [B, C, D] before each."""

    logp: Any
    entropy: Any
    hidden: Any


def completion_scores(model: Model, params: Params, batch: Batch, temperature: float) -> Scored:
    """What a model says of the completions in a batch, as drawn at `temperature`.

    The head sees completions alone: hidden states are picked before it. Where completions share rows with their prompt
    (`data.grouped`), what it says of them is picked behind it.
    """
    import jax.numpy as jnp

    from ntjax.models.vision.pictures import Pictures

    tokens = batch["tokens"]
    hidden = model.hidden(params, tokens, standing(batch), Pictures.of(batch))
    if "prefixes" in batch:
        return _joined_scores(model, params, batch, hidden, temperature)
    at = batch["start"][:, None] + jnp.arange(batch["mask"].shape[1])
    at = jnp.minimum(at, tokens.shape[1] - 1)  # past the end is masked
    before = jnp.take_along_axis(hidden, at[..., None] - 1, axis=1)
    targets = jnp.take_along_axis(tokens, at, axis=1)
    drawn = (before / temperature).astype(before.dtype)
    found = model.logprobs(params, drawn, targets, batch["mask"])
    return Scored(found.logp, found.entropy, before)


def _joined_scores(model: Model, params: Params, batch: Batch, hidden: Any, temperature: float) -> Scored:
    """`completion_scores` of rows [R, T], in which completion b begins at place `start[b]` of row `row[b]`."""
    import jax.numpy as jnp

    tokens, mask = batch["tokens"], batch["mask"]
    drawn = (hidden / temperature).astype(hidden.dtype)
    found = model.logprobs(params, drawn, jnp.roll(tokens, -1, axis=1), batch["wanted"])
    at = (batch["row"] * tokens.shape[1] + batch["start"])[:, None] + jnp.arange(mask.shape[1]) - 1
    at = jnp.minimum(at, tokens.size - 1)  # past the end is masked
    logp, entropy = (jnp.where(mask, x.reshape(-1)[at], 0) for x in (found.logp, found.entropy))
    return Scored(logp, entropy, hidden.reshape(-1, hidden.shape[-1])[at])
