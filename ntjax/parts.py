"""The parts of a model that a stage leaves as they are (`freeze`), and those with a learning rate of their own
(`learning_rates`).

A part is an expression that is found in a weight's path ("projector", "blocks.mlp") or in the name that transformers'
modules have for it ("language_model", "self_attn.q_proj"), in which "{layers}" stands for a layer's number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ntjax.errors import ConfigError
from ntjax.params import Spec, Specs, unused

if TYPE_CHECKING:
    from ntjax.config import Config
    from ntjax.stages.base import StageConfig

Where = Callable[[str], str | None]  # a setting of a stage -> the place it was written
LANGUAGE = "language_model."
ADAPTER = re.compile(r"\.(lora_A|lora_B|lora_magnitude_vector)(\.weight)?$")


def places(config: Config, stage: StageConfig) -> Where:
    """Where the settings of a stage are written."""
    number = [one.stage_name for one in config.stages].index(stage.stage_name)
    return lambda setting: config.where(f"stages.{number}.{setting}")


def frozen(patterns: Sequence[str], specs: Specs, where: Where = lambda _: None) -> frozenset[str]:
    """Paths of the weights that any of the patterns names, and of those that nothing reads.

    Raises ConfigError: a pattern names nothing, or nothing is left to train.
    """
    found = unused(specs)
    for pattern in patterns:
        if not (named := _named(pattern, specs)):
            raise _nowhere("freeze", pattern, specs, where)
        found |= named
    if found == specs.keys():
        raise ConfigError("freeze leaves nothing to train", where=where("freeze"), fix=_fix(specs))
    return frozenset(found)


def factors(
    stage: StageConfig, specs: Specs, trained: Specs, where: Where = lambda _: None
) -> dict[str, float]:
    """Path in `trained` -> the multiple of the stage's learning rate that is its own, where it has one. `specs` are the
    model's; of an adapter the parts go by the weight that they are around, or by their own names.

    Raises ConfigError: a pattern names nothing that is trained, or two give one weight different rates.
    """
    given: dict[str, str] = {}
    for pattern, rate in stage.learning_rates.items():
        named = _named(pattern, trained)
        if not named and _named(pattern, specs):
            raise ConfigError(
                f"learning_rates names {pattern!r}, of which nothing is trained",
                where=where("learning_rates"),
                fix=f"leave it out; trained are {_parts(trained)}",
            )
        if not named:
            raise _nowhere("learning_rates", pattern, specs, where)
        for path in sorted(named):
            other = given.setdefault(path, pattern)
            if stage.learning_rates[other] != rate:
                raise ConfigError(
                    f"learning_rates gives {path} the rates of {other!r} and of {pattern!r}",
                    where=where("learning_rates"),
                    fix="narrow one of the expressions",
                )
    return {path: stage.learning_rates[pattern] / stage.learning_rate for path, pattern in given.items()}


def _named(pattern: str, specs: Specs) -> set[str]:
    """Paths of the weights that a pattern names."""
    inside = any(LANGUAGE in spec.hf for spec in specs.values())
    return {
        path
        for path, spec in specs.items()
        if any(re.search(pattern, name) for name in _names(path, spec, inside))
    }


def _names(path: str, spec: Spec, inside: bool) -> Iterator[str]:
    """What a pattern may find of a weight. The head of a vision-language model counts as `inside` its language model,
    as in transformers 4 and in files."""
    yield from (path, spec.hf)
    if ADAPTER.search(path):
        yield from (ADAPTER.sub("", path), ADAPTER.sub(".weight", spec.hf))
    if inside and spec.hf.startswith("lm_head."):
        yield LANGUAGE + spec.hf


def _nowhere(setting: str, pattern: str, specs: Specs, where: Where) -> ConfigError:
    message = f"{setting} names {pattern!r}, which is nowhere in the model"
    return ConfigError(message, where=where(setting), fix=_fix(specs))


def _fix(specs: Specs) -> str:
    return f"the parts of the model are {_parts(specs)}"


def _parts(specs: Specs) -> str:
    return ", ".join(sorted({path.partition(".")[0] for path in specs}))
