"""Direct preference optimization (arXiv:2305.18290)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ntjax.config.settings import setting, settings_of
from ntjax.stages.absent import ABSENT
from ntjax.stages.base import StageConfig, standing, still

if TYPE_CHECKING:
    from ntjax.config import DatasetConfig
    from ntjax.data.files import Rows
    from ntjax.data.pairs import EncodedPairs
    from ntjax.data.pictures import Vision
    from ntjax.losses.preference import Preference
    from ntjax.models import Model
    from ntjax.params import Params
    from ntjax.step import Batch, Loss

LOSSES = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot") + (
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
    "simpo",
    "cpo",
    "orpo",
)
REFERENCE_FREE = {"simpo", "cpo", "orpo"}
# For the others an f-divergence's normaliser would not cancel.
ANY_DIVERGENCE = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
# They sort a microbatch's pairs, or take the mean of its tokens.
OF_MICROBATCH = {"aot", "aot_unpaired", "sft", "simpo", "cpo", "orpo"}
# Setting -> the losses that look at it.
READERS = {
    "label_smoothing": {"exo_pair", "robust", "aot", "aot_unpaired", "simpo", "cpo"},
    "discopop_tau": {"discopop"},
    "simpo_gamma": {"simpo"},
    "cpo_alpha": {"simpo", "cpo"},
    "ld_alpha": set(LOSSES) - REFERENCE_FREE - {"sft"},
}
REFERENCE = ("reference_model_path", "precompute_ref_log_probs", "sync_ref_model")


@dataclass(frozen=True)
class Options(StageConfig):
    """Settings of a dpo stage, under TRL's DPOConfig's names; `dpo_beta` is its `beta`.

    simpo, cpo and orpo are TRL's CPO and ORPO trainers: as there, `cpo_alpha` adds the chosen answers' NLL to simpo
    too, and SimPO alone has cpo_alpha = 0. `rpo_alpha` times the NLL of a token of the chosen answers is added to
    the loss, as in TRL before 1.0.
    """

    dpo_beta: float = setting(0.1, above=0, aliases=("beta",))
    reference_model_path: str | None = setting(None, aliases=("ref_model",))
    loss_type: tuple[str, ...] = setting(("sigmoid",), choices=LOSSES)
    loss_weights: tuple[float, ...] | None = setting(None)
    label_smoothing: float = setting(0.0, at_least=0, at_most=0.5)
    f_divergence_type: str = setting(
        "reverse_kl", choices=("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
    )
    f_alpha_divergence_coef: float = setting(0.5)
    discopop_tau: float = setting(0.05, above=0)
    simpo_gamma: float = setting(0.5)
    cpo_alpha: float = setting(1.0, at_least=0)
    rpo_alpha: float | None = setting(None, at_least=0)
    ld_alpha: float | None = setting(None, at_least=0, at_most=1)
    use_weighting: bool = setting(False)
    precompute_ref_log_probs: bool = setting(False)
    precompute_ref_batch_size: int | None = setting(None, at_least=1)
    sync_ref_model: bool = setting(False)
    ref_model_mixup_alpha: float = setting(0.6, at_least=0, at_most=1)
    ref_model_sync_steps: int = setting(512, at_least=1)
    max_length: int = setting(1024, at_least=2, aliases=("max_seq_length",))
    truncation_mode: str = setting("keep_start", choices=("keep_start", "keep_end"))
    packing: bool = setting(False)
    padding_free: bool = setting(True)
    share_prompts: bool | str = setting("auto", choices=("auto", True, False))
    disable_dropout: bool = setting(True)
    router_aux_loss_coef: float | None = setting(None, at_least=0, later="losses on a router")
    pad_token: str | None = setting(None, later="a choice of the padding token")

    absent = ABSENT | {
        "max_prompt_length": "max_length cuts prompt and answer together",
        "max_completion_length": "max_length cuts prompt and answer together",
    }

    @property
    def row_length(self) -> int:
        return self.max_length

    @property
    def packs(self) -> bool:
        return self.packing

    @property
    def fills(self) -> bool:
        whole = bool(OF_MICROBATCH & set(self.loss_type)) or self.rpo_alpha is not None
        return self.padding_free and not (whole and self.gradient_accumulation_steps > 1)

    @property
    def reference_free(self) -> bool:
        """Whether no loss looks at a reference model."""
        return set(self.loss_type) <= REFERENCE_FREE

    def encode(
        self,
        rows: Rows,
        tokenizer: Any,
        dataset: DatasetConfig,
        formatting_func: Callable[..., Any] | None,
        vocab: int,
        vision: Vision | None = None,
    ) -> EncodedPairs:
        """Prompts and answers in pairs; the answers are learned, and margins are not looked at."""
        from functools import partial

        from ntjax.data.pairs import PairEncoder, encode_dpo, encode_pairs
        from ntjax.data.rows import shown_rows

        encode = partial(encode_dpo, max_length=self.max_length, keep_end=self.truncation_mode == "keep_end")
        return encode_pairs(
            shown_rows(rows, dataset, vision),
            PairEncoder(encode, tokenizer, dataset, formatting_func, vision),
            max_bad_rows=dataset.max_bad_rows,
            vocab_size=vocab,
            workers=dataset.preprocessing_num_workers,
        )

    def loss(self, model: Model) -> Loss:
        """The losses on pairs; the batch has "ref_logps" [B, 2, S] unless the stage is reference-free."""
        import jax.numpy as jnp
        from jax.lax import stop_gradient

        from ntjax.losses.preference import preference_metrics
        from ntjax.weights import dense

        preference = self._preference()

        def loss(params: Params, batch: Batch) -> Any:
            hidden, scores, targets = _scored(model, params, batch, whole="orpo" in preference.losses)
            # A token's mean logit, without its logits; a product, since TPUs round the inputs of a matmul.
            row = dense(model.head(params), jnp.float32).mean(axis=0)
            logits = (stop_gradient(hidden) * stop_gradient(row)).sum(axis=-1).reshape(batch["tokens"].shape)
            logits = jnp.broadcast_to(logits, scores.logp.shape)
            return preference_metrics(scores, logits, batch.get("ref_logps"), targets, preference)

        return loss

    def reference_scores(self, model: Model) -> Callable[[Params, Batch], Batch] | None:
        """(the reference's weights, a microbatch) -> its "ref_logps" [B, 2, S]; None if no loss looks at them."""
        if self.reference_free:
            return None

        from ntjax.losses.pairs import completion_sums

        def scored(params: Params, batch: Batch) -> Batch:
            _, scores, targets = _scored(model, params, batch)
            return {"ref_logps": completion_sums(scores.logp, targets, self.ld_alpha)}

        return scored

    def _preference(self) -> Preference:
        from ntjax.losses.preference import Preference

        return Preference(
            losses=self.loss_type,
            weights=self.loss_weights,
            beta=self.dpo_beta,
            label_smoothing=self.label_smoothing,
            f_divergence=self.f_divergence_type,
            f_alpha=self.f_alpha_divergence_coef,
            discopop_tau=self.discopop_tau,
            simpo_gamma=self.simpo_gamma,
            cpo_alpha=self.cpo_alpha,
            rpo_alpha=self.rpo_alpha,
            ld_alpha=self.ld_alpha,
            use_weighting=self.use_weighting,
        )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from super().conflicts()
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            yield "loss_weights", f"{len(self.loss_weights)} weights for {len(self.loss_type)} losses"
        yield from self._unread()
        if self.share_prompts is True and not (self.fills and not self.packing):
            yield "share_prompts", "pairs share rows only where padding_free fills these"
        losses = set(self.loss_type)
        if self.f_divergence_type != "reverse_kl" and losses - ANY_DIVERGENCE:
            name = min(losses - ANY_DIVERGENCE)
            yield "f_divergence_type", f"{name} is defined for reverse_kl only"
        if "exo_pair" in losses and self.label_smoothing == 0:
            yield "label_smoothing", "exo_pair needs it above 0; its paper takes 1e-3"
        if "robust" in losses and self.label_smoothing == 0.5:
            yield "label_smoothing", "robust needs it below 0.5"
        if self.use_weighting and losses & {"aot", "aot_unpaired"}:
            yield "use_weighting", "aot compares sorted pairs, which have no weight of their own"
        if self.sync_ref_model and self.precompute_ref_log_probs:
            yield "sync_ref_model", "precompute_ref_log_probs takes the reference as it is at the start"

    def idle(self) -> Iterator[tuple[str, str]]:
        yield from super().idle()
        yield from still(self.sync_ref_model)
        if not self.precompute_ref_log_probs:
            yield "precompute_ref_batch_size", "precompute_ref_log_probs = true has a use for it"

    def _unread(self) -> Iterator[tuple[str, str]]:
        """Settings that would change nothing."""
        defaults = {name: declared.default for name, declared in settings_of(type(self)).items()}
        names = ", ".join(self.loss_type)
        for name, readers in READERS.items():
            if getattr(self, name) != defaults[name] and not readers & set(self.loss_type):
                yield name, f"{names} has no use for it; {', '.join(sorted(readers))} do"
        if self.f_alpha_divergence_coef != 0.5 and self.f_divergence_type != "alpha_divergence":
            yield "f_alpha_divergence_coef", "only f_divergence_type = 'alpha_divergence' has a use for it"
        for name in REFERENCE:
            if self.reference_free and getattr(self, name):
                yield name, f"{names} looks at no reference model"


def _scored(model: Model, params: Params, batch: Batch, whole: bool = False) -> tuple[Any, Any, Any]:
    """Hidden states [2B, T, D] (or [B, T, D] where pairs share rows), the scores of the tokens they predict [B, 2, T],
    and which of those matter: those that are learned, or `whole` documents."""
    import jax
    import jax.numpy as jnp

    from ntjax.losses.pairs import Targets, apart
    from ntjax.models.vision.pictures import Pictures

    shape = batch["tokens"].shape
    tokens = batch["tokens"].reshape(-1, shape[-1])
    hidden = model.hidden(params, tokens, standing(batch), Pictures.of(batch))
    mask, segments = batch["mask"], batch["segments"]
    if "prefixes" in batch:
        mask, segments = apart(mask, segments)
    targets = Targets.of(mask, segments, batch["pairs"])
    wanted = targets.inside if whole else targets.mask
    if "prefixes" in batch:
        wanted = wanted.any(axis=1)
    wanted = wanted.reshape(tokens.shape)
    scores = model.logprobs(params, hidden, jnp.roll(tokens, -1, axis=1), wanted)
    return hidden, jax.tree.map(lambda x: jnp.broadcast_to(x.reshape(shape), mask.shape), scores), targets
