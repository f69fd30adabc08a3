"""GRPO's losses beside TRL 1.16's own `_compute_loss`, on the same log-probs: values, gradients and metrics."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl import GRPOTrainer

from ntjax.losses.grpo import Grpo, grpo_metrics
from ntjax.metrics import Metrics, finish

ROWS, TIME = 6, 9
LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
TOLERANCE = 1e-5


def numbers(seed: int = 0) -> dict[str, np.ndarray]:
    """Log-probs that moved enough for ratios to be clipped on both sides, of completions of several lengths."""
    dice = np.random.default_rng(seed)
    lengths = np.array([9, 4, 1, 7, 9, 5])
    logp = dice.uniform(-3, -0.1, (ROWS, TIME))
    return {
        "logp": logp,
        "old_logps": logp + dice.normal(0, 0.3, logp.shape),
        "ref_logps": logp + dice.normal(0, 0.3, logp.shape),
        "entropy": dice.uniform(0.1, 3, logp.shape),
        "mask": np.arange(TIME) < lengths[:, None],
        "advantages": np.array([1.2, -0.7, 0.0, -1.1, 0.4, 2.0]),
    }


class Accelerator:
    """One process."""

    num_processes = 1
    sync_gradients = True

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x

    gather_for_metrics = gather

    def reduce(self, x: torch.Tensor, reduction: str) -> torch.Tensor:
        return x

    def pad_across_processes(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        return x


def by_trl(
    given: dict[str, np.ndarray], settings: Grpo, *, window: int | None = None, steps: int = 1
) -> tuple[float, np.ndarray, dict[str, float]]:
    """Loss, its gradient with respect to the log-probs, and metrics of a microbatch.

    It is one of `steps` of a window with `window` tokens (default: its own).
    """
    tensors = {name: torch.tensor(array) for name, array in given.items()}
    logp = tensors["logp"].float().requires_grad_()
    mask = tensors["mask"].int()
    trainer: Any = SimpleNamespace(
        **asdict(settings),
        args=SimpleNamespace(**asdict(settings), steps_per_generation=steps),
        epsilon_low=settings.epsilon,
        accelerator=Accelerator(),
        model=SimpleNamespace(training=True),
        use_vllm=False,
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, tensors["entropy"].float(), None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )
    trainer.epsilon_high = settings.high
    trainer.get_high_entropy_mask = lambda *rest: GRPOTrainer.get_high_entropy_mask(trainer, *rest)
    prompt = torch.ones(len(mask), 1, dtype=torch.int)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": tensors["advantages"].float(),
        "num_items_in_batch": mask.sum() if window is None else torch.tensor(window),
        "ref_per_token_logps": tensors["ref_logps"].float(),
    }
    if "old_logps" in given:
        inputs["old_per_token_logps"] = tensors["old_logps"].float()
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    assert logp.grad is not None
    means = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return loss.item(), logp.grad.numpy(), means


def metrics_of(given: dict[str, Any], settings: Grpo, **more: Any) -> Metrics:
    """Ours of a microbatch."""
    logp, entropy, mask, advantages = (
        jnp.asarray(given[name]) for name in ("logp", "entropy", "mask", "advantages")
    )
    return grpo_metrics(logp, entropy, mask, advantages, settings, **more)


def by_us(given: dict[str, np.ndarray], settings: Grpo) -> tuple[float, np.ndarray, dict[str, float]]:
    arrays = {
        name: jnp.asarray(array, None if name == "mask" else jnp.float32) for name, array in given.items()
    }
    more = {name: arrays[name] for name in ("old_logps", "ref_logps") if name in arrays}

    def loss(logp: jax.Array) -> Any:
        found = metrics_of(arrays | {"logp": logp}, settings, **more)
        return found["loss"].total / found["loss"].weight, found

    (value, found), gradient = jax.value_and_grad(loss, has_aux=True)(arrays["logp"])
    return float(value), np.asarray(gradient), finish(found)


def assert_same(given: dict[str, np.ndarray], settings: Grpo) -> None:
    ours, theirs = by_us(given, settings), by_trl(given, settings)
    assert abs(ours[0] - theirs[0]) <= TOLERANCE
    assert np.abs(theirs[1]).max() > 1e-3, "nothing to compare"
    np.testing.assert_allclose(ours[1], theirs[1], rtol=0, atol=TOLERANCE)
    for name, value in theirs[2].items():
        assert abs(ours[2][name] - value) <= TOLERANCE, name


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_gradient_and_metrics(kind: str, level: str) -> None:
    assert_same(
        numbers(), Grpo(loss_type=kind, importance_sampling_level=level, beta=0.1, max_completion_length=20)
    )


@pytest.mark.parametrize("kind", LOSSES)
def test_on_policy_without_old_log_probs(kind: str) -> None:
    given = numbers(1)
    del given["old_logps"]
    assert_same(given, Grpo(loss_type=kind, max_completion_length=20))


@pytest.mark.parametrize(
    "options",
    [
        {"epsilon_high": 0.28},
        {"delta": 1.3},
        {"beta": 0.2, "use_bias_correction_kl": False},
        {"top_entropy_quantile": 0.3},
        {"off_policy_mask_threshold": 0.01},
        {"top_entropy_quantile": 0.5, "importance_sampling_level": "sequence", "beta": 0.1},
    ],
)
@pytest.mark.parametrize("kind", ["dapo", "grpo", "luspo"])
def test_options(kind: str, options: dict[str, Any]) -> None:
    assert_same(numbers(2), Grpo(loss_type=kind, **options))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", LOSSES)
def test_completions_that_are_masked_out_whole(kind: str, level: str) -> None:
    """As truncated ones are: they count where completions do, and in no metric of tokens."""
    given = numbers(3)
    given["mask"][2:4] = False
    settings = Grpo(loss_type=kind, importance_sampling_level=level, beta=0.1, max_completion_length=20)
    assert_same(given, settings)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", LOSSES)
def test_padding_has_no_part_however_unlikely_it_is(kind: str, level: str) -> None:
    """e^200 is no number of fp32, and 0 times infinity isn't 0."""
    given = numbers(4)
    settings = Grpo(loss_type=kind, importance_sampling_level=level, beta=0.1)
    wanted = by_us(given, settings)
    padding = ~given["mask"]
    given["logp"] = np.where(padding, -200.0, given["logp"])
    given["old_logps"], given["ref_logps"] = (
        np.where(padding, 0.0, given[name]) for name in ("old_logps", "ref_logps")
    )
    found = by_us(given, settings)
    assert found[0] == wanted[0]
    np.testing.assert_array_equal(found[1], wanted[1])
    assert found[2] == wanted[2]


def test_a_microbatch_without_tokens_has_no_loss_and_no_metrics_of_tokens() -> None:
    given = numbers(5)
    given["mask"][:] = False
    found = metrics_of(given, Grpo())
    assert {name: float(mean.weight) for name, mean in found.items()} == dict.fromkeys(found, 0.0)
    assert float(found["loss"].total) == 0


def test_a_weight_of_vespo_that_overflows_is_none() -> None:
    """Log of it: 0.0001 + 10 * 10 - 0.0001 * e^10 = 97.8; the second completion's is 0.0001 + 0 - 0.0001."""
    shape = {"mask": np.ones((2, 1), np.bool_), "advantages": np.ones(2), "entropy": np.ones((2, 1))}
    given = {"logp": np.array([[-1.0], [-1.0]]), "old_logps": np.array([[-11.0], [-1.0]]), **shape}
    given["ref_logps"] = given["logp"]
    settings = Grpo(loss_type="vespo", vespo_k_pos=10.0, vespo_lambda_pos=1e-4)
    assert_same(given, settings)
    assert by_us(given, settings)[2]["vespo/phi_seq_mean"] == pytest.approx(0.5)


def parts(given: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Two halves."""
    return [
        {name: array[half] for name, array in given.items()}
        for half in (slice(0, ROWS // 2), slice(ROWS // 2, ROWS))
    ]


@pytest.mark.parametrize("kind", LOSSES)
def test_microbatches_add_up_to_the_step_of_trl(kind: str) -> None:
    """TRL adds up microbatches' losses, each over the number of them or over the step's tokens."""
    given, settings = numbers(4), Grpo(loss_type=kind)
    found = [metrics_of(part, settings, old_logps=part["old_logps"])["loss"] for part in parts(given)]
    if kind in ("dapo", "cispo", "vespo"):
        wanted = by_trl(given, settings)[0]
    else:
        wanted = sum(by_trl(part, settings)[0] for part in parts(given)) / 2
    ours = sum(float(mean.total) for mean in found) / sum(float(mean.weight) for mean in found)
    assert abs(ours - wanted) <= TOLERANCE


@pytest.mark.parametrize("kind", ["dapo", "cispo", "vespo"])
def test_steps_of_a_window_are_divided_by_the_same_number_of_tokens(kind: str) -> None:
    """A window of two steps: each is divided by half the window's tokens, as by TRL, not by its own."""
    given, settings = numbers(5), Grpo(loss_type=kind)
    tokens = int(given["mask"].sum())
    for part in parts(given):
        items = jnp.full(ROWS // 2, tokens / ROWS)
        mean = metrics_of(part, settings, old_logps=part["old_logps"], items=items)["loss"]
        assert part["mask"].sum() != tokens / 2
        wanted = by_trl(part, settings, window=tokens, steps=2)[0]
        assert abs(float(mean.total) / float(mean.weight) - wanted) <= TOLERANCE


def test_the_sampler_s_log_probs_are_compared_over_completions() -> None:
    given = {name: jnp.asarray(array) for name, array in numbers(6).items()}
    assert not given["mask"][1, 8]
    off = given["logp"].at[0, 0].add(0.5).at[1, 8].add(9.0)
    found = metrics_of(given, Grpo(), sampler_logps=off)
    assert float(found["sampler/logprob_diff"].total) == pytest.approx(0.5)
    assert float(found["sampler/logprob_diff"].weight) == given["mask"].sum()
    assert float(found["sampler/logprob_diff_max"].total) == pytest.approx(0.5)
