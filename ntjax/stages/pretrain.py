"""Language modelling on plain text: every token is trained."""

from __future__ import annotations

from dataclasses import dataclass

from ntjax.config.settings import setting
from ntjax.stages.base import StageConfig


@dataclass(frozen=True)
class Options(StageConfig):
    """Settings of a pretrain stage."""

    max_length: int = setting(1024, at_least=2, aliases=("max_seq_length",))
    packing: bool = setting(True)
    packing_strategy: str = setting(
        "wrapped", choices=("bfd", "bfd_split", "wrapped"), synonyms={"first_fit": "bfd"}
    )
