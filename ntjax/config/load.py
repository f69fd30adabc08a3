"""A config file and overrides to one checked, resolved `Config`."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntjax import lookup
from ntjax.config import deepspeed
from ntjax.config import overrides as command_line
from ntjax.config.files import read
from ntjax.config.schema import (
    BnbConfig,
    Config,
    DatasetConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    TimeoutsConfig,
)
from ntjax.config.settings import Table, names_of, settings_of, shown
from ntjax.config.tables import Reader
from ntjax.errors import ConfigError, InputMissing

if TYPE_CHECKING:
    from ntjax.stages.base import StageConfig

_FOLDER_NAME = re.compile(r"\w[\w.-]*")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config in `path` with each `KEY=VALUE` of `overrides` applied, checked and resolved.

    Raises `InputMissing` where there is no such file, `ConfigError` with every problem found otherwise.
    """
    source = read(path)
    data, places = source.data, {key: f"{source.path}:{line}" for key, line in source.lines.items()}
    for override in overrides:
        command_line.apply(override, data, places)
    data.pop("$schema", None)  # where an editor finds what `ntjax.schema` printed
    reader = Reader(str(source.path), places, _homes)
    _move_zero_stage(data, reader)
    options = {kind: lookup.stage_options(kind) for kind in lookup.stage_types()}
    told = list(deepspeed.apply(data, options, reader, source.path.parent))
    data["datasets"] = _datasets(data.get("datasets"), reader)
    data["stages"] = _stages(data.get("stages"), reader)
    config = reader.build(Config, data, "")
    reader.finish()
    assert config is not None
    config = dataclasses.replace(config, path=source.path, places=places)
    config = _resolve(config, reader)
    reader.finish()
    return dataclasses.replace(config, warnings=(*told, *_warnings(config)))


def dataset_for(config: Config, stage: StageConfig) -> tuple[str, DatasetConfig]:
    """The data set of a stage and its name: under the stage's name, its type, or the only one there is."""
    names = [stage.stage_name, stage.stage_name.removesuffix("_stage"), stage.stage_type]
    if config.model.model_type == "vlm":
        names.append(f"vlm_{stage.stage_type}")
    for name in names:
        if name in config.datasets:
            return name, config.datasets[name]
    if len(config.datasets) == 1:
        return next(iter(config.datasets.items()))
    raise ConfigError(
        f"no data set for stage {stage.stage_name}: looked for {', '.join(dict.fromkeys(names))}; "
        f"there are {', '.join(config.datasets)}",
        where=config.where(f"stages.{_position(config, stage)}"),
        fix=f"name one of them [datasets.{stage.stage_type}]",
    )


def local_path(config: Config, value: str) -> Path | None:
    """The file or folder that `value` names, seen from the config's folder, then from the working folder."""
    written = Path(value).expanduser()
    for candidate in (config.path.parent / written, written):
        if candidate.exists():
            return candidate
    return None


def resolve_path(config: Config, value: str, key: str = "") -> Path:
    """The same, or `InputMissing` at the setting `key`, with what there is instead."""
    found = local_path(config, value)
    if found is not None:
        return found
    folder = (config.path.parent / value).parent
    files = sorted(file.name for file in folder.glob("*"))[:10] if folder.is_dir() else []
    raise InputMissing(
        f"{key} = {shown(value)}: looked in {config.path.parent} and the working folder".removeprefix(" = "),
        where=config.where(key),
        fix=f"{folder} has {', '.join(files)}" if files else None,
    )


def refuse_unbuilt(config: Config) -> None:
    """Raises `ConfigError` where the config asks for features that are not built yet, naming them."""
    missing: dict[str, str] = {}  # feature -> the first setting that asks for it
    for path, table in tables_of(config):
        for name, declared in settings_of(type(table)).items():
            value, later = getattr(table, name), declared.rules.later
            if isinstance(later, str):
                feature = later if value != declared.default else ""
            else:
                feature = later.get(value, "")
            if feature:
                missing.setdefault(feature, f"{path}.{name}".removeprefix("."))
    if missing:
        features = ", ".join(f"{feature} ({key})" for feature, key in missing.items())
        raise ConfigError(f"not built yet: {features}", where=config.where(next(iter(missing.values()))))


def tables_of(config: Config) -> Iterator[tuple[str, Table]]:
    """Every table of a config and its dotted path, in the order of the schema."""
    yield "", config
    yield "model", config.model
    yield "model.lora_config", config.model.lora_config
    yield "model.bnb_config", config.model.bnb_config
    for name, dataset in config.datasets.items():
        yield f"datasets.{name}", dataset
    for index, stage in enumerate(config.stages):
        yield f"stages.{index}", stage
    yield "mesh", config.mesh
    yield "timeouts", config.timeouts


def _homes(key: str) -> list[str]:
    """The tables that have a setting of this name."""
    tables: dict[str, type] = {"the top level": Config, "[model]": ModelConfig, "[mesh]": MeshConfig}
    tables |= {"[model.lora_config]": LoraConfig, "[model.bnb_config]": BnbConfig}
    tables |= {"[datasets.NAME]": DatasetConfig, "[timeouts]": TimeoutsConfig}
    homes = [home for home, table in tables.items() if key in names_of(table)]
    kinds = lookup.stage_types()
    having = [kind for kind in kinds if key in names_of(lookup.stage_options(kind))]
    return homes + (["[[stages]]"] if len(having) == len(kinds) else [f"{kind} stages" for kind in having])


def _move_zero_stage(data: dict[str, Any], reader: Reader) -> None:
    """The short form may stand at the top level."""
    if "zero_stage" not in data:
        return
    mesh = data.setdefault("mesh", {})
    if isinstance(mesh, dict) and (
        "zero_stage" not in mesh or reader.outranks("zero_stage", "mesh.zero_stage", "zero_stage")
    ):
        reader.places["mesh.zero_stage"] = reader.where("zero_stage")
        mesh["zero_stage"] = data["zero_stage"]
    del data["zero_stage"]


def _datasets(raw: Any, reader: Reader) -> dict[str, DatasetConfig]:
    if not isinstance(raw, dict) or not raw:
        reader.blame("datasets", ": a run needs at least one data set", "add [datasets.sft]")
        return {}
    built = {}
    for name, table in raw.items():
        if not isinstance(table, dict):
            message = f" = {shown(table)}: expected a table for each data set"
            reader.blame(f"datasets.{name}", message, "write [datasets.NAME] and settings below it")
        elif (dataset := reader.build(DatasetConfig, table, f"datasets.{name}")) is not None:
            built[name] = dataset
    return built


def _stages(raw: Any, reader: Reader) -> list[StageConfig]:
    if not isinstance(raw, list) or not raw:
        reader.blame("stages", ": a run needs a list of stages", "add [[stages]] with stage_type")
        return []
    built = [_stage(table, f"stages.{index}", reader) for index, table in enumerate(raw)]
    first: dict[str, int] = {}
    for index, stage in enumerate(built):
        if stage is not None and first.setdefault(stage.stage_name, index) != index:
            other = reader.where(f"stages.{first[stage.stage_name]}")
            message = f": a second stage named {stage.stage_name} (the first is at {other})"
            reader.blame(f"stages.{index}", message, "give it a stage_name of its own")
    return [stage for stage in built if stage is not None]


def _stage(table: Any, path: str, reader: Reader) -> StageConfig | None:
    kinds = lookup.stage_types()
    kind = table.get("stage_type") if isinstance(table, dict) else None
    if kind not in kinds:
        given = f" = {shown(kind)}" if kind is not None else ""
        close = difflib.get_close_matches(str(kind), kinds, n=1)
        message = f"{given}: a stage has a stage_type, one of {', '.join(kinds)}"
        reader.blame(f"{path}.stage_type", message, f'write stage_type = "{(close or ["sft"])[0]}"')
        return None
    stage = reader.build(lookup.stage_options(kind), table, path)
    if stage is None:
        return None
    name = stage.stage_name or stage.stage_type
    name = name if name.endswith("_stage") else f"{name}_stage"
    if not _FOLDER_NAME.fullmatch(name):
        reader.blame(f"{path}.stage_name", f" = {shown(name)}: it names a folder: letters, digits, - and _")
    return dataclasses.replace(stage, stage_name=name)


def _resolve(config: Config, reader: Reader) -> Config:
    """Fills in what settings left open take from the rest of the config."""
    if not _FOLDER_NAME.fullmatch(config.task_name):
        reader.blame(
            "task_name", f" = {shown(config.task_name)}: it names a folder: letters, digits, - and _"
        )
    stages = []
    for index, stage in enumerate(config.stages):
        try:
            name, dataset = dataset_for(config, stage)
        except ConfigError as error:
            reader.problems.append(error)
            continue
        stages.append(_resolve_stage(config, stage, index, name, dataset, reader))
    base = config.base_output_dir or f"runs/{config.model.model_type}"
    return dataclasses.replace(config, stages=tuple(stages), base_output_dir=base)


def _resolve_stage(
    config: Config, stage: Any, index: int, name: str, dataset: DatasetConfig, reader: Reader
) -> StageConfig:
    path = f"stages.{index}"
    evaluates = bool(stage.do_eval) or stage.eval_strategy != "no"
    if evaluates and not dataset.has_eval:
        asking = f"{path}.do_eval" if stage.do_eval else f"{path}.eval_strategy"
        message = f": there is nothing to evaluate on in [datasets.{name}]"
        reader.blame(asking, message, "add eval_dataset_path, eval_split or validation_split_ratio there")
    if f"{path}.max_length" in config.places and dataset.max_length not in (None, stage.max_length):
        at = reader.where(f"datasets.{name}.max_length")
        reader.blame(
            f"{path}.max_length",
            f" = {stage.max_length}, but {dataset.max_length} at {at}",
            "keep one of the two",
        )
    asked = config.model.bnb_config.compute_dtype
    if config.model.load_in_4bit and asked not in (None, config.compute_dtype(stage)):
        message = f" = {shown(asked)}, but {stage.stage_name} computes in {config.compute_dtype(stage)}"
        reader.blame("model.bnb_config.compute_dtype", message, "leave it out, or set dtype or bf16 to match")
    for where, message in _streaming(stage, name, dataset) if dataset.streaming else ():
        reader.blame(where.format(path), message)
    if dataset.train_on_prompt and stage.stage_type == "sft" and stage.completion_only_loss:
        message = f" = true, but [datasets.{name}] says train_on_prompt"
        reader.blame(f"{path}.completion_only_loss", message, "keep one of the two")
    for message, fix in _choosing(stage, evaluates) if stage.load_best_model_at_end else ():
        reader.blame(f"{path}.load_best_model_at_end", f" = true, but {message}", fix)
    remat = _remat(config.model, stage)
    return dataclasses.replace(
        stage,
        per_device_eval_batch_size=stage.per_device_eval_batch_size or stage.per_device_train_batch_size,
        gradient_checkpointing=remat != "none",
        remat=remat,
        seed=_first_given(stage.seed, config.seed),
        do_eval=evaluates,
        eval_steps=stage.eval_steps or stage.logging_steps,
        max_length=dataset.max_length or stage.max_length,
    )


def _remat(model: ModelConfig, stage: Any) -> Any:
    """What a stage keeps for its backward pass: what it says itself goes before what is said of the model."""
    if stage.remat != "auto":
        return stage.remat
    own = stage.gradient_checkpointing
    if model.remat != "auto" and own in (None, model.remat != "none"):
        return model.remat
    return "full" if _first_given(own, model.gradient_checkpointing) else "none"


def _choosing(stage: Any, evaluates: bool) -> Iterator[tuple[str, str]]:
    """(what is missing, a fix) where a stage can't choose the best of its checkpoints: those that were evaluated."""
    every = stage.eval_steps or stage.logging_steps
    if not evaluates or stage.eval_strategy == "no":
        yield "nothing is evaluated on the way", 'eval_strategy = "steps"'
    elif stage.eval_strategy != stage.save_strategy:
        yield (
            f"eval_strategy = {shown(stage.eval_strategy)} and save_strategy = {shown(stage.save_strategy)}",
            f"save_strategy = {shown(stage.eval_strategy)}",
        )
    elif stage.eval_strategy == "steps" and stage.save_steps % every:
        yield (
            f"every {stage.save_steps} steps one is saved, and every {every} one evaluated",
            f"save_steps = {-(-stage.save_steps // every) * every}",
        )


def _streaming(stage: Any, name: str, dataset: DatasetConfig) -> Iterator[tuple[str, str]]:
    """(setting, what is wrong with it) where a stage can't read its data as a stream."""
    if not stage.streams:
        yield f"datasets.{name}.streaming", f" = true: {stage.stage_type} stages plan their data beforehand"
        return
    if stage.max_steps <= 0:
        yield "{}.max_steps", ": a streamed data set has no known end; give max_steps"
    if not stage.packs or stage.packing_strategy not in (None, "wrapped"):
        key = "packing_strategy" if stage.packs else "packing"
        yield f"{{}}.{key}", ': streamed text is packed, and packed as "wrapped"'
    for key in ("save_strategy", "eval_strategy"):
        if getattr(stage, key) == "epoch":
            yield f"{{}}.{key}", ' = "epoch": a streamed data set has no known epochs; write "steps"'


def _first_given(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _position(config: Config, stage: StageConfig) -> int:
    return [other.stage_name for other in config.stages].index(stage.stage_name)


def _warnings(config: Config) -> Iterator[str]:
    model = config.model
    if model.trust_remote_code:
        place = config.where("model.trust_remote_code")
        yield f"{place}: trust_remote_code = true has no effect: nothing remote is ever run"
    if model.lora_config != LoraConfig() and not model.use_lora:
        yield f"{config.where('model.lora_config')}: lora_config has no effect without use_lora = true"
    if model.bnb_config != BnbConfig() and not model.load_in_4bit:
        yield f"{config.where('model.bnb_config')}: bnb_config has no effect without load_in_4bit = true"
    for number, stage in enumerate(config.stages):
        declared = settings_of(type(stage))
        for name, why in stage.idle():
            at = f"stages.{number}.{name}"
            if at in config.places and getattr(stage, name) != declared[name].default:
                yield f"{config.where(at)}: {name} has no effect: {why}"
