"""Supervised fine-tuning: the loss is on completions and assistant turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ntjax.config.settings import setting
from ntjax.stages.base import StageConfig, next_token_loss

if TYPE_CHECKING:
    from ntjax.config import DatasetConfig
    from ntjax.data.encoded import Encoded
    from ntjax.data.files import Rows
    from ntjax.data.pictures import Vision
    from ntjax.models import Model
    from ntjax.step import Loss


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
    padding_free: bool = setting(True)
    completion_only_loss: bool | None = setting(None)
    assistant_only_loss: bool = setting(True)
    loss_type: str = setting(
        "nll", choices=("nll", "dft"), synonyms={"chunked_nll": "nll"}, later={"dft": "the DFT loss"}
    )
    router_aux_loss_coef: float | None = setting(None, at_least=0, later="losses on a router")
    chat_template_path: str | None = setting(None, later="a chat template of your own")
    eos_token: str | None = setting(None, later="a choice of the end-of-text token")
    pad_token: str | None = setting(None, later="a choice of the padding token")

    likelihood = True
    learns_to_stop = True

    @property
    def row_length(self) -> int:
        return self.max_length

    @property
    def packs(self) -> bool:
        return self.packing

    @property
    def fills(self) -> bool:
        return self.padding_free

    def encode(
        self,
        rows: Rows,
        tokenizer: Any,
        dataset: DatasetConfig,
        formatting_func: Callable[..., Any] | None,
        vocab: int,
        vision: Vision | None = None,
    ) -> Encoded:
        """Tokens of every row, learned where an assistant speaks."""
        from ntjax.data.encode import SftEncoder, encode_sft_rows
        from ntjax.data.rows import shown_rows

        encoder = SftEncoder(
            tokenizer,
            dataset,
            self.max_length,
            whole_pairs=dataset.train_on_prompt or self.completion_only_loss is False,
            whole_messages=dataset.train_on_prompt or not self.assistant_only_loss,
            formatting_func=formatting_func,
            vision=vision,
        )
        return encode_sft_rows(
            shown_rows(rows, dataset, vision),
            encoder,
            max_bad_rows=dataset.max_bad_rows,
            vocab_size=vocab,
            workers=dataset.preprocessing_num_workers,
        )

    def loss(self, model: Model) -> Loss:
        """Negative log-likelihood of the learned tokens."""
        return next_token_loss(model)
