"""Direct preference optimization (arXiv:2305.18290)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ntjax.config.settings import setting
from ntjax.stages.base import ABSENT, StageConfig

LOSSES = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot") + (
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)


@dataclass(frozen=True)
class Options(StageConfig):
    """Settings of a dpo stage, under TRL's DPOConfig's names; `dpo_beta` is its `beta`."""

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
    ld_alpha: float | None = setting(None, at_least=0, at_most=1)
    use_weighting: bool = setting(False)
    precompute_ref_log_probs: bool = setting(False)
    precompute_ref_batch_size: int | None = setting(None, at_least=1)
    sync_ref_model: bool = setting(False)
    ref_model_mixup_alpha: float = setting(0.6, at_least=0, at_most=1)
    ref_model_sync_steps: int = setting(512, at_least=1)
    max_length: int = setting(1024, at_least=2, aliases=("max_seq_length",))
    truncation_mode: str = setting("keep_start", choices=("keep_start", "keep_end"))
    disable_dropout: bool = setting(True)
    padding_free: bool = setting(False)
    router_aux_loss_coef: float | None = setting(None, at_least=0)
    pad_token: str | None = setting(None)

    absent = ABSENT | {
        "max_prompt_length": "max_length cuts prompt and answer together",
        "max_completion_length": "max_length cuts prompt and answer together",
    }

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from super().conflicts()
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            yield "loss_weights", f"{len(self.loss_weights)} weights for {len(self.loss_type)} losses"
