"""Language modelling on plain text: every token is learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ntjax.config.settings import setting
from ntjax.errors import ConfigError
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
    """Settings of a pretrain stage.

    A document longer than `max_length` is cut into pieces, each a document to all others: attention doesn't
    cross the cut, and the first token of a piece isn't learned. `packing_strategy`: "bfd_split" packs pieces
    where they fit; "wrapped" fills every row to its end, in the order of the file; "bfd" drops what is over
    `max_length`. None is "bfd_split", or "wrapped" for streamed data. Without packing, a piece has a row of
    its own.
    """

    max_length: int = setting(1024, at_least=2, aliases=("max_seq_length",))
    packing: bool = setting(True)
    packing_strategy: str | None = setting(
        None, choices=("bfd", "bfd_split", "wrapped"), synonyms={"first_fit": "bfd"}
    )
    truncation_mode: str = setting(
        "keep_start", choices=("keep_start", "keep_end"), later={"keep_end": "truncation from the start"}
    )
    eval_packing: bool | None = setting(None, later="packing evaluation rows otherwise than training rows")
    padding_free: bool = setting(True)
    loss_type: str = setting(
        "nll", choices=("nll", "dft"), synonyms={"chunked_nll": "nll"}, later={"dft": "the DFT loss"}
    )
    router_aux_loss_coef: float | None = setting(None, at_least=0, later="losses on a router")
    eos_token: str | None = setting(None, later="a choice of the end-of-text token")
    pad_token: str | None = setting(None, later="a choice of the padding token")

    likelihood = True
    streams = True

    @property
    def row_length(self) -> int:
        return self.max_length

    @property
    def packs(self) -> bool:
        return self.packing

    @property
    def fills(self) -> bool:
        return self.padding_free

    @property
    def packs_in_order(self) -> bool:
        return self.packing_strategy == "wrapped"

    def encode(
        self,
        rows: Rows,
        tokenizer: Any,
        dataset: DatasetConfig,
        formatting_func: Callable[..., Any] | None,
        vocab: int,
        vision: Vision | None = None,
    ) -> Encoded:
        """Tokens of every document, in pieces of `max_length` at most."""
        from ntjax.data.pack import split, wrapped
        from ntjax.data.text import TextEncoder, encode_text_rows

        if dataset.image_field is not None:
            raise ConfigError(
                f"image_field = {dataset.image_field!r}, but a pretrain stage learns text alone",
                fix="remove image_field, or learn captions in an sft stage",
            )
        truncates = self.packing_strategy == "bfd"
        encoded = encode_text_rows(
            rows,
            TextEncoder(tokenizer, dataset, self.max_length if truncates else None, formatting_func, vision),
            max_bad_rows=dataset.max_bad_rows,
            vocab_size=vocab,
            workers=dataset.preprocessing_num_workers,
        )
        if truncates:
            return encoded
        return (wrapped if self.packs_in_order else split)(encoded, self.max_length)

    def loss(self, model: Model) -> Loss:
        """Negative log-likelihood of every token but the first of a piece."""
        return next_token_loss(model)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from super().conflicts()
        if not self.packing and self.packing_strategy == "wrapped":
            yield (
                "packing_strategy",
                '"wrapped" fills rows with several documents, and packing = false forbids it',
            )
