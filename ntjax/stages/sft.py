"""Supervised fine-tuning: the loss is on completions and assistant turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ntjax.config.settings import setting
from ntjax.stages.base import StageConfig


@dataclass(frozen=True)
class Options(StageConfig):
    """Settings of an sft stage, under TRL's SFTConfig's names.

    Unlike TRL, conversations train assistant turns only unless `assistant_only_loss` is false.
    """

    max_length: int = setting(1024, at_least=2, aliases=("max_seq_length",))
    truncation_mode: str = setting(
        "keep_start", choices=("keep_start", "keep_end"), later={"keep_end": "truncation from the start"}
    )
    packing: bool = setting(False)
    packing_strategy: str = setting(
        "bfd",
        choices=("bfd", "bfd_split", "wrapped"),
        synonyms={"first_fit": "bfd"},
        later={"bfd_split": "packing that splits rows", "wrapped": "packing that splits rows"},
    )
    eval_packing: bool | None = setting(None, later="packing evaluation rows otherwise than training rows")
    padding_free: bool = setting(False, later="batches without padding; packing does the same")
    pad_to_multiple_of: int | str | None = setting("auto", at_least=1, later="a choice of padded lengths")
    completion_only_loss: bool | None = setting(None)
    assistant_only_loss: bool = setting(True)
    loss_type: str = setting(
        "nll", choices=("nll", "dft"), synonyms={"chunked_nll": "nll"}, later={"dft": "the DFT loss"}
    )
    router_aux_loss_coef: float | None = setting(None, at_least=0, later="losses on a router")
    chat_template_path: str | None = setting(None, later="a chat template of your own")
    eos_token: str | None = setting(None, later="a choice of the end-of-text token")
    pad_token: str | None = setting(None, later="a choice of the padding token")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from super().conflicts()
        if isinstance(self.pad_to_multiple_of, str) and self.pad_to_multiple_of != "auto":
            yield "pad_to_multiple_of", 'expected a whole number or "auto"'
