"""A DeepSpeed JSON (`deepspeed = FILE` or `--deepspeed FILE`) as settings of stages and of the mesh.

What it says takes the place of defaults; "auto" leaves a setting to the config, as transformers' Trainer does, and what
both say differently is an error. What has no counterpart here is listed in one warning.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ntjax.config import files
from ntjax.config.settings import names_of, settings_of
from ntjax.config.tables import Reader, shown
from ntjax.errors import ConfigError, InputMissing

STAGE = {  # where DeepSpeed has a setting -> its name in a stage
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_num_steps": "warmup_steps",
}
MESH = {
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.offload_optimizer.device": "offload_optimizer",
    "zero_optimization.offload_param.device": "offload_param",
}
OPTIMIZERS = {"adam": "adamw_torch", "adamw": "adamw_torch", "lion": "lion", "sgd": "sgd", "muon": "muon"}
SCHEDULERS = {"warmuplr": "constant_with_warmup", "warmupdecaylr": "linear", "warmupcosinelr": "cosine"}


@dataclass(frozen=True)
class Said:
    """What a file says, by dotted key, and the places of its lines."""

    name: str
    values: dict[str, Any]
    lines: Mapping[str, int]

    def place(self, key: str) -> str:
        """Where the file says it."""
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return f"{self.name}:{self.lines[key]}" if key else self.name


def apply(data: dict[str, Any], options: Mapping[str, type], reader: Reader, folder: Path) -> Iterator[str]:
    """Puts into `data` what its DeepSpeed files say; yields warnings. `options` are the tables of stage types."""
    stages = data.get("stages") if isinstance(data.get("stages"), list) else []
    listed: set[str] = set()
    for index, stage in enumerate(stages or []):
        if not isinstance(stage, dict) or stage.get("stage_type") not in options:
            continue  # an error in any case
        path = f"stages.{index}.deepspeed" if "deepspeed" in stage else "deepspeed"
        value = stage.get("deepspeed", data.get("deepspeed"))
        if value in (None, "none"):
            continue
        try:
            said = _read(value, reader.where(path), [folder, Path.cwd()])
            left = _fill(said, data, stage, f"stages.{index}", options[stage["stage_type"]], reader)
        except ConfigError as error:
            reader.problems.append(error)
            continue
        if left and said.name not in listed:
            listed.add(said.name)
            yield f"{said.name}: without a counterpart here, and not read: {', '.join(left)}"


def _read(value: Any, where: str, folders: Sequence[Path]) -> Said:
    if isinstance(value, dict):
        return Said(where, dict(_flat(value)), {})
    if not isinstance(value, str):
        raise ConfigError(f"deepspeed = {shown(value)}: expected a file or a table", where=where)
    found = next((path for folder in folders if (path := folder / value).is_file()), None)
    if found is None:
        raise InputMissing(f"deepspeed = {shown(value)}: there is no such file", where=where)
    if found.suffix != ".json":
        raise ConfigError(f"deepspeed = {shown(value)}: expected a .json file", where=where)
    source = files.read(found)
    return Said(str(found), dict(_flat(source.data)), source.lines)


def _flat(table: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        at = f"{path}.{key}".removeprefix(".")
        if isinstance(value, dict):
            yield from _flat(value, at)
        else:
            yield at, value


def _fill(
    said: Said,
    data: dict[str, Any],
    stage: dict[str, Any],
    path: str,
    kind: type,
    reader: Reader,
) -> list[str]:
    """Gives the stage and the mesh what the file says; the keys that have no counterpart."""
    left, names = [], names_of(kind)
    mesh = data.setdefault("mesh", {})
    written = {names.get(key, key): key for key in stage}
    for key, value in said.values.items():
        found = _meaning(key, value, said)
        if not found:
            left.append(key)
        for table, setting, meant in found or ():
            if meant == "auto":
                continue
            if table == "mesh":
                _put(mesh, {name: name for name in mesh}, "mesh", setting, meant, said.place(key), reader, {})
            else:
                same = settings_of(kind)[setting].rules.synonyms
                _put(stage, written, path, setting, meant, said.place(key), reader, same)
    return left


def _put(
    table: dict[str, Any],
    written: Mapping[str, str],
    path: str,
    setting: str,
    value: Any,
    place: str,
    reader: Reader,
    synonyms: Mapping[str, str],
) -> None:
    """Sets what the config leaves open; what it says otherwise is a problem. `synonyms` are other words for a value."""
    at = f"{path}.{setting}"
    if setting not in written:
        table[setting] = value
        reader.places.setdefault(at, place)
        return
    given = table[written[setting]]
    same = synonyms.get(given, given) if isinstance(given, str) else given
    if same != value and str(same) != str(value):
        message = f" = {shown(given)}, but {place} says {json.dumps(value)}"
        reader.blame(f"{path}.{written[setting]}", message, 'write "auto" there, or leave it out here')


def _meaning(key: str, value: Any, said: Said) -> list[tuple[str, str, Any]] | None:
    """(table, setting, value) of what a key says: none of them where it says nothing, None without counterpart."""
    if key in MESH and key.endswith(".device"):
        if value not in ("none", "cpu", None):
            raise ConfigError(f"{key} = {json.dumps(value)}: allowed are cpu and none", where=said.place(key))
        return [("mesh", MESH[key], True)] if value == "cpu" else []
    if key in MESH:
        return [("mesh", MESH[key], value)]
    if key in STAGE:
        return [("stage", STAGE[key], value)]
    if key == "optimizer.params.betas":
        first, second = value if isinstance(value, list) else (value, value)
        return [("stage", "adam_beta1", first), ("stage", "adam_beta2", second)]
    for wanted, known, setting in (
        ("optimizer.type", OPTIMIZERS, "optimizer"),
        ("scheduler.type", SCHEDULERS, "lr_scheduler_type"),
    ):
        if key == wanted:
            if str(value).lower() not in known:
                raise ConfigError(
                    f"{key} = {json.dumps(value)} isn't there",
                    where=said.place(key),
                    fix=f"one of {', '.join(known)} is; or name it in the stage and leave it out here",
                )
            return [("stage", setting, known[str(value).lower()])]
    return [] if value == "auto" else None
