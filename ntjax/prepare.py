"""Everything a stage needs but its weights: model, tokenizer, examples, plan.

Whatever can go wrong cheaply goes wrong here, before weights are read.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from ntjax import lookup
from ntjax.checkpoint import read_meta, saved_steps
from ntjax.config import Config, dataset_for
from ntjax.data.encode import check_stop_token
from ntjax.data.encoded import Encoded
from ntjax.data.loader import Plan
from ntjax.errors import CheckpointError
from ntjax.hf.files import read_config
from ntjax.hf.tokenizer import check_vocab, load_tokenizer, pad_id
from ntjax.mesh import make_mesh
from ntjax.models import Model, build
from ntjax.runs import check_unchanged
from ntjax.stages.base import StageConfig
from ntjax.stages.rows import stage_rows

# Settings that may differ when a stage is resumed: they change what is written, not what is computed.
FREE = {"stage_name", "output_dir", "load_from", "save_strategy", "save_steps", "save_total_limit"}
FREE |= {"load_best_model_at_end", "metric_for_best_model", "greater_is_better"}

log = logging.getLogger(__name__)


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
    """Examples, and the plan that says which of them each step sees."""

    plan: Plan
    examples: Encoded

    def tokens(self, step: int) -> int:
        """Tokens, padding left out, that a step reads over all processes."""
        return sum(
            int(self.plan.lengths[row]) for rows in self.plan.slots(step) for slot in rows for row in slot
        )


@dataclass(frozen=True)
class Setup:
    """All that a stage needs but its weights. `settings` are what must not differ when it is resumed."""

    job: Job
    tokenizer: Any
    model: Model
    mesh: jax.sharding.Mesh
    train: Data
    evaluation: Data | None
    settings: dict[str, Any]


def prepare(job: Job) -> Setup:
    """Reads everything but the weights; every error that data or settings can cause is raised here."""
    config, stage = job.config, job.stage
    # Filled in when the config was resolved.
    assert stage.seed is not None
    assert stage.per_device_eval_batch_size is not None
    hf = read_config(job.source)
    model = build(hf, dtype=config.compute_dtype(stage), remat=bool(stage.gradient_checkpointing))
    tokenizer = load_tokenizer(job.source)
    check_vocab(tokenizer, model.config.vocab)
    if pad_id(tokenizer) == tokenizer.eos_token_id:
        log.info("%s: rows are padded with the end token %r, masked", stage.stage_name, tokenizer.eos_token)
    train, evaluation = encoded_rows(config, stage, tokenizer, model.config.vocab)
    log.info("%s: %s", stage.stage_name, train.report())
    if warning := check_stop_token(train, tokenizer):
        log.warning("warning: %s", warning)
    mesh = make_mesh()
    dataset = dataset_for(config, stage)[1]
    data = Data(
        Plan(
            train.lengths,
            stage.row_length,
            stage.per_device_train_batch_size * mesh.size,
            stage.gradient_accumulation_steps,
            stage.num_train_epochs,
            stage.max_steps,
            dataset.shuffle,
            stage.seed,
            stage.packs,
        ),
        train,
    )
    rows = data.plan.rows_per_microbatch * data.plan.accumulation
    log.info("%s: %d steps of %d rows on %d devices", stage.stage_name, data.plan.steps, rows, mesh.size)
    held_out = None
    if stage.do_eval and evaluation is not None:
        rows = stage.per_device_eval_batch_size * mesh.size
        plan = Plan(evaluation.lengths, stage.row_length, rows, shuffle=False, packing=stage.packs)
        held_out = Data(plan, evaluation)
    settings = _settings(job, train)
    if job.resume:
        _check_settings(job, settings)
    return Setup(job, tokenizer, model, mesh, data, held_out, settings)


def encoded_rows(
    config: Config, stage: StageConfig, tokenizer: Any, vocab: int
) -> tuple[Encoded, Encoded | None]:
    """The stage's training examples, and its evaluation examples where it evaluates."""
    name, dataset = dataset_for(config, stage)
    function = None
    if dataset.formatting_func is not None:
        place = config.where(f"datasets.{name}.formatting_func")
        function = lookup.function(dataset.formatting_func, config.path.parent, place)
    assert stage.seed is not None
    rows, held_out = stage_rows(config, dataset, stage.seed)
    encoded = stage.encode(rows, tokenizer, dataset, function, vocab)
    if held_out is None or not stage.do_eval:
        return encoded, None
    return encoded, stage.encode(held_out, tokenizer, dataset, function, vocab)


def _settings(job: Job, train: Encoded) -> dict[str, Any]:
    """Everything that decides what the stage computes."""
    stage = {key: value for key, value in asdict(job.stage).items() if key not in FREE}
    stage = {key: value for key, value in stage.items() if not key.startswith(("eval_", "logging_"))}
    model = {f"model.{key}": getattr(job.config.model, key) for key in ("dtype", "param_dtype")}
    shuffle = dataset_for(job.config, job.stage)[1].shuffle
    everything = {**stage, **model, "devices": jax.device_count(), "shuffle": shuffle, "data": train.digest()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in everything.items()}


def _check_settings(job: Job, settings: dict[str, Any]) -> None:
    """Raises ConfigError if the checkpoint to go on from, or the newest that can be read, had other settings."""
    steps = saved_steps(job.folder) if job.resume_step is None else [job.resume_step]
    for step in reversed(steps):
        with suppress(CheckpointError):  # damaged; restoring passes it over too
            return check_unchanged(
                read_meta(job.folder, step)["settings"], settings, allowed=job.allow_changed
            )
    return None
