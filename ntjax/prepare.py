"""Everything a stage needs but its weights: model, tokenizer, examples, plan.

Whatever can go wrong cheaply goes wrong here, before weights are read.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ntjax import lora, parts
from ntjax.checkpoint import read_meta, saved_steps
from ntjax.config import Config, dataset_for
from ntjax.errors import CheckpointError, ConfigError
from ntjax.feed import Feed, Planned, Questions, feeds
from ntjax.hf.files import read_config
from ntjax.hf.hub import locate
from ntjax.hf.processor import load_words
from ntjax.hf.tokenizer import check_vocab, pad_id, stop_ids
from ntjax.hf.vision import Processor
from ntjax.judge import Judge, open_judge
from ntjax.layout import RULES, Layout
from ntjax.mesh import DATA, FSDP, has_host_memory, make_mesh
from ntjax.models import Model, build, is_scoring, scoring_config, sees
from ntjax.ops.attention import chosen
from ntjax.params import Params
from ntjax.policy import adapters
from ntjax.runs import check_unchanged
from ntjax.sharing import shares
from ntjax.stages.base import StageConfig

# Settings that may differ when a stage is resumed: they change what is written, not what is computed.
FREE = {"stage_name", "output_dir", "load_from", "save_strategy", "save_steps", "save_total_limit"}
FREE |= {
    "log_completions",
    "num_completions_to_print",
    "log_unique_prompts",
    "reward_timeout",
    "sampler_slots",
    "sampler_weights",
    "per_device_eval_batch_size",
}
FREE |= {
    "do_eval",
    "num_generations_eval",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
}

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

    @property
    def before(self) -> Path:
        """The folder of the model that the stage starts from: with an adapter that goes on, `source` is its base, and
        what the stage before left beside its weights is with the adapter."""
        stage = self.adapter.parent if self.adapter else self.source
        return stage if (stage / "config.json").exists() else self.source


@dataclass(frozen=True)
class Setup:
    """All that a stage needs but its weights. `settings` are what must not differ when it is resumed.

    `adapters` says which are trained, None that weights themselves are, but for those at the paths `frozen`; `adapter`
    is what was trained of one before.
    `reference` is the model a stage is held against, where it isn't its own start; `judge` rewards what the policy
    draws, which ends with one of `stop_ids`. A model that sees images has a `vision`. If it `shares`, a prompt is
    computed once for the sequences of a step that begin with it.
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
    frozen: frozenset[str] = frozenset()
    vision: Processor | None = None
    judge: Judge | None = None
    shares: bool = False


def prepare(job: Job) -> Setup:
    """Reads everything but the weights; every error that data or settings can cause is raised here."""
    stage = job.stage
    hf = read_config(job.source)
    tokenizer, vision = words_of(job.config, job.source, hf)
    layout = layout_of(job.config)
    model = _model(hf, job, layout)
    frozen = parts.frozen(stage.freeze, model.specs, parts.places(job.config, stage))
    plan, adapter = _adapters(job, model, frozen)
    specs = model.specs | (plan.specs(model.specs) if plan else {})
    layout.check(specs, lambda axis: job.config.where(f"mesh.{axis}"))
    check_vocab(tokenizer, model.config.vocab)
    if pad_id(tokenizer) == tokenizer.eos_token_id:
        log.info("%s: rows are padded with the end token %r, masked", stage.stage_name, tokenizer.eos_token)
    _check_rotations(job, model)
    shared = shares(job.config, stage, model, vision)
    train, evaluation, digest = feeds(
        job.config, stage, tokenizer, vision, model.config.vocab, layout, shared
    )
    log.info("%s: %d steps on %s", stage.stage_name, train.steps, layout)
    log.info("%s: attention: %s", stage.stage_name, model.config.attention)
    settings = _settings(job, digest, layout)
    if job.resume:
        _check_settings(job, settings)
    reference, stops = _reference(job, model), tuple(stop_ids(job.before, tokenizer))
    read = job, tokenizer, model, plan, adapter, reference, layout, train, evaluation, settings, stops
    setup = Setup(*read, frozen, vision, shares=shared)
    if isinstance(train, Questions):
        return replace(setup, judge=open_judge(job, train.prompts, layout, train.geometry.rows))
    return setup


def _check_rotations(job: Job, model: Model) -> None:
    """Raises ConfigError where rotations go by a document's length and no device sees all of it."""
    stretch, longest = model.config.rope.stretch, job.stage.row_length
    if model.layout and model.layout.sequence > 1 and stretch is not None and longest > stretch[2]:
        raise ConfigError(
            f"dynamic RoPE goes by a document's length past {stretch[2]} tokens; a row may have {longest}, and is split"
            f" by sequence = {model.layout.sequence}",
            where=job.config.where("mesh.sequence"),
            fix=f"leave sequence out, or max_length = {stretch[2]}",
        )


def words_of(config: Config, folder: Path, hf: dict[str, Any]) -> tuple[Any, Processor | None]:
    """A model's tokenizer, and what it makes of images; raises ConfigError unless `model_type` is what the model is."""
    settings = config.model
    if (settings.model_type == "vlm") != sees(hf):
        kinds = {True: "a vision-language model", False: "a language model, which sees no images"}
        raise ConfigError(
            f"model_type = {settings.model_type!r}, but {folder} is {kinds[sees(hf)]}",
            where=config.where("model.model_type"),
            fix=f'set it to "{"vlm" if sees(hf) else "llm"}"'
            + ("" if sees(hf) else ", or make one that does with ntjax.import --vision"),
        )
    least, most = settings.image_min_pixels, settings.image_max_pixels
    where = config.where(f"model.image_{'min' if most is None else 'max'}_pixels")
    return load_words(folder, hf, min_pixels=least, max_pixels=most, where=where)


def layout_of(config: Config, devices: Sequence[Any] | None = None) -> Layout:
    """How weights and rows lie on `devices`, by default on those there are."""
    asked = config.mesh
    slices = {"data": asked.dcn_data, "fsdp": asked.dcn_fsdp}
    mesh = make_mesh(asked.sizes, devices, slices=slices, where=config.where("mesh"))
    if asked.zero_stage and mesh.shape[DATA] > 1 and mesh.shape[FSDP] == 1:
        raise ConfigError(
            f"zero_stage = {asked.zero_stage}, but no devices share anything out: {mesh.shape[DATA]} are along data",
            where=config.where("mesh.zero_stage"),
            fix="put them along fsdp, or leave zero_stage out",
        )
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
    if asked.offload_optimizer and mesh.devices.flat[0].platform == "tpu":
        for number, one in enumerate(config.stages):
            if one.optimizer.endswith("_8bit"):  # the compiler fails: it tiles bytes there in another way
                raise ConfigError(
                    f"offload_optimizer = true, but TPUs can't hold {one.optimizer}'s bytes in the host's memory",
                    where=config.where(f"stages.{number}.optimizer"),
                    fix="leave one of them out, or take adamw_torch",
                )
    chosen(config.model.attention, mesh.devices.flat[0].platform, config.where("model.attention"))
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
    if stage.scores and sees(hf):
        raise ConfigError(
            f"{job.source} sees images, and transformers has no reward models that do",
            where=config.where(f"stages.{config.stages.index(stage)}.stage_type"),
            fix="train the reward model from a language model, in a config of its own",
        )
    return build(
        scoring_config(hf) if stage.scores else hf,
        dtype=config.compute_dtype(stage),
        remat=stage.remat or "none",
        labels=int(stage.scores),
        attention=config.model.attention,
        layout=layout,
    )


def _adapters(
    job: Job, model: Model, frozen: frozenset[str]
) -> tuple[lora.Plan | None, tuple[lora.Plan, Params] | None]:
    """What the stage trains of adapters, and the adapter that it starts from or merges."""
    config = job.config
    plan, adapter = adapters(
        config.model,
        model.specs,
        job.adapter,
        where=lambda setting: config.where(f"model.lora_config.{setting}"),
        frozen=frozen,
        dropout=not getattr(job.stage, "disable_dropout", False),
    )
    trained = plan.specs(model.specs) if plan else {p: s for p, s in model.specs.items() if p not in frozen}
    parts.factors(job.stage, model.specs, trained, parts.places(config, job.stage))
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
    if sees(hf) != sees(own.hf):
        raise ConfigError(
            f"{named} doesn't look at the same rows as the policy: one of them sees images",
            where=config.where(f"stages.{config.stages.index(stage)}.reference_model_path"),
            fix="name a model of the same kind",
        )
    model = build(hf, dtype=config.compute_dtype(stage), attention=config.model.attention, layout=own.layout)
    if sync and model.specs != own.specs:
        raise ConfigError(
            f"{named} is another model than the policy, and can't follow it",
            where=config.where(f"stages.{config.stages.index(stage)}.sync_ref_model"),
            fix="leave out sync_ref_model or reference_model_path",
        )
    return model, folder


def _settings(job: Job, digest: str, layout: Layout) -> dict[str, Any]:
    """Everything that decides what the stage computes. How many devices share a step's rows, and in how many
    microbatches, does not."""
    stage = {key: value for key, value in asdict(job.stage).items() if key not in FREE}
    stage = {key: value for key, value in stage.items() if not key.startswith(("eval_", "logging_"))}
    settings = job.config.model
    names = "dtype", "param_dtype", "image_min_pixels", "image_max_pixels"
    model = {f"model.{key}": getattr(settings, key) for key in names}
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
