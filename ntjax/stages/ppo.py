"""Proximal policy optimization (arXiv:1707.06347) against rewards, with a value head on the policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ntjax.config.settings import setting
from ntjax.stages.absent import ABSENT
from ntjax.stages.rollout import SAMPLER, Geometry, Judged, RolloutConfig, completion_scores

if TYPE_CHECKING:
    import numpy as np

    from ntjax.models import Model
    from ntjax.params import Params
    from ntjax.sampler import Sampling
    from ntjax.step import Batch, Loss


@dataclass(frozen=True)
class Options(RolloutConfig):
    """Settings of a ppo stage, under the names of TRL 1.12's PPOConfig, the last there was, and of `adap_kl_ctrl`,
    which TRL had before 0.12. Unlike there, values are a head on the policy's own hidden states."""

    ppo_epochs: int = setting(4, at_least=1, aliases=("num_ppo_epochs",))
    num_mini_batches: int = setting(1, at_least=1)
    total_episodes: int | None = setting(None, at_least=1)
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
    stop_token_id: int | None = setting(None, at_least=0)  # beside the model's own
    temperature: float = setting(0.7, above=0)
    reference_model_path: str | None = setting(None, aliases=("ref_model",))
    value_model_path: str | None = setting(None, later="a value model of its own")
    disable_dropout: bool = setting(True)

    values: ClassVar[bool] = True
    absent = ABSENT | {
        "sft_model_path": "load_from names what the stage starts from",
        "model_adapter_name": "a model has one adapter here",
        "ref_adapter_name": "a model has one adapter here",
        "ds3_gather_for_generation": "the sampler uses the sharded weights as they are",
        "exp_name": "task_name at the top level names the run",
        "world_size": "the mesh knows it",
        "*batch_size": "it follows from per_device_train_batch_size and num_mini_batches",
        "num_total_batches": "it follows from total_episodes",
        "num_sample_generations": "completions.jsonl has every completion; log_completions shows some",
        "use_vllm": SAMPLER,
        "vllm_*": SAMPLER,
    }

    @property
    def completion_length(self) -> int:
        return self.response_length

    def sampling(self, stop_ids: tuple[int, ...], *, evaluating: bool = False) -> Sampling:
        further = () if self.stop_token_id is None else (self.stop_token_id,)
        return super().sampling((*stop_ids, *further), evaluating=evaluating)

    def geometry(self, devices: int) -> Geometry:
        rows = self.per_device_train_batch_size * devices
        return Geometry(rows, self.gradient_accumulation_steps, self.num_mini_batches, self.ppo_epochs, 1)

    def total_steps(self, shape: Geometry, prompts: int) -> int:
        if self.total_episodes is None:
            return super().total_steps(shape, prompts)
        return -(-self.total_episodes // shape.completions) * shape.steps

    def judged(self, window: Mapping[str, np.ndarray], scores: np.ndarray, state: dict[str, Any]) -> Judged:
        """Rewards a token, advantages and returns; the state is the KL controller's coefficient."""
        import numpy as np

        from ntjax.losses import advantages as made
        from ntjax.losses.ppo import adaptive_kl, token_rewards
        from ntjax.metrics import Mean

        mask, logps, values = (window[name] for name in ("mask", "old_logps", "old_values"))
        weights = np.asarray(self.reward_weights or [1.0] * len(self.rewards))
        rewards = np.nansum(scores * weights, axis=1)
        if self.missing_eos_penalty is not None:
            rewards = rewards - self.missing_eos_penalty * ~window["stopped"]
        unjudged = np.isnan(scores).all(axis=1)
        mask = mask & ~unjudged[:, None]  # nothing is learned from what no reward has judged
        coef = state.get("kl_coef", self.init_kl_coef)
        given, kl = token_rewards(rewards, logps, window["ref_logps"], mask, coef, self.kl_estimator)
        paid = made.whiten(given, mask, shift_mean=False) if self.whiten_rewards else given
        advantages, returns = made.gae(paid, values, mask, self.gamma, self.lam)
        advantages = np.asarray(made.whiten(advantages, mask)) * mask
        kl, count = np.asarray(kl), float(len(mask))
        if self.adap_kl_ctrl:
            next_coef = adaptive_kl(coef, float(kl.mean()), self.kl_target, self.kl_horizon, len(mask))
        else:
            next_coef = coef
        non_score = float(np.asarray(given).sum() - rewards[~unjudged].sum())
        metrics = {
            "objective/kl": Mean(float(kl.sum()), count),
            "objective/entropy": Mean(float(-(logps * mask).sum()), count),
            "objective/non_score_reward": Mean(non_score, count),
            "objective/rlhf_reward": Mean(non_score + float(rewards.sum()), count),
            "objective/scores": Mean(float(rewards.sum()), count),
            "val/num_eos_tokens": Mean(float(window["stopped"].sum()), 1.0),
            "kl_coef": Mean(coef, 1.0),
        }
        arrays = {
            "mask": mask,
            "advantages": np.asarray(advantages, np.float32),
            "returns": np.asarray(returns, np.float32),
        }
        each = (advantages * mask).sum(axis=1) / np.maximum(mask.sum(axis=1), 1)
        return Judged(arrays, rewards, each, metrics, {"kl_coef": next_coef})

    def policy_scores(self, model: Model) -> Callable[[Params, Batch], Batch]:
        """Log-probs and values of the policy that drew."""

        def scored(params: Params, batch: Batch) -> Batch:
            found = completion_scores(model, params, batch, self.temperature)
            return {"old_logps": found.logp, "old_values": _values(params, found.hidden)}

        return scored

    def reference_scores(self, model: Model) -> Callable[[Params, Batch], Batch]:
        return lambda params, batch: {
            "ref_logps": completion_scores(model, params, batch, self.temperature).logp
        }

    def loss(self, model: Model) -> Loss:
        """The policy's clipped loss and that of its value head."""
        from ntjax.losses.ppo import ppo_metrics
        from ntjax.metrics import Mean

        def loss(params: Params, batch: Batch) -> Any:
            scores = completion_scores(model, params, batch, self.temperature)
            metrics = ppo_metrics(
                scores.logp,
                scores.entropy,
                _values(params, scores.hidden),
                batch["mask"],
                **{name: batch[name] for name in ("old_logps", "old_values", "advantages", "returns")},
                cliprange=self.cliprange,
                cliprange_value=self.cliprange_value,
                vf_coef=self.vf_coef,
            )
            count = batch["mask"].sum(dtype=scores.logp.dtype)
            return metrics | {"trained": Mean(count, count)}

        return loss

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from super().conflicts()
        if self.stop_token is not None and self.stop_token_id is not None:
            yield "stop_token_id", "give stop_token or stop_token_id, not both"
        if self.total_episodes is not None and self.max_steps > 0:
            yield "total_episodes", "max_steps says it already"
        for name in ("kl_target", "kl_horizon"):
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != default and not self.adap_kl_ctrl:
                yield name, "only adap_kl_ctrl = true has a use for it"


def _values(params: Params, hidden: Any) -> Any:
    """The value head's [B, C] of hidden states [B, C, D], fp32."""
    import jax.numpy as jnp

    from ntjax.policy import VALUE
    from ntjax.weights import einsum

    return einsum("BTD,LD->BTL", hidden.astype(jnp.float32), params[VALUE])[..., 0]
