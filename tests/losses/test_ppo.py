"""PPO's losses beside the formulas of TRL 1.12's trainer, written out in torch, and by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ntjax.losses.advantages import gae, whiten
from ntjax.losses.ppo import adaptive_kl, ppo_metrics, token_rewards
from ntjax.metrics import finish

ROWS, TIME = 4, 7
FULL, RAGGED = [TIME] * ROWS, [7, 3, 1, 5]
TOLERANCE = 1e-5
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Settings:
    kl_coef: float = 0.3
    kl_estimator: str = "k1"
    whiten_rewards: bool = False
    gamma: float = 0.9
    lam: float = 0.8
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.5


def numbers(lengths: list[int], seed: int = 0) -> Arrays:
    """A policy and values that have moved since they drew, and completions of such lengths."""
    dice = np.random.default_rng(seed)
    shape = (ROWS, TIME)
    old, values = dice.uniform(-3, -0.1, shape), dice.normal(0, 1, shape)
    given = {
        "old_logps": old,
        "ref_logps": old + dice.normal(0, 0.5, shape),
        "logp": old + dice.normal(0, 0.3, shape),
        "entropy": dice.uniform(0.1, 3, shape),
        "old_values": values,
        "values": values + dice.normal(0, 0.3, shape),
        "scores": dice.normal(0, 2, ROWS),
    }
    given = {name: array.astype(np.float32) for name, array in given.items()}
    return given | {"mask": np.arange(TIME) < np.array(lengths)[:, None]}


def masked_mean(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return (x * kept).sum() / kept.sum()


def whitened(x: torch.Tensor, kept: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    mean = masked_mean(x, kept)
    variance = masked_mean((x - mean) ** 2, kept) * kept.sum() / (kept.sum() - 1)
    return (x - mean) * torch.rsqrt(variance + 1e-8) + (0 if shift_mean else mean)


def by_trl(given: Arrays, s: Settings) -> dict[str, Any]:
    """Of one microbatch, in float64: advantages, returns, the loss, its gradients, and metrics.

    TRL's own for completions as long as the longest. It gives the score of a shorter one to the padding after it;
    here it is the last token's.
    """
    at = {name: torch.tensor(array) for name, array in given.items()}
    at = {name: x.double() if x.is_floating_point() else x for name, x in at.items()}
    padding = ~at["mask"]
    for name in ("logp", "old_logps", "ref_logps"):
        at[name] = torch.masked_fill(at[name], padding, 1.0)
    for name in ("values", "old_values"):
        at[name] = torch.masked_fill(at[name], padding, 0.0)
    logr = at["ref_logps"] - at["old_logps"]
    kl = -logr if s.kl_estimator == "k1" else (logr.exp() - 1) - logr
    rewards = -s.kl_coef * kl
    rewards[torch.arange(ROWS), at["mask"].sum(1) - 1] += at["scores"]
    unwhitened = rewards
    if s.whiten_rewards:
        rewards = torch.masked_fill(whitened(rewards, ~padding, shift_mean=False), padding, 0)
    ahead: Any = 0
    reversed_ = []
    for t in reversed(range(TIME)):
        following = at["old_values"][:, t + 1] if t < TIME - 1 else 0.0
        delta = rewards[:, t] + s.gamma * following - at["old_values"][:, t]
        ahead = delta + s.gamma * s.lam * ahead
        reversed_.append(ahead)
    advantages = torch.stack(reversed_[::-1], dim=1)
    returns = advantages + at["old_values"]
    advantages = torch.masked_fill(whitened(advantages, ~padding), padding, 0)

    logp, values = at["logp"].requires_grad_(), at["values"].requires_grad_()
    near = torch.clamp(values, at["old_values"] - s.cliprange_value, at["old_values"] + s.cliprange_value)
    errors, near_errors = torch.square(values - returns), torch.square(near - returns)
    value_loss = 0.5 * masked_mean(torch.max(errors, near_errors), ~padding)
    ratio = torch.exp(logp - at["old_logps"])
    plain, clipped = -advantages * ratio, -advantages * torch.clamp(ratio, 1 - s.cliprange, 1 + s.cliprange)
    policy_loss = masked_mean(torch.max(plain, clipped), ~padding)
    loss = policy_loss + s.vf_coef * value_loss
    loss.backward()
    metrics = {
        "loss": loss,
        "loss/policy_avg": policy_loss,
        "loss/value_avg": value_loss,
        "policy/approxkl_avg": 0.5 * masked_mean((logp - at["old_logps"]) ** 2, ~padding),
        "policy/clipfrac_avg": masked_mean((clipped > plain).double(), ~padding),
        "policy/entropy_avg": masked_mean(at["entropy"], ~padding),
        "val/clipfrac_avg": masked_mean((near_errors > errors).double(), ~padding),
        "val/ratio": masked_mean(ratio, ~padding),
    }
    return {
        "rewards": unwhitened,
        "kl": kl.sum(1),
        "advantages": advantages,
        "returns": returns,
        "gradients": (logp.grad, values.grad),
        "metrics": {name: value.item() for name, value in metrics.items()},
    }


def loss_of(given: Arrays, s: Settings, advantages: np.ndarray, returns: np.ndarray) -> Any:
    """Gradients of the mean loss to log-probs and values, and the metrics' sums."""

    def loss(logp: jax.Array, values: jax.Array) -> Any:
        found = ppo_metrics(
            logp,
            jnp.asarray(given["entropy"]),
            values,
            jnp.asarray(given["mask"]),
            old_logps=jnp.asarray(given["old_logps"]),
            old_values=jnp.asarray(given["old_values"]),
            advantages=jnp.asarray(advantages, jnp.float32),
            returns=jnp.asarray(returns, jnp.float32),
            cliprange=s.cliprange,
            cliprange_value=s.cliprange_value,
            vf_coef=s.vf_coef,
        )
        return found["loss"].total / found["loss"].weight, found

    where = jnp.asarray(given["logp"]), jnp.asarray(given["values"])
    return jax.grad(loss, argnums=(0, 1), has_aux=True)(*where)


def by_us(given: Arrays, s: Settings) -> dict[str, Any]:
    mask = given["mask"]
    rewards, kl = token_rewards(
        given["scores"], given["old_logps"], given["ref_logps"], mask, s.kl_coef, s.kl_estimator
    )
    paid = whiten(rewards, mask, shift_mean=False) if s.whiten_rewards else rewards
    advantages, returns = gae(paid, given["old_values"], mask, s.gamma, s.lam)
    advantages = whiten(advantages, mask)
    gradients, found = loss_of(given, s, advantages, returns)
    made = {"rewards": rewards, "kl": kl, "advantages": advantages, "returns": returns}
    return made | {"gradients": gradients, "metrics": finish(found)}


def differences(given: Arrays, s: Settings) -> Iterator[tuple[str, float]]:
    """How far ours are from TRL's, at most."""
    ours, theirs = by_us(given, s), by_trl(given, s)
    for name in ("rewards", "kl", "advantages", "returns"):
        yield name, np.abs(ours[name] - theirs[name].numpy()).max()
    for name, mine, other in zip(("d logp", "d values"), ours["gradients"], theirs["gradients"], strict=True):
        assert other.abs().max() > 1e-2, "nothing to compare"
        yield name, np.abs(np.asarray(mine) - other.numpy()).max()
    for name, value in theirs["metrics"].items():
        yield name, abs(ours["metrics"][name] - value)


@pytest.mark.parametrize("whiten_rewards", [False, True])
@pytest.mark.parametrize("kl_estimator", ["k1", "k3"])
@pytest.mark.parametrize("lengths", [FULL, RAGGED], ids=["full", "ragged"])
def test_every_number_is_trls(lengths: list[int], kl_estimator: str, whiten_rewards: bool) -> None:
    given = numbers(lengths)
    settings = Settings(kl_estimator=kl_estimator, whiten_rewards=whiten_rewards)
    found = dict(differences(given, settings))
    assert max(found.values()) <= TOLERANCE, found


def test_both_clips_are_at_work() -> None:
    """Else a wrong one would go unseen."""
    metrics = by_us(numbers(RAGGED), Settings())["metrics"]
    assert 0 < metrics["policy/clipfrac_avg"] < 1
    assert 0 < metrics["val/clipfrac_avg"] < 1


def test_the_width_of_the_padding_changes_nothing() -> None:
    """As it does in TRL, where it decides which completions are scored one step later."""
    given = numbers(RAGGED)
    wider = {
        name: np.pad(array, ((0, 0), (0, 3)), constant_values=False if name == "mask" else -7)
        if array.ndim == 2
        else array
        for name, array in given.items()
    }
    narrow, wide = by_us(given, Settings()), by_us(wider, Settings())
    for name in ("rewards", "advantages", "returns"):
        np.testing.assert_allclose(wide[name][:, :TIME], narrow[name], atol=1e-6)
        assert not wide[name][:, TIME:].any()
    for before, after in zip(narrow["gradients"], wide["gradients"], strict=True):
        np.testing.assert_allclose(after[:, :TIME], before, atol=1e-6)
        assert not np.asarray(after)[:, TIME:].any()
    assert wide["metrics"] == pytest.approx(narrow["metrics"], abs=1e-6)


def test_rewards_by_hand() -> None:
    """KL estimates -(-1 + 2) = -1 and -(-2 + 1) = 1 of the first; the second is never scored: nothing is there."""
    mask = np.array([[True, True, False], [False, False, False]])
    logps, ref = (
        np.array([[-2.0, -1.0, 5.0], [9.0, 9.0, 9.0]]),
        np.array([[-1.0, -2.0, -5.0], [0.0, 0.0, 0.0]]),
    )
    rewards, kl = token_rewards(np.array([4.0, 8.0]), logps, ref, mask, 0.5)
    np.testing.assert_allclose(rewards, np.array([[0.5, -0.5 + 4, 0], [0, 0, 0]]))
    np.testing.assert_allclose(kl, [0.0, 0.0])


def test_k3_by_hand() -> None:
    """e^1 - 1 - 1; it is never negative, and its mean is that of k1."""
    args = np.zeros(1), np.array([[-2.0]]), np.array([[-1.0]]), np.array([[True]]), 1.0
    assert token_rewards(*args, kl_estimator="k1")[1] == pytest.approx([-1.0])
    assert token_rewards(*args, kl_estimator="k3")[1] == pytest.approx([np.e - 2])


def test_the_variance_of_ratios_is_that_of_tokens() -> None:
    """Ratios 1 and 2, mean 1.5, and a third which is padding."""
    given = numbers(RAGGED)
    one = {name: array[:1, :3] if array.ndim == 2 else array[:1] for name, array in given.items()}
    one |= {"logp": one["old_logps"] + np.log(np.array([[1, 2, 9]], np.float32))}
    one |= {"mask": np.array([[True, True, False]])}
    _, found = loss_of(one, Settings(), np.zeros((1, 3)), np.zeros((1, 3)))
    metrics = finish(found)
    assert (metrics["val/ratio"], metrics["val/ratio_var"]) == pytest.approx((1.5, 0.25))


def test_microbatches_of_any_size_add_up() -> None:
    """Sums and counts of tokens: rows 0 and 1 to 3 give the loss of all four."""
    given, s = numbers(RAGGED), Settings()
    made = by_us(given, s)
    sums = []
    for part in (slice(0, 1), slice(1, 4)):
        rows = {name: array[part] for name, array in given.items()}
        sums.append(loss_of(rows, s, made["advantages"][part], made["returns"][part])[1]["loss"])
    whole = sum(float(mean.total) for mean in sums) / sum(float(mean.weight) for mean in sums)
    assert whole == pytest.approx(made["metrics"]["loss"], abs=1e-6)


@pytest.mark.parametrize(
    ("kl", "wanted"),
    [
        (6.0, 0.1),  # at the target
        (6.6, 0.1 * (1 + 0.1 * 0.05)),  # a tenth above it
        (60.0, 0.1 * (1 + 0.2 * 0.05)),  # an error counts as a fifth at most
        (-1.0, 0.1 * (1 - 0.2 * 0.05)),
    ],
)
def test_the_kl_controller(kl: float, wanted: float) -> None:
    """Over a horizon of 10,000 episodes, of which 500 were drawn: 0.05."""
    found = adaptive_kl(0.1, kl, target=6.0, horizon=10_000, episodes=500)
    assert found == pytest.approx(wanted)
    assert isinstance(found, float)
