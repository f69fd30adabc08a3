"""Reward modelling: a score that ranks the chosen answer above the rejected one."""

from __future__ import annotations

from dataclasses import dataclass

from ntjax.config.settings import setting
from ntjax.stages.base import StageConfig


@dataclass(frozen=True)
class Options(StageConfig):
    """Settings of a reward stage, under TRL's RewardConfig's names."""

    max_length: int = setting(1024, at_least=2, aliases=("max_seq_length",))
    center_rewards_coefficient: float | None = setting(None, at_least=0)
    disable_dropout: bool = setting(True)
    chat_template_path: str | None = setting(None)
    eos_token: str | None = setting(None)
    pad_token: str | None = setting(None)
