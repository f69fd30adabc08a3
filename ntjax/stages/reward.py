"""Reward modelling: a score that ranks the chosen answer above the rejected one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ntjax.config.settings import setting
from ntjax.stages.base import StageConfig, standing

if TYPE_CHECKING:
    from ntjax.config import DatasetConfig
    from ntjax.data.files import Rows
    from ntjax.data.pairs import EncodedPairs
    from ntjax.data.pictures import Vision
    from ntjax.models import Model
    from ntjax.params import Params
    from ntjax.step import Batch, Loss


@dataclass(frozen=True)
class Options(StageConfig):
    """Settings of a reward stage, under TRL's RewardConfig's names."""

    max_length: int = setting(1024, at_least=2, aliases=("max_seq_length",))
    share_prompts: bool | str = setting("auto", choices=("auto", True, False))
    center_rewards_coefficient: float | None = setting(None, at_least=0)
    disable_dropout: bool = setting(True)
    chat_template_path: str | None = setting(None, later="a chat template of your own")
    eos_token: str | None = setting(None, later="a choice of the end-of-text token")
    pad_token: str | None = setting(None, later="a choice of the padding token")

    scores = True

    @property
    def row_length(self) -> int:
        return self.max_length

    @property
    def fills(self) -> bool:
        # The least and the greatest reward that are logged are those of a microbatch, as in TRL.
        return self.gradient_accumulation_steps == 1

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from super().conflicts()
        if self.share_prompts is True and not self.fills:
            yield (
                "share_prompts",
                "pairs share rows only without accumulation: its logged extremes are a microbatch's",
            )

    def encode(
        self,
        rows: Rows,
        tokenizer: Any,
        dataset: DatasetConfig,
        formatting_func: Callable[..., Any] | None,
        vocab: int,
        vision: Vision | None = None,
    ) -> EncodedPairs:
        """Whole conversations in pairs, the token that is scored marked, with their margins.

        Pairs longer than `max_length` are dropped.
        """
        from functools import partial

        from ntjax.data.pairs import PairEncoder, encode_pairs, encode_reward
        from ntjax.data.rows import shown_rows
        from ntjax.hf.tokenizer import pad_id

        encode = partial(encode_reward, max_length=self.max_length, pad_id=pad_id(tokenizer))
        return encode_pairs(
            shown_rows(rows, dataset, vision),
            PairEncoder(encode, tokenizer, dataset, formatting_func, vision),
            max_bad_rows=dataset.max_bad_rows,
            vocab_size=vocab,
            workers=dataset.preprocessing_num_workers,
            too_long="an answer is longer than max_length",
        )

    def loss(self, model: Model) -> Loss:
        """Bradley-Terry on the scores of the pairs; the model has a head of one label, the score."""
        import jax.numpy as jnp

        from ntjax.losses.documents import last_positions
        from ntjax.losses.pairs import apart
        from ntjax.losses.reward import reward_metrics
        from ntjax.weights import einsum

        def loss(params: Params, batch: Batch) -> Any:
            tokens = batch["tokens"].reshape(-1, batch["tokens"].shape[-1])
            at = standing(batch)
            hidden = model.hidden(params, tokens, at)
            mask, segments, valid = batch["mask"], at.segments, batch["pairs"]
            if "prefixes" in batch:
                mask, segments = (x.reshape(-1, x.shape[-1]) for x in apart(mask, batch["segments"]))
            # Where a document's token 0 is the marked one, no mark is left of it, and 0 is what is found.
            marked = jnp.where(mask.reshape(segments.shape), segments, 0)
            ends = last_positions(marked, valid.shape[1]).reshape(len(tokens), -1)
            last = jnp.take_along_axis(hidden, ends[..., None], axis=1).astype(jnp.float32)
            scores = einsum("RSD,LD->RSL", last, model.head(params)).reshape(len(valid), 2, -1)
            margin = batch["margin"].reshape(-1) if "margin" in batch else None
            return reward_metrics(
                scores[:, 0].reshape(-1),
                scores[:, 1].reshape(-1),
                valid.reshape(-1),
                margin,
                self.center_rewards_coefficient,
            )

        return loss
