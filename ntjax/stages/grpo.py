"""Group relative policy optimization (arXiv:2402.03300)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ntjax.config.settings import setting
from ntjax.stages.base import ABSENT, StageConfig

LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
_SAMPLER = "the sampler is the trainer's own model, and there is no second engine"


@dataclass(frozen=True)
class Options(StageConfig):
    """Settings of a grpo stage, under TRL's GRPOConfig's names and with its defaults."""

    reward_function: tuple[str, ...] | None = setting(None, aliases=("reward_functions", "reward_funcs"))
    reward_weights: tuple[float, ...] | None = setting(None)
    reward_model_path: str | None = setting(None, aliases=("reward_model_name_or_path",))
    num_generations: int = setting(8, at_least=2)
    num_generations_eval: int | None = setting(None, at_least=1)
    max_completion_length: int = setting(512, at_least=1)
    max_length: int = setting(1024, at_least=2, aliases=("max_seq_length", "max_prompt_length"))
    generation_batch_size: int | None = setting(None, at_least=2)
    steps_per_generation: int | None = setting(None, at_least=1)
    temperature: float = setting(1.0, above=0)
    top_p: float = setting(1.0, above=0, at_most=1)
    top_k: int = setting(0, at_least=0)
    min_p: float | None = setting(None, at_least=0, at_most=1)
    repetition_penalty: float = setting(1.0, above=0)
    generation_kwargs: dict[str, Any] = setting({})
    chat_template_kwargs: dict[str, Any] = setting({})

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
    top_entropy_quantile: float = setting(1.0, above=0, at_most=1)
    entropy_coef: float = setting(0.0)
    use_adaptive_entropy: bool = setting(False)
    entropy_coef_min: float = setting(0.0)
    entropy_coef_max: float = setting(1.0)
    entropy_coef_delta: float = setting(0.005, at_least=0)
    entropy_target: float = setting(0.2, at_least=0)
    sapo_temperature_pos: float = setting(1.0, above=0)
    sapo_temperature_neg: float = setting(1.05, above=0)
    vespo_k_pos: float = setting(2.0, above=0)
    vespo_lambda_pos: float = setting(3.0, above=0)
    vespo_k_neg: float = setting(3.0, above=0)
    vespo_lambda_neg: float = setting(2.0, above=0)
    off_policy_mask_threshold: float | None = setting(None, above=0)
    use_bias_correction_kl: bool = setting(True)
    sync_ref_model: bool = setting(False)
    ref_model_mixup_alpha: float = setting(0.6, at_least=0, at_most=1)
    ref_model_sync_steps: int = setting(512, at_least=1)
    max_tool_calling_iterations: int | None = setting(None, at_least=1)
    disable_dropout: bool = setting(False)
    cast_lm_head_to_fp32: bool = setting(False)
    router_aux_loss_coef: float | None = setting(None, at_least=0)
    log_completions: bool = setting(False)
    num_completions_to_print: int | None = setting(None, at_least=1)
    log_unique_prompts: bool = setting(False)
    log_multimodal: bool = setting(True)

    absent = ABSENT | {
        "use_vllm": _SAMPLER,
        "vllm_*": _SAMPLER,
        "use_transformers_*": _SAMPLER,
        "transformers_continuous_batching_config": _SAMPLER,
        "cache_implementation": "the sampler has one kind of cache",
        "ds3_gather_for_generation": "the sampler uses the sharded weights as they are",
        "log_completions_hub_repo": "ntjax uploads nothing",
    }
    # Reward functions see every column.
    inherent = {**StageConfig.inherent, "remove_unused_columns": False}

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from super().conflicts()
        if self.reward_function is None and self.reward_model_path is None:
            yield "reward_function", "a grpo stage needs reward_function or reward_model_path"
        given = len(self.reward_function or ()) + (self.reward_model_path is not None)
        if self.reward_weights is not None and len(self.reward_weights) != given:
            yield "reward_weights", f"{len(self.reward_weights)} weights for {given} rewards"
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            yield "steps_per_generation", "generation_batch_size says it already"
        if (self.generation_batch_size or self.num_generations) % self.num_generations:
            yield "generation_batch_size", f"not a multiple of num_generations = {self.num_generations}"
