"""What a stage is fed: batches of a plan made beforehand or of a stream read meanwhile, or prompts to ask."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from ntjax import lookup
from ntjax.config import Config, dataset_for
from ntjax.data.encode import check_stop_token
from ntjax.data.lazy import Files, Hub, open_lazily
from ntjax.data.loader import Examples, Joined, Plan, batches, permutation
from ntjax.data.pictures import Vision
from ntjax.data.pooled import Pooling
from ntjax.data.prompts import Prompts
from ntjax.data.rows import check_image_field
from ntjax.data.sizes import PARTS
from ntjax.data.stream import Stream, ahead
from ntjax.data.text import TextEncoder
from ntjax.hf.tokenizer import pad_id
from ntjax.layout import Layout
from ntjax.mesh import own_share
from ntjax.metrics import Metrics
from ntjax.stages.base import StageConfig
from ntjax.stages.rollout import Geometry, RolloutConfig
from ntjax.stages.rows import stage_rows

log = logging.getLogger(__name__)


class Fed(NamedTuple):
    """The arrays of a step [microbatches, rows of this process, ...], and what is known of it over all processes.

    `epoch` is that after the step; `position` is what a stream or a window of completions goes on from after it, None
    where the step says it.
    """

    batch: dict[str, np.ndarray]
    tokens: int
    epoch: float
    position: dict[str, Any] | None = None
    metrics: Metrics = {}  # what is known of the step's data beside


@dataclass(frozen=True)
class Planned:
    """Examples, and the plan that says which of them each step sees; this process reads one share of its rows.

    With `vision` their pictures are shown, in a pool for each of `groups` of rows, over all processes.
    """

    plan: Plan
    examples: Examples
    pad_id: int
    share: tuple[int, int] = (0, 1)  # number and count, see `mesh.own_share`
    vision: Pooling | None = None
    groups: int = 1

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.plan.steps

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return self.plan.steps_per_epoch

    def tokens(self, step: int) -> int:
        """Tokens, padding left out, that a step reads over all processes."""
        sizes = self.examples.sizes
        return sum(int(sizes[row]) for rows in self.plan.slots(step) for slot in rows for row in slot)

    @contextmanager
    def open(self, start: int = 0, position: dict[str, int] | None = None) -> Iterator[Iterator[Fed]]:
        """The steps from `start` on."""
        rows = batches(
            self.plan,
            self.examples,
            self.pad_id,
            start=start,
            process_index=self.share[0],
            process_count=self.share[1],
            vision=self.vision,
            groups=self.groups,
        )
        yield (
            Fed(batch, self.tokens(step), self.plan.epoch(step + 1)) for step, batch in enumerate(rows, start)
        )


@dataclass(frozen=True)
class Streamed:
    """Text that is read, tokenised and packed while it is trained on."""

    source: Files | Hub
    encoder: TextEncoder
    steps: int
    length: int
    rows: int  # of a microbatch, over all processes
    accumulation: int
    max_bad_rows: int
    pad_id: int
    share: tuple[int, int] = (0, 1)

    @property
    def steps_per_epoch(self) -> int:
        """Not known: the whole stage counts as one."""
        return self.steps

    @contextmanager
    def open(self, start: int = 0, position: dict[str, int] | None = None) -> Iterator[Iterator[Fed]]:
        """The steps from `start` on, which begin at `position`."""
        stream = Stream(
            self.source,
            self.encoder,
            self.length,
            self.rows,
            self.accumulation,
            self.pad_id,
            position,
            max_bad_rows=self.max_bad_rows,
            process_index=self.share[0],
            process_count=self.share[1],
        )
        rows = ahead(stream)
        try:
            steps = zip(range(start, self.steps), rows, strict=False)
            yield (Fed(batch, tokens, float(at["epoch"]), at) for _, (batch, at, tokens) in steps)
        finally:
            rows.close()


@dataclass(frozen=True)
class Questions:
    """Prompts in the order in which they are asked: pass after pass, each in an order of its own with `shuffle`."""

    prompts: Prompts
    geometry: Geometry
    steps: int
    shuffle: bool
    seed: int
    pad_id: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the prompts."""
        return self.geometry.steps_per_epoch(len(self.prompts))

    def number(self, asked: int) -> int:
        """Which prompt comes after `asked` others."""
        epoch, within = divmod(asked, len(self.prompts))
        return int(permutation(len(self.prompts), self.seed, epoch)[within]) if self.shuffle else within

    def order(self, window: int) -> np.ndarray:
        """The rows of each step of a window: [steps, accumulation, rows]."""
        shape = self.geometry
        drawn = np.random.default_rng([self.seed, 1, window])
        epochs = [drawn.permutation(shape.completions) for _ in range(shape.epochs)]
        return np.concatenate(epochs).reshape(shape.steps, shape.accumulation, shape.rows)


Feed = Planned | Streamed | Questions


def feeds(
    config: Config,
    stage: StageConfig,
    tokenizer: Any,
    vision: Pooling | None,
    vocab: int,
    layout: Layout,
    shares: bool = False,
) -> tuple[Feed, Planned | Questions | None, str]:
    """What the stage is trained and evaluated on, and a digest of the former. If it `shares`, pairs have what both
    begin with once."""
    dataset, pad = dataset_for(config, stage)[1], pad_id(tokenizer)
    assert stage.seed is not None
    assert stage.per_device_eval_batch_size is not None
    devices, share = layout.rows, own_share(layout.mesh)
    rows, accumulation = stage.per_device_train_batch_size * devices, stage.gradient_accumulation_steps
    examples, held_out = encoded_rows(config, stage, tokenizer, vocab, vision)
    if stage.rolls_out:
        assert examples is not None
        assert isinstance(stage, RolloutConfig)
        log.info("%s: %s", stage.stage_name, examples.report())
        return *_questions(config, stage, examples, held_out, devices, pad), examples.digest()
    packs: dict[str, Any] = {"packing": stage.packs, "in_order": stage.packs_in_order}
    # Pictures share a pool that has room for those of a microbatch as it is: they keep their rows.
    packs |= {"fills": stage.fills and vision is None, "groups": devices}
    packs["parts"] = PARTS.get(layout.platform, 1)
    evaluation = None
    if held_out is not None:
        many = stage.per_device_eval_batch_size * devices
        plan = Plan(
            held_out.lengths,
            stage.row_length,
            many,
            shuffle=False,
            joined=_joined_lengths(held_out, shares),
            **packs,
        )
        evaluation = Planned(plan, held_out, pad, share, vision, layout.rows)
    if examples is None:
        encoder = TextEncoder(tokenizer, dataset, None, _formatting(config, stage), vision=vision)
        source = open_lazily(dataset, [config.path.parent, Path.cwd()])
        for read, where in islice(source(0), 1):
            encoder.check(read(), where)
        log.info("%s: rows are streamed in the order of the files", stage.stage_name)
        shape = stage.max_steps, stage.row_length, rows, accumulation
        feed = Streamed(source, encoder, *shape, dataset.max_bad_rows, pad, share)
        return feed, evaluation, source.digest()
    log.info("%s: %s", stage.stage_name, examples.report())
    if stage.learns_to_stop and (warning := check_stop_token(examples, tokenizer)):
        log.warning("warning: %s", warning)
    plan = Plan(
        examples.lengths,
        stage.row_length,
        rows,
        accumulation,
        stage.num_train_epochs,
        stage.max_steps,
        dataset.shuffle,
        stage.seed,
        joined=_joined_lengths(examples, shares),
        **packs,
    )
    return Planned(plan, examples, pad, share, vision, layout.rows), evaluation, examples.digest()


def _joined_lengths(examples: Examples, shares: bool) -> np.ndarray | None:
    return cast(Joined, examples).joined_lengths if shares else None


def _questions(
    config: Config, stage: RolloutConfig, prompts: Any, held_out: Any, devices: int, pad: int
) -> tuple[Questions, Questions | None]:
    """The prompts that are asked in training and in evaluation."""
    assert stage.seed is not None
    shape, dataset = stage.geometry(devices), dataset_for(config, stage)[1]
    given = stage.per_device_train_batch_size * devices
    if shape.rows != given:
        log.info(
            "%s: %d completions a microbatch instead of %d, so that a window is whole groups of %d",
            *(stage.stage_name, shape.rows, given, shape.group),
        )
    log.info(
        "%s: windows of %d completions, %d of each of %d prompts, are trained on for %d steps",
        *(stage.stage_name, shape.completions, shape.group, shape.completions // shape.group, shape.steps),
    )
    steps = stage.total_steps(shape, len(prompts))
    train = Questions(prompts, shape, steps, dataset.shuffle, stage.seed, pad)
    if held_out is None:
        return train, None
    return train, replace(train, prompts=held_out, shuffle=False)


def encoded_rows(
    config: Config, stage: StageConfig, tokenizer: Any, vocab: int, vision: Vision | None = None
) -> tuple[Examples | None, Examples | None]:
    """The stage's training examples, None where they are streamed, and its evaluation examples where it evaluates."""
    name, dataset = dataset_for(config, stage)
    function = _formatting(config, stage)
    assert stage.seed is not None
    rows, held_out = stage_rows(config, dataset, stage.seed)
    if rows is not None:
        check_image_field(rows, dataset, vision, config.where(f"datasets.{name}.image_field"))
    encoded = None if rows is None else stage.encode(rows, tokenizer, dataset, function, vocab, vision)
    if held_out is None or not stage.do_eval:
        return encoded, None
    return encoded, stage.encode(held_out, tokenizer, dataset, function, vocab, vision)


def _formatting(config: Config, stage: StageConfig) -> Callable[..., Any] | None:
    """The data set's `formatting_func`."""
    name, dataset = dataset_for(config, stage)
    if dataset.formatting_func is None:
        return None
    place = config.where(f"datasets.{name}.formatting_func")
    return lookup.function(dataset.formatting_func, config.path.parent, place)
