"""Proximal policy optimization (arXiv:1707.06347) against rewards, with a value model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ntjax.config.settings import setting
from ntjax.stages.base import ABSENT, StageConfig


@dataclass(frozen=True)
class Options(StageConfig):
    """Settings of a ppo stage, under the names of TRL 1.12's PPOConfig, the last there was."""

    reward_function: tuple[str, ...] | None = setting(None, aliases=("reward_functions", "reward_funcs"))
    reward_weights: tuple[float, ...] | None = setting(None)
    reward_model_path: str | None = setting(None, aliases=("reward_model_name_or_path",))
    value_model_path: str | None = setting(None)
    ppo_epochs: int = setting(4, at_least=1, aliases=("num_ppo_epochs",))
    num_mini_batches: int = setting(1, at_least=1)
    total_episodes: int | None = setting(None, at_least=1)
    local_rollout_forward_batch_size: int = setting(64, at_least=1)
    init_kl_coef: float = setting(0.05, at_least=0, aliases=("kl_coef",))
    adap_kl_ctrl: bool = setting(False)
    kl_target: float = setting(6.0, above=0, aliases=("target",))
    kl_horizon: int = setting(10_000, at_least=1, aliases=("horizon",))
    kl_estimator: str = setting("k1", choices=("k1", "k3"))
    cliprange: float = setting(0.2, above=0)
    cliprange_value: float = setting(0.2, above=0)
    vf_coef: float = setting(0.1, at_least=0)
    gamma: float = setting(1.0, at_least=0, at_most=1)
    lam: float = setting(0.95, at_least=0, at_most=1)
    whiten_rewards: bool = setting(False)
    missing_eos_penalty: float | None = setting(None, at_least=0)
    response_length: int = setting(53, at_least=1, aliases=("max_completion_length", "max_new_tokens"))
    stop_token: str | None = setting(None, choices=("eos",))
    stop_token_id: int | None = setting(None, at_least=0)
    temperature: float = setting(0.7, above=0)
    top_p: float = setting(1.0, above=0, at_most=1)
    top_k: int = setting(0, at_least=0)
    num_sample_generations: int = setting(10, at_least=0)
    max_length: int = setting(1024, at_least=2, aliases=("max_seq_length", "max_prompt_length"))

    absent = ABSENT | {
        "sft_model_path": "load_from names what the stage starts from",
        "model_adapter_name": "a model has one adapter here",
        "ref_adapter_name": "a model has one adapter here",
        "ds3_gather_for_generation": "the sampler uses the sharded weights as they are",
        "exp_name": "task_name at the top level names the run",
        "world_size": "the mesh knows it",
        "*batch_size": "it follows from per_device_train_batch_size and num_mini_batches",
        "num_total_batches": "it follows from total_episodes",
    }

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from super().conflicts()
        if self.reward_function is None and self.reward_model_path is None:
            yield "reward_function", "a ppo stage needs reward_function or reward_model_path"
        given = len(self.reward_function or ()) + (self.reward_model_path is not None)
        if self.reward_weights is not None and len(self.reward_weights) != given:
            yield "reward_weights", f"{len(self.reward_weights)} weights for {given} rewards"
        if self.stop_token is not None and self.stop_token_id is not None:
            yield "stop_token_id", "give stop_token or stop_token_id, not both"
