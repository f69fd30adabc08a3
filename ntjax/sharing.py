"""Whether sequences that begin with the same prompt have it once: the pairs of a step, the completions of a group."""

from __future__ import annotations

from typing import Any

from ntjax.config import Config
from ntjax.errors import ConfigError
from ntjax.models import Model
from ntjax.stages.base import StageConfig


def shares(config: Config, stage: StageConfig, model: Model, vision: Any | None) -> bool:
    """What `share_prompts` says; "auto" is yes where the attention in use passes over what isn't seen, on CPU.

    Raises ConfigError where it asks for what can't be.
    """
    asked = getattr(stage, "share_prompts", False)
    if asked is False:
        return False
    why = _impossible(stage, model, vision)
    if asked is True and why:
        raise ConfigError(
            f"share_prompts = true, but {why}",
            where=config.where(f"stages.{config.stages.index(stage)}.share_prompts"),
            fix='leave it out: "auto" shares where that can be',
        )
    filled = stage.rolls_out or (stage.fills and not stage.packs)
    return not why and filled and (asked is True or model.config.attention == "blocked")


def _impossible(stage: StageConfig, model: Model, vision: Any | None) -> str | None:
    stretch = model.config.rope.stretch
    if vision is not None:
        return "rows that show images keep their places"
    if stretch is not None and stage.row_length > stretch[2]:
        return (
            f"rotations depend on a row's length past {stretch[2]} tokens, and it may have {stage.row_length}"
        )
    return None
