"""Group relative policy optimization (arXiv:2402.03300)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ntjax.config.settings import setting
from ntjax.stages.absent import ABSENT
from ntjax.stages.base import still
from ntjax.stages.rollout import SAMPLER, Geometry, Judged, RolloutConfig, completion_scores

if TYPE_CHECKING:
    import numpy as np

    from ntjax.losses.grpo import Grpo
    from ntjax.models import Model
    from ntjax.params import Params
    from ntjax.step import Batch, Loss

LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
UNCLIPPED = ("cispo", "sapo", "vespo")
CLIPPING = ("epsilon", "epsilon_high", "delta")
READ = {  # of a loss's own settings; the others clip
    "cispo": ("epsilon", "epsilon_high"),
    "sapo": ("sapo_temperature_pos", "sapo_temperature_neg"),
    "vespo": ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
}
_ENTROPY = "a bonus on entropy"


@dataclass(frozen=True)
class Options(RolloutConfig):
    """Settings of a grpo stage, under TRL's GRPOConfig's names and with its defaults.

    TRL has no `dynamic_sample` (with `max_resample_times`, ms-swift's names): groups whose rewards are all the same
    teach nothing, and are replaced by those of further prompts; and no `soft_punish_cache`: the last so many tokens
    before `max_completion_length` cost up to 1 (both arXiv:2503.14476).
    """

    num_generations: int = setting(8, at_least=2)
    num_generations_eval: int | None = setting(None, at_least=1)
    max_completion_length: int = setting(512, at_least=1)
    generation_batch_size: int | None = setting(None, at_least=2)
    steps_per_generation: int | None = setting(None, at_least=1)

    beta: float = setting(0.0, at_least=0)
    num_iterations: int = setting(1, at_least=1)
    epsilon: float = setting(0.2, above=0)
    epsilon_high: float | None = setting(None, above=0)
    delta: float | None = setting(None, above=0)
    importance_sampling_level: str = setting("token", choices=("token", "sequence"))
    loss_type: str = setting("dapo", choices=LOSSES)
    scale_rewards: str | bool = setting("group", choices=("group", "batch", "none", True, False))
    multi_objective_aggregation: str = setting(
        "sum_then_normalize", choices=("sum_then_normalize", "normalize_then_sum")
    )
    mask_truncated_completions: bool = setting(False)
    dynamic_sample: bool = setting(False)
    max_resample_times: int = setting(3, at_least=1)
    soft_punish_cache: int | None = setting(None, at_least=1)
    top_entropy_quantile: float = setting(1.0, above=0, at_most=1)
    entropy_coef: float = setting(0.0, later=_ENTROPY)
    use_adaptive_entropy: bool = setting(False, later=_ENTROPY)
    entropy_coef_min: float = setting(0.0, later=_ENTROPY)
    entropy_coef_max: float = setting(1.0, later=_ENTROPY)
    entropy_coef_delta: float = setting(0.005, at_least=0, later=_ENTROPY)
    entropy_target: float = setting(0.2, at_least=0, later=_ENTROPY)
    sapo_temperature_pos: float = setting(1.0, above=0)
    sapo_temperature_neg: float = setting(1.05, above=0)
    vespo_k_pos: float = setting(2.0, above=0)
    vespo_lambda_pos: float = setting(3.0, above=0)
    vespo_k_neg: float = setting(3.0, above=0)
    vespo_lambda_neg: float = setting(2.0, above=0)
    off_policy_mask_threshold: float | None = setting(None, above=0)
    use_bias_correction_kl: bool = setting(True)
    reference_model_path: str | None = setting(None, aliases=("ref_model",))
    sync_ref_model: bool = setting(False)
    ref_model_mixup_alpha: float = setting(0.6, at_least=0, at_most=1)
    ref_model_sync_steps: int = setting(512, at_least=1)
    share_prompts: bool | str = setting("auto", choices=("auto", True, False))
    max_tool_calling_iterations: int | None = setting(None, at_least=1, later="tools")
    disable_dropout: bool = setting(False)
    cast_lm_head_to_fp32: bool = setting(False, later="a head of another dtype")
    router_aux_loss_coef: float | None = setting(None, at_least=0, later="losses on a router")

    absent = ABSENT | {
        "use_vllm": SAMPLER,
        "vllm_*": SAMPLER,
        "use_transformers_*": SAMPLER,
        "transformers_continuous_batching_config": SAMPLER,
        "cache_implementation": "the sampler has one kind of cache",
        "ds3_gather_for_generation": "the sampler uses the sharded weights as they are",
        "log_completions_hub_repo": "ntjax uploads nothing",
        "log_multimodal": "completions.jsonl holds text",
    }

    @property
    def completion_length(self) -> int:
        return self.max_completion_length

    @property
    def regroups(self) -> bool:
        # These look at a microbatch as a whole, and of clipped ratios TRL logs a microbatch's extremes.
        whole = self.loss_type == "bnpo" or self.top_entropy_quantile < 1
        return not whole and (self.loss_type in UNCLIPPED or self.on_policy)

    @property
    def on_policy(self) -> bool:
        """Whether the policy that drew is the one that is trained at each step."""
        return self.geometry(1).steps == 1 and not self.generate_ahead

    def geometry(self, devices: int) -> Geometry:
        """`steps_per_generation` and `generation_batch_size` count microbatches and completions; whole steps are
        drawn at a time, and rows are rounded up until a window is whole groups."""
        rows, accumulation = self.per_device_train_batch_size * devices, self.gradient_accumulation_steps
        asked = self.steps_per_generation or accumulation
        if self.generation_batch_size is not None:
            asked = -(-self.generation_batch_size // rows)
        parts = -(-asked // accumulation)
        while rows * accumulation * parts % self.num_generations:
            rows += devices
        return Geometry(rows, accumulation, parts, self.num_iterations, self.num_generations)

    def judged(self, window: Mapping[str, np.ndarray], scores: np.ndarray, state: dict[str, Any]) -> Judged:
        """Advantages of the completions within their groups; `mask` without those that were cut off, if asked."""
        import numpy as np

        from ntjax.losses.advantages import group_advantages

        named = {True: "group", False: "none"}
        scale = named[self.scale_rewards] if isinstance(self.scale_rewards, bool) else self.scale_rewards
        weights = np.asarray(self.reward_weights or [1.0] * len(self.rewards))
        if scores.shape[1] > len(weights):  # the punishment of overlong completions
            weights = np.append(weights, np.ones(scores.shape[1] - len(weights)))
        found = group_advantages(
            scores, weights, self.num_generations, scale, self.multi_objective_aggregation
        )
        mask = window["mask"]
        if self.mask_truncated_completions:
            mask = mask & window["stopped"][:, None]
        arrays = {"mask": mask, "advantages": found.advantages.astype(np.float32)}
        if self.geometry(1).parts > 1:  # the window's tokens, shared out evenly over its steps
            arrays["items"] = np.full(len(mask), mask.sum() / len(mask), np.float32)
        return Judged(arrays, found.rewards, found.advantages, found.metrics, state)

    def policy_scores(self, model: Model) -> Callable[[Params, Batch], Batch] | None:
        """Log-probs of the policy that drew, where it is not the policy that is trained at each of the steps."""
        if self.on_policy:
            return None
        return lambda params, batch: {
            "old_logps": completion_scores(model, params, batch, self.temperature).logp
        }

    def reference_scores(self, model: Model) -> Callable[[Params, Batch], Batch] | None:
        if self.beta == 0:
            return None
        return lambda params, batch: {
            "ref_logps": completion_scores(model, params, batch, self.temperature).logp
        }

    def loss(self, model: Model) -> Loss:
        """The policy's loss on completions and their advantages."""
        from ntjax.losses.grpo import grpo_metrics
        from ntjax.metrics import Mean

        settings = self._settings()

        def loss(params: Params, batch: Batch) -> Any:
            scores = completion_scores(model, params, batch, self.temperature)
            given = {
                name: batch[name]
                for name in ("old_logps", "ref_logps", "sampler_logps", "items")
                if name in batch
            }
            metrics = grpo_metrics(
                scores.logp, scores.entropy, batch["mask"], batch["advantages"], settings, **given
            )
            count = batch["mask"].sum(dtype=scores.logp.dtype)
            return metrics | {"trained": Mean(count, count)}

        return loss

    def _settings(self) -> Grpo:
        from ntjax.losses.grpo import Grpo

        names = Grpo.__dataclass_fields__
        return Grpo(**{name: getattr(self, name) for name in names if hasattr(self, name)})

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from super().conflicts()
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            yield "steps_per_generation", "generation_batch_size says it already"
        if (self.generation_batch_size or self.num_generations) % self.num_generations:
            yield "generation_batch_size", f"not a multiple of num_generations = {self.num_generations}"
        if self.reward_batch_size is not None and self.reward_batch_size % self.num_generations:
            yield "reward_batch_size", f"not a multiple of num_generations = {self.num_generations}"
        if self.soft_punish_cache is not None and self.soft_punish_cache > self.max_completion_length:
            yield "soft_punish_cache", f"more than max_completion_length = {self.max_completion_length}"
        if self.dynamic_sample and self.generate_ahead:
            yield "generate_ahead", "dynamic_sample waits for the rewards before it draws what is missing"
        if self.max_resample_times != 3 and not self.dynamic_sample:
            yield "max_resample_times", "only dynamic_sample = true has a use for it"
        for name in ("reference_model_path", "sync_ref_model"):
            if getattr(self, name) and self.beta == 0:
                yield name, "with beta = 0 no reference model is looked at"

    def idle(self) -> Iterator[tuple[str, str]]:
        yield from super().idle()
        read = READ.get(self.loss_type, CLIPPING)
        for name in dict.fromkeys(name for names in (CLIPPING, *READ.values()) for name in names):
            if name not in read:
                yield name, f'loss_type = "{self.loss_type}" has no use for it'
        if self.beta == 0:
            yield "use_bias_correction_kl", "with beta = 0 there is no KL"
        yield from still(self.sync_ref_model)
