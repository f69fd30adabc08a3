"""Which modules of a model a LoRA config means, by PEFT's rules for names.

A module is one layer's linear map, embedding or norm: the name of its tensor without ".weight" or ".bias".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from ntjax.config.settings import shown
from ntjax.errors import ConfigError
from ntjax.params import Spec, Specs

if TYPE_CHECKING:
    from ntjax.config import LoraConfig

Where = Callable[[str], str | None]  # a setting of LoraConfig -> the place it was written
T = TypeVar("T")

DEFAULT_TARGETS = ("q_proj", "v_proj")  # PEFT's for llama, mistral and qwen2
HEADS = ("lm_head", "score", "classifier")  # a config may name them for a stage whose model lacks them


@dataclass(frozen=True)
class Rules:
    """A LoRA config for one model; what it means by None, by "all-linear" and for `score` is written out."""

    config: LoraConfig
    linear: tuple[str, ...]  # modules that can have an adapter
    other: tuple[str, ...]  # and those that can't
    frozen: frozenset[str] = frozenset()  # of both: nothing of these is trained, whatever the config names

    def adapts(self, module: str) -> bool:
        """Whether the module gets an adapter."""
        targets, layers = self.config.target_modules, self.config.layers_to_transform
        if module in self.frozen or matches(self.config.exclude_modules, module) or self.saves(module):
            return False
        if layers and targets is not None and module not in targets:
            number = re.match(r".*?\.[^.]*\.(\d+)\.", module)
            if number is None or int(number[1]) not in layers:
                return False
        return matches(targets, module)

    def saves(self, module: str) -> bool:
        """Whether `modules_to_save` names the module, or one it is in, by the end of its name."""
        if module in self.frozen:
            return False
        return any(_ends(name, module) for name in self.config.modules_to_save or ())

    def trains(self, spec: Spec, module: str) -> bool:
        """Whether the module's weight or bias, as `spec` says, is trained itself."""
        if self.saves(module):
            return True
        return spec.hf.endswith(".bias") and (
            self.config.bias == "all" or self.config.bias == "lora_only" and self.adapts(module)
        )

    def rank(self, module: str) -> int:
        """The rank of an adapter."""
        return of_pattern(self.config.rank_pattern, module, self.config.r)

    def scale(self, module: str) -> float:
        """What B A is multiplied by."""
        alpha = of_pattern(self.config.alpha_pattern, module, self.config.lora_alpha)
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.config.use_rslora else rank)


def rules(
    config: LoraConfig, specs: Specs, *, where: Where, unmatched: bool, frozen: Collection[str] = ()
) -> Rules:
    """The rules of `config` for a model, of which the weights at the paths `frozen` stay as they are. Raises
    ConfigError as `lora.plan` says."""
    linear = tuple(module for spec in specs.values() if spec.linear for _, module in modules(spec))
    others = [spec for spec in specs.values() if not spec.linear and not spec.hf.endswith("bias")]
    still = [spec for path, spec in specs.items() if path in frozen and not spec.hf.endswith("bias")]
    if isinstance(config.target_modules, str) and config.layers_to_transform:
        raise ConfigError(
            "layers_to_transform goes with a list of names in target_modules, not with an expression",
            where=where("layers_to_transform"),
            fix="write target_modules as a list of names, or the layers into the expression",
        )
    targets = DEFAULT_TARGETS if config.target_modules is None else config.target_modules
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = tuple(module for module in linear if _last(module) not in HEADS)
    heads = ("score",) if "score" in specs else ()
    saved = (*(config.modules_to_save or ()), *heads)
    written = replace(config, target_modules=targets, modules_to_save=saved)
    other, kept = (tuple(m for spec in some for _, m in modules(spec)) for some in (others, still))
    found = Rules(written, linear, other, frozenset(kept))
    _check_targets(found, tied(specs), where)
    if not unmatched:
        _check_names(found, where)
    return found


def tied(specs: Specs) -> bool:
    """Whether the output head is the embedding."""
    return not {"head", "score"} & specs.keys()


def modules(spec: Spec) -> Iterator[tuple[tuple[int, ...], str]]:
    """(index into the stacked axes, module) of every tensor of a weight."""
    return ((index, name.rpartition(".")[0]) for index, name in spec.tensors())


def matches(names: str | Iterable[str] | None, module: str) -> bool:
    """Whether an expression is all of the module's name, or one of several names is it or its end."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names or ())


def of_pattern(pattern: Mapping[str, T], module: str, otherwise: T) -> T:
    """The value of the first expression that is the end of the module's name."""
    found = (value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, otherwise)


def short(names: Iterable[str]) -> list[str]:
    """The last parts of names, each once: q_proj, k_proj."""
    return list(dict.fromkeys(map(_last, names)))


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _ends(name: str, module: str) -> bool:
    """Whether the module or one that it is in ends with `name`."""
    parts = module.split(".")
    return any(".".join(parts[:n]).endswith(name) for n in range(1, len(parts) + 1))


def _check_targets(rules: Rules, tied: bool, where: Where) -> None:
    free = [module for module in rules.linear if module not in rules.frozen]
    linear = f"the linear layers are {', '.join(short(free)) or 'all frozen'}"
    for module in rules.other:
        if rules.adapts(module):
            raise ConfigError(
                f"target_modules matches {module}, which is no linear layer",
                where=where("target_modules"),
                fix=f"name it in modules_to_save, which trains it whole; {linear}",
            )
    if tied and (rules.saves("lm_head") or rules.adapts("lm_head")):
        raise ConfigError(
            "lm_head is the embedding in this model (tie_word_embeddings), and can't be trained by itself",
            where=where("modules_to_save" if rules.saves("lm_head") else "target_modules"),
            fix="name embed_tokens in modules_to_save, which trains both",
        )
    if not any(map(rules.adapts, rules.linear)):
        raise ConfigError(
            f"the adapter has no target in this model: target_modules = {shown(rules.config.target_modules)}",
            where=where("target_modules"),
            fix=linear,
        )


def _check_names(rules: Rules, where: Where) -> None:
    """Raises ConfigError for a name, an expression or a layer that is nowhere in the model."""
    config, every = rules.config, (*rules.linear, *rules.other)
    adapted = [module for module in rules.linear if rules.adapts(module) or module in rules.frozen]
    for setting, names, there in (
        ("target_modules", config.target_modules, lambda name: any(matches([name], m) for m in rules.linear)),
        ("exclude_modules", config.exclude_modules, lambda name: any(matches([name], m) for m in every)),
        ("modules_to_save", config.modules_to_save, lambda name: any(_ends(name, m) for m in every)),
        ("rank_pattern", config.rank_pattern, lambda name: any(of_pattern({name: 1}, m, 0) for m in adapted)),
        (
            "alpha_pattern",
            config.alpha_pattern,
            lambda name: any(of_pattern({name: 1}, m, 0) for m in adapted),
        ),
    ):
        for name in () if names is None or isinstance(names, str) else names:
            if name not in HEADS and not there(name):
                raise ConfigError(
                    f"{setting} names {name!r}, which is nowhere in the model",
                    where=where(setting),
                    fix=f"leave it out; the linear layers are {', '.join(short(rules.linear))}",
                )
    _check_layers(config.layers_to_transform or (), rules.linear, where)


def _check_layers(named: Sequence[int], linear: Iterable[str], where: Where) -> None:
    layers = {int(number) for module in linear for number in re.findall(r"\.(\d+)\.", module)}
    if beyond := sorted(set(named) - layers):
        raise ConfigError(
            f"layers_to_transform names layer {beyond[0]}; the model has {min(layers)} to {max(layers)}",
            where=where("layers_to_transform"),
            fix="name layers of the model; the first is 0",
        )
