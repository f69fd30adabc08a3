"""A folder with an adapter as PEFT reads and writes it: adapter_model.safetensors and adapter_config.json.

PEFT's tensor names are the model's own with "base_model.model." in front. What it writes beside the trained
tensors (the frozen weight under an adapted head, the one under a module trained whole) isn't read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ntjax.errors import BadData, ConfigError, Refused
from ntjax.hf.files import content_hint, inside, read_json, replacing, to_json
from ntjax.hf.folder import Tensors, by_number
from ntjax.lora import Plan
from ntjax.lora import plan as plan_of
from ntjax.params import Params, Specs, unused
from ntjax.targets import modules, rules, short, tied

if TYPE_CHECKING:
    from ntjax.config import LoraConfig

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEAD = "lm_head.weight"
FROZEN = re.compile(r"\.base_layer\.weight$|\.original_module\.|\.modules_to_save\.")
# PEFT's ways to start an adapter that leave the base weights as they are.
STARTS = (True, False, "gaussian", "eva", "orthogonal")
# Settings that change nothing about a trained adapter, or are looked at by themselves.
APART = {"auto_mapping", "peft_version", "revision", "inference_mode", "megatron_core", "qalora_group_size"}
APART |= {"peft_type", "base_model_name_or_path", "eva_config", "runtime_config"}
APART |= {"ensure_weight_tying", "init_lora_weights"}


@dataclass(frozen=True)
class Place:
    """Where the tensor of a PEFT file is in the trained weights; those may be padded to a larger rank."""

    path: str
    index: tuple[int, ...]  # into the stacked axes
    shape: tuple[int, ...]  # in the file

    @property
    def cut(self) -> tuple[slice, ...]:
        """Which part of the padded tensor is the file's."""
        return tuple(map(slice, self.shape))


def save_adapter(
    folder: Path,
    plan: Plan,
    trainable: Params,
    specs: Specs,
    config: LoraConfig,
    base_model: str,
    *,
    task_type: str = "CAUSAL_LM",
    dtype: str = "float32",
    start: Params | None = None,
) -> None:
    """Writes what `PeftModel.from_pretrained(base, folder)` loads; the files appear together or not at all.

    A PiSSA adapter stands on weights that aren't the base model's. With the A and B it started from (`start`)
    it is written as a plain adapter of twice the rank that does the same on the base model:
    W - s B0 A0 + s B A = W + s [B, -B0] [A; A0]. On several hosts all must call this; the first one writes.
    """
    import safetensors.numpy

    assert plan.changes_base == (start is not None), "PiSSA's first A and B belong here"
    places = _places(plan, specs)
    tensors = _tensors(places, trainable, plan.specs(specs), dtype)
    if start is not None:
        first = _tensors(places, {**trainable, **start}, plan.specs(specs), dtype)
        tensors = {name: _doubled(name, tensor, first[name]) for name, tensor in tensors.items()}
    settings = _settings(config, plan, specs, base_model, task_type, start is not None)
    with replacing(folder, "adapter_model*", discard=jax.process_index() != 0) as create:
        create(CONFIG).write(to_json(settings))
        create(WEIGHTS).write(safetensors.numpy.save(tensors, {"format": "pt"}))


def _places(plan: Plan, specs: Specs) -> dict[str, Place]:
    """PEFT's name of every trained tensor -> where it is."""
    trained, places = plan.specs(specs), {}
    adapted = {m for path, ranks in plan.ranks.items() for index, m in modules(specs[path]) if ranks[index]}
    for path, ranks in plan.ranks.items():
        for part in ["lora_A", "lora_B"] + ["lora_magnitude_vector"] * plan.dora:
            spec = trained[f"{path}.{part}"]
            for index, name in spec.tensors():
                rank, full = int(ranks[index]), spec.torch_shape
                shape = {"lora_A": (rank, full[-1]), "lora_B": (full[0], rank)}.get(part, full)
                if rank:
                    places[name] = Place(f"{path}.{part}", index, shape)
    for path, layers in plan.whole.items():
        for index, name in specs[path].tensors():
            module, _, kind = name.rpartition(".")
            name = f"{module}.base_layer.bias" if kind == "bias" and module in adapted else name
            if layers[index]:
                places[name] = Place(path, index, specs[path].torch_shape)
    if (table := specs["embed"].hf) in places and tied(specs):
        places[HEAD] = places[table]
    return {PREFIX + name: places[name] for name in sorted(places, key=by_number)}


def _tensors(
    places: Mapping[str, Place], trainable: Params, specs: Specs, dtype: str
) -> dict[str, np.ndarray]:
    whole = Tensors(trainable, specs, dtype)
    names = {(path, index): name for path, spec in specs.items() for index, name in spec.tensors()}
    return {
        name: np.ascontiguousarray(whole.read(names[place.path, place.index])[place.cut])
        for name, place in places.items()
    }


def _doubled(name: str, tensor: np.ndarray, first: np.ndarray) -> np.ndarray:
    if name.endswith("lora_A.weight"):
        return np.concatenate([tensor, first])
    return np.concatenate([tensor, -first], axis=1) if name.endswith("lora_B.weight") else tensor


def _named(config: LoraConfig, plan: Plan, specs: Specs) -> tuple[Any, Sequence[str]]:
    """target_modules and modules_to_save as PEFT is to be told them: every module by its whole name where it would take
    what the config names for more than what is trained."""
    trained = plan.ranks.keys() | plan.whole.keys()
    found = rules(config, specs, where=lambda _: None, unmatched=True, frozen=specs.keys() - trained)
    targets, saved = found.config.target_modules, found.config.modules_to_save or ()
    if not isinstance(targets, str) and isinstance(config.target_modules, str):
        targets = tuple(short(targets or ()))
    weights = {path: layers for path, layers in plan.whole.items() if not specs[path].hf.endswith("bias")}
    adapted, kept = (
        {module for path, layers in some.items() for at, module in modules(specs[path]) if layers[at]}
        for some in (plan.ranks, weights)
    )
    asked, every = replace(found, frozen=frozenset()), (*found.linear, *found.other)
    number = not isinstance(targets, str) and any(name.isdigit() for name in targets or ())
    if number or set(filter(asked.adapts, every)) != adapted:
        targets = tuple(sorted(adapted, key=by_number))
    if set(filter(asked.saves, every)) != kept:
        saved = tuple(sorted(kept, key=by_number))
    return targets, saved


def _settings(
    config: LoraConfig, plan: Plan, specs: Specs, base_model: str, task_type: str, doubled: bool
) -> dict[str, Any]:
    """adapter_config.json. At twice the rank, alpha grows with it so that the scale stays."""
    targets, saved = _named(config, plan, specs)
    table = specs["embed"].hf.removesuffix(".weight")
    more, wider = 1.0, 1
    if doubled:
        more, wider = math.sqrt(2) if config.use_rslora else 2.0, 2
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": wider * config.r,
        "lora_alpha": _integral(more * config.lora_alpha),
        "lora_dropout": config.lora_dropout,
        "target_modules": _listed(targets),
        "exclude_modules": _listed(config.exclude_modules),
        "modules_to_save": _listed(saved) or None,
        "bias": config.bias,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "init_lora_weights": True if doubled else config.init_lora_weights,
        "layers_to_transform": _listed(config.layers_to_transform),
        "rank_pattern": {key: wider * rank for key, rank in config.rank_pattern.items()},
        "alpha_pattern": {key: _integral(more * alpha) for key, alpha in config.alpha_pattern.items()},
        "ensure_weight_tying": tied(specs) and any(table.endswith(end) for end in saved),
        "fan_in_fan_out": False,
    }


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _integral(value: float) -> float:
    return int(value) if value == int(value) else value


def read_adapter_config(folder: Path) -> tuple[LoraConfig, str | None]:
    """adapter_config.json as a `LoraConfig`, and the model the adapter was trained on, where it says.

    Raises:
        InputMissing: no adapter_config.json. BadData: not a JSON object, or a value of the wrong type.
        ConfigError: another kind of adapter than LoRA, or a variant of LoRA that ntjax doesn't have.
    """
    from ntjax.config import LoraConfig
    from ntjax.config.settings import UnfitError, check, settings_of

    given, where = read_json(inside(folder, CONFIG)), str(folder / CONFIG)
    if given.get("peft_type") != "LORA":
        raise ConfigError(f"the adapter is {given.get('peft_type')}, not LORA", where=where)
    start = given.get("init_lora_weights", True)
    if start not in STARTS:
        raise ConfigError(
            f"with init_lora_weights = {start!r} the adapter stands on other weights than the base model's",
            where=where,
            fix="save it with PEFT's path_initial_model_for_weight_conversion, as a plain adapter",
        )
    settings = settings_of(LoraConfig)
    for name in sorted(given.keys() - settings.keys() - APART):
        if given[name]:
            raise ConfigError(f"{name} = {given[name]!r} isn't there in ntjax", where=where)
    if isinstance(given.get("layers_to_transform"), int):
        given["layers_to_transform"] = [given["layers_to_transform"]]
    known = {}
    for name, value in given.items():
        if name in settings and name not in APART and value is not None:
            try:
                known[name] = check(value, settings[name])
            except UnfitError as error:
                raise BadData(f"{name} = {value!r}: {error}", where=where) from None
    return LoraConfig(**known), given.get("base_model_name_or_path")


def load_adapter(folder: Path, specs: Specs, dtype: str = "float32") -> tuple[Plan, Params]:
    """The plan and the trained weights, in `dtype`, of an adapter of the model that `specs` declare.

    Of a language model's adapter, a model with a head of scores takes all but what is the other head's; of any, what
    belongs to weights that nothing reads is left. A bias that isn't in the file isn't trained, whatever `bias` says.

    Raises, beside what `read_adapter_config` and `lora.plan` raise:
        InputMissing: no weights. Refused: only pickled ones.
        BadData: the tensors aren't those that adapter_config.json asks for, in their shapes.
    """
    config, _ = read_adapter_config(folder)
    where = str(folder / CONFIG)
    plan = plan_of(config, specs, where=lambda _: where, unmatched=True)
    if config.task_type != "SEQ_CLS" and "score" not in (config.modules_to_save or ()):
        plan = replace(plan, whole={path: layers for path, layers in plan.whole.items() if path != "score"})
    tensors = _read(folder, specs)
    plan = _with_biases_of(tensors, plan, specs)
    places = _places(plan, specs)
    if PREFIX + HEAD in places and tied(specs) and not read_json(folder / CONFIG).get("ensure_weight_tying"):
        raise ConfigError(
            "embed_tokens was trained apart from the head it is tied to; here they are one weight",
            where=where,
            fix="train the adapter with ensure_weight_tying = true",
        )
    _check(folder / WEIGHTS, tensors, places)
    trained = plan.specs(specs)
    arrays = {path: np.zeros(spec.shape, jnp.dtype(dtype)) for path, spec in trained.items()}
    for name, place in places.items():
        padded = np.zeros(trained[place.path].torch_shape, jnp.dtype(dtype))
        padded[place.cut] = tensors[name]
        array = arrays[place.path]
        array[place.index] = padded.reshape(array[place.index].shape)
    return plan, {path: jnp.asarray(array) for path, array in arrays.items()}


def _with_biases_of(tensors: Mapping[str, np.ndarray], plan: Plan, specs: Specs) -> Plan:
    """The plan without the biases that the file lacks, which a stage with frozen parts leaves out; those of a module
    trained whole stay."""
    places = _places(plan, specs)
    whole = {path: layers.copy() for path, layers in plan.whole.items()}
    for name, place in places.items():
        beside = name.removesuffix("bias") + "weight"
        if name.endswith(".bias") and name not in tensors and beside not in places:
            whole[place.path][place.index] = False
    return replace(plan, whole={path: layers for path, layers in whole.items() if layers.any()})


def _read(folder: Path, specs: Specs) -> dict[str, np.ndarray]:
    """The file's tensors, but those of what this model lacks or doesn't read."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise Refused(
            "the weights are only there as adapter_model.bin, a pickle, which can run code when opened",
            where=str(folder),
            fix="where you trust it, load it with PEFT and save it again: that writes safetensors",
        )
    path = inside(folder, WEIGHTS)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        hint = content_hint(path) or f"cut short, or not safetensors ({error})"
        raise BadData(hint, where=str(path), fix="copy the adapter again") from None
    idle = {module for some in unused(specs) for _, module in modules(specs[some])}
    idle |= {"lm_head"} if "score" in specs else set()
    passed = tuple(f"{PREFIX}{module}." for module in idle)
    return {name: array for name, array in tensors.items() if not name.startswith(passed)}


def _check(path: Path, tensors: Mapping[str, np.ndarray], places: Mapping[str, Place]) -> None:
    faults = [f"{name} is missing" for name in places if name not in tensors]
    faults += [
        f"{name} is {tensors[name].shape}, the model's is {place.shape}"
        for name, place in places.items()
        if name in tensors and tensors[name].shape != place.shape
    ]
    faults += [
        f"{name} is not asked for" for name in sorted(tensors.keys() - places) if not FROZEN.search(name)
    ]
    head = PREFIX + HEAD
    for table in [name for name, place in places.items() if place is places.get(head) and name != head]:
        if not faults and not np.array_equal(tensors[head], tensors[table]):
            faults += [f"{HEAD} differs from {table.removeprefix(PREFIX)}, to which it is tied"]
    if faults:
        shown = faults[:8] + ([f"and {len(faults) - 8} more"] if len(faults) > 8 else [])
        raise BadData(
            "\n    ".join([f"the tensors are not those of {CONFIG} and of this model:", *shown]),
            where=str(path),
            fix="name the adapter's own base model",
        )
