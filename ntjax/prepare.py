"""Everything a stage needs but its weights: model, tokenizer, examples, plan.

Whatever can go wrong cheaply goes wrong here, before weights are read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ntjax import lookup, lora
from ntjax.checkpoint import read_meta, saved_steps
from ntjax.config import Config, dataset_for
from ntjax.data.encode import check_stop_token
from ntjax.data.lazy import open_lazily
from ntjax.data.loader import Examples, Plan
from ntjax.data.text import TextEncoder
from ntjax.errors import CheckpointError, ConfigError
from ntjax.feed import Feed, Planned, Questions, Streamed
from ntjax.hf.files import read_config
from ntjax.hf.hub import locate
from ntjax.hf.tokenizer import check_vocab, load_tokenizer, pad_id, stop_ids
from ntjax.judge import Judge, open_judge
from ntjax.layout import RULES, Layout
from ntjax.mesh import has_host_memory, make_mesh, own_share
from ntjax.models import Model, build, is_scoring, scoring_config
from ntjax.ops.attention import chosen
from ntjax.params import Params
from ntjax.policy import adapters
from ntjax.runs import check_unchanged
from ntjax.stages.base import StageConfig
from ntjax.stages.rollout import RolloutConfig
from ntjax.stages.rows import stage_rows

# Settings that may differ when a stage is resumed: they change what is written, not what is computed.
FREE = {"stage_name", "output_dir", "load_from", "save_strategy", "save_steps", "save_total_limit"}
FREE |= {
    "log_completions",
    "num_completions_to_print",
    "log_unique_prompts",
    "reward_timeout",
    "sampler_slots",
    "per_device_eval_batch_size",
}
FREE |= {"load_best_model_at_end", "metric_for_best_model", "greater_is_better"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A stage to run: what it starts from, where it writes, and whether it goes on from a checkpoint there.

    `base` is the name of `source` for people and for PEFT. `adapter` is a PEFT folder whose adapter is trained on, or
    merged where all weights are trained. `results` are the folders of the run's earlier stages.
    """

    config: Config
    stage: StageConfig
    source: Path
    folder: Path
    base: str = ""
    adapter: Path | None = None
    resume: bool = False
    resume_step: int | None = None  # None: the newest
    allow_changed: bool = False
    results: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """All that a stage needs but its weights. `settings` are what must not differ when it is resumed.

    `adapters` says which are trained, None that all weights are; `adapter` is what was trained of one before.
    `reference` is the model a stage is held against, where it isn't its own start; `judge` rewards what the policy
    draws, which ends with one of `stop_ids`.
    """

    job: Job
    tokenizer: Any
    model: Model
    adapters: lora.Plan | None
    adapter: tuple[lora.Plan, Params] | None
    reference: tuple[Model, Path] | None
    layout: Layout
    train: Feed
    evaluation: Planned | Questions | None
    settings: dict[str, Any]
    stop_ids: tuple[int, ...]
    judge: Judge | None = None


def prepare(job: Job) -> Setup:
    """Reads everything but the weights; every error that data or settings can cause is raised here."""
    stage = job.stage
    hf = read_config(job.source)
    layout = layout_of(job.config)
    model = _model(hf, job, layout)
    plan, adapter = _adapters(job, model)
    specs = model.specs | (plan.specs(model.specs) if plan else {})
    layout.check(specs, lambda axis: job.config.where(f"mesh.{axis}"))
    tokenizer = load_tokenizer(job.source)
    check_vocab(tokenizer, model.config.vocab)
    if pad_id(tokenizer) == tokenizer.eos_token_id:
        log.info("%s: rows are padded with the end token %r, masked", stage.stage_name, tokenizer.eos_token)
    train, evaluation, digest = _feeds(job, tokenizer, model.config.vocab, layout)
    log.info("%s: %d steps on %s", stage.stage_name, train.steps, layout)
    log.info("%s: attention: %s", stage.stage_name, model.config.attention)
    settings = _settings(job, digest, layout)
    if job.resume:
        _check_settings(job, settings)
    reference, stops = _reference(job, model), tuple(stop_ids(job.source, tokenizer))
    setup = Setup(job, tokenizer, model, plan, adapter, reference, layout, train, evaluation, settings, stops)
    if isinstance(train, Questions):
        return replace(setup, judge=open_judge(job, train.prompts, layout, train.geometry.rows))
    return setup


def layout_of(config: Config, devices: Sequence[Any] | None = None) -> Layout:
    """How weights and rows lie on `devices`, by default on those there are."""
    asked = config.mesh
    slices = {"data": asked.dcn_data, "fsdp": asked.dcn_fsdp}
    mesh = make_mesh(asked.sizes, devices, slices=slices, where=config.where("mesh"))
    for setting, what, stage in (
        ("offload_optimizer", "the optimizer's state", 1),
        ("offload_param", "weights", 3),
    ):
        if getattr(asked, setting) and not has_host_memory(mesh):
            raise ConfigError(
                f"{setting} = true, but {mesh.devices.flat[0].platform} devices can't reach the host's memory",
                where=config.where(f"mesh.{setting}"),
                fix=f"leave it out; zero_stage = {stage} and more devices share {what} out",
            )
    chosen(config.attention, mesh.devices.flat[0].platform, config.where("model.attention"))
    return Layout(mesh, asked.zero, tuple({**RULES, **asked.rules}.items()), asked.offload_param)


def _model(hf: dict[str, Any], job: Job, layout: Layout) -> Model:
    """The stage's model; a folder that holds a reward model is no policy."""
    config, stage = job.config, job.stage
    if is_scoring(hf) and not stage.scores:
        raise ConfigError(
            f"{job.source} is a reward model: it has no language head to train in {stage.stage_name}",
            where=config.where(f"stages.{config.stages.index(stage)}.load_from"),
            fix="name a language model, or the stage before the reward model with load_from",
        )
    if "quantization_config" in hf and not config.model.use_lora:
        raise ConfigError(
            f"{job.source} is quantised: its weights are frozen, and nothing would be trained",
            where=config.where("model.model_name_or_path"),
            fix="set use_lora = true, or name the unquantised model",
        )
    return build(
        scoring_config(hf) if stage.scores else hf,
        dtype=config.compute_dtype(stage),
        remat=stage.remat or "none",
        labels=int(stage.scores),
        attention=config.attention,
        layout=layout,
    )


def _adapters(job: Job, model: Model) -> tuple[lora.Plan | None, tuple[lora.Plan, Params] | None]:
    """What the stage trains of adapters, and the adapter that it starts from or merges."""
    config = job.config
    plan, adapter = adapters(
        config.model,
        model.specs,
        job.adapter,
        where=lambda setting: config.where(f"model.lora_config.{setting}"),
    )
    if plan is not None and getattr(job.stage, "disable_dropout", False):
        plan = replace(plan, rate=0.0)
    return plan, adapter


def _reference(job: Job, own: Model) -> tuple[Model, Path] | None:
    """The model that `reference_model_path` names."""
    config, stage = job.config, job.stage
    sync = getattr(stage, "sync_ref_model", False)
    if sync and config.model.use_lora:
        raise ConfigError(
            "with adapters the reference is the frozen model, which can't follow the policy",
            where=config.where(f"stages.{config.stages.index(stage)}.sync_ref_model"),
            fix="leave it out, or train all weights with use_lora = false",
        )
    named = getattr(stage, "reference_model_path", None)
    if named is None:
        return None
    folder = locate(named, cache_dir=config.model.cache_dir, folders=[config.path.parent])
    hf = read_config(folder)
    model = build(hf, dtype=config.compute_dtype(stage), attention=config.attention, layout=own.layout)
    if sync and model.specs != own.specs:
        raise ConfigError(
            f"{named} is another model than the policy, and can't follow it",
            where=config.where(f"stages.{config.stages.index(stage)}.sync_ref_model"),
            fix="leave out sync_ref_model or reference_model_path",
        )
    return model, folder


def _questions(
    job: Job, prompts: Any, held_out: Any, devices: int, pad: int
) -> tuple[Questions, Questions | None]:
    """The prompts that are asked in training and in evaluation."""
    stage, dataset = job.stage, dataset_for(job.config, job.stage)[1]
    assert isinstance(stage, RolloutConfig)
    assert stage.seed is not None
    shape = stage.geometry(devices)
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


def _feeds(
    job: Job, tokenizer: Any, vocab: int, layout: Layout
) -> tuple[Feed, Planned | Questions | None, str]:
    """What the stage is trained and evaluated on, and a digest of the former."""
    config, stage = job.config, job.stage
    dataset, pad = dataset_for(config, stage)[1], pad_id(tokenizer)
    assert stage.seed is not None
    assert stage.per_device_eval_batch_size is not None
    devices, share = layout.rows, own_share(layout.mesh)
    rows, accumulation = stage.per_device_train_batch_size * devices, stage.gradient_accumulation_steps
    examples, held_out = encoded_rows(config, stage, tokenizer, vocab)
    if stage.rolls_out:
        assert examples is not None
        log.info("%s: %s", stage.stage_name, examples.report())
        return *_questions(job, examples, held_out, devices, pad), examples.digest()
    evaluation = None
    if held_out is not None:
        many = stage.per_device_eval_batch_size * devices
        plan = Plan(held_out.lengths, stage.row_length, many, shuffle=False, packing=stage.packs)
        evaluation = Planned(replace(plan, in_order=stage.packs_in_order), held_out, pad, share)
    if examples is None:
        encoder = TextEncoder(tokenizer, dataset, None, _formatting(config, stage))
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
        stage.packs,
        stage.packs_in_order,
    )
    return Planned(plan, examples, pad, share), evaluation, examples.digest()


def encoded_rows(
    config: Config, stage: StageConfig, tokenizer: Any, vocab: int
) -> tuple[Examples | None, Examples | None]:
    """The stage's training examples, None where they are streamed, and its evaluation examples where it evaluates."""
    dataset = dataset_for(config, stage)[1]
    function = _formatting(config, stage)
    assert stage.seed is not None
    rows, held_out = stage_rows(config, dataset, stage.seed)
    encoded = None if rows is None else stage.encode(rows, tokenizer, dataset, function, vocab)
    if held_out is None or not stage.do_eval:
        return encoded, None
    return encoded, stage.encode(held_out, tokenizer, dataset, function, vocab)


def _formatting(config: Config, stage: StageConfig) -> Callable[..., Any] | None:
    """The data set's `formatting_func`."""
    name, dataset = dataset_for(config, stage)
    if dataset.formatting_func is None:
        return None
    place = config.where(f"datasets.{name}.formatting_func")
    return lookup.function(dataset.formatting_func, config.path.parent, place)


def _settings(job: Job, digest: str, layout: Layout) -> dict[str, Any]:
    """Everything that decides what the stage computes. How many devices share a step's rows, and in how many
    microbatches, does not."""
    stage = {key: value for key, value in asdict(job.stage).items() if key not in FREE}
    stage = {key: value for key, value in stage.items() if not key.startswith(("eval_", "logging_"))}
    settings = job.config.model
    model = {f"model.{key}": getattr(settings, key) for key in ("dtype", "param_dtype")}
    if settings.use_lora:
        model |= {f"model.lora_config.{key}": value for key, value in asdict(settings.lora_config).items()}
        model |= {f"model.{key}": getattr(settings, key) for key in ("load_in_4bit", "load_in_8bit")}
        model |= {f"model.bnb_config.{key}": value for key, value in asdict(settings.bnb_config).items()}
    shuffle = dataset_for(job.config, job.stage)[1].shuffle
    rows = layout.rows * job.stage.per_device_train_batch_size * job.stage.gradient_accumulation_steps
    if job.stage.rolls_out:
        stage["devices"] = layout.rows
    else:
        del stage["per_device_train_batch_size"], stage["gradient_accumulation_steps"]
    everything = {**stage, **model, "rows of a step": rows, "shuffle": shuffle, "data": digest}
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
