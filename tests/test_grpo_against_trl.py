"""From rewards of given completions to loss and gradients of a tiny Llama, as TRL 1.16's GRPOTrainer has them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from ntjax.losses.advantages import Advantages, group_advantages
from ntjax.losses.grpo import Grpo, grpo_metrics
from ntjax.metrics import finish
from ntjax.models import Model, build
from ntjax.params import Params
from ntjax.stages.rollout import Scored, completion_scores
from tests.peft_reference import WARNINGS
from tests.tiny import tiny_tokenizer
from tests.torch_reference import TINY, VOCAB, stacked, torch_model
from tests.trl_reference import causal

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNINGS]
N, GROUP, PARTS = 8, 4, 2  # completions of a window, of a prompt, and the steps of a window
STEP = N // PARTS
TEMPERATURE = 0.7
WEIGHTS = [1.0, 0.5]
EPSILON = 0.1
TOLERANCE = 1e-5
LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
NONE = np.nan
# The third is judged by no one, the fifth by one of two; the last group's first reward is the same for all.
SCORES = np.array([[1, 0], [0, 2], [NONE, NONE], [3, 1], [1, NONE], [1, 2], [1, 0.5], [1, -1]])


@dataclass(frozen=True)
class Window:
    """Two prompts and four completions of each, which end with the stop token (2) or were cut off."""

    prompts: list[list[int]]
    completions: list[list[int]]

    @classmethod
    def random(cls) -> Window:
        dice = np.random.default_rng(0)
        asked = [dice.integers(3, VOCAB, length).tolist() for length in (5, 2)]
        lengths, stopped = (3, 6, 4, 1, 6, 2, 5, 6), (1, 0, 1, 1, 1, 1, 1, 0)
        answers = [dice.integers(3, VOCAB, length).tolist() for length in lengths]
        answers = [ids[:-1] + [2] if stop else ids for ids, stop in zip(answers, stopped, strict=True)]
        return cls([asked[n // GROUP] for n in range(N)], answers)

    def arrays(self, mask_truncated: bool) -> dict[str, np.ndarray]:
        """As a stage's loss takes them: each completion right after its prompt, padded on the right."""
        longest = max(map(len, self.completions))
        time = max(map(len, self.prompts)) + longest
        arrays: dict[str, np.ndarray] = {
            name: np.zeros((N, time), np.int32) for name in ("tokens", "segments", "positions")
        }
        arrays |= {"start": np.zeros(N, np.int32), "mask": np.zeros((N, longest), np.bool_)}
        for row, (prompt, answer) in enumerate(zip(self.prompts, self.completions, strict=True)):
            length = len(prompt) + len(answer)
            arrays["tokens"][row, :length] = prompt + answer
            arrays["segments"][row, :length] = 1
            arrays["positions"][row, :length] = np.arange(length)
            arrays["start"][row] = len(prompt)
            arrays["mask"][row, : len(answer)] = answer[-1] == 2 or not mask_truncated
        return arrays


@dataclass
class Place:
    """TRL's trainer and our model, with the weights that drew the window and those that learn from it."""

    trainer: Any
    model: Model
    old: dict[str, torch.Tensor]
    new: dict[str, torch.Tensor]
    window: Window = field(default_factory=Window.random)

    def scored(self, **options: Any) -> tuple[dict[str, Any], dict[str, list[float]]]:
        """TRL's arrays and metrics of the window, which the old weights drew; its options stay as they were set."""
        for name, value in options.items():
            setattr(self.trainer, name, value)
            setattr(self.trainer.args, name, value)
        self.trainer._metrics["train"] = defaultdict(list)
        self.trainer.model.load_state_dict(self.old)
        found = self.trainer._generate_and_score_completions([{"prompt": ""}] * N)
        return found, dict(self.trainer._metrics["train"])

    def by_trl(self, found: dict[str, Any], rows: slice) -> tuple[float, dict[str, float], Params]:
        """Loss, metrics and gradients of one of the window's steps, at the new weights."""
        part = {
            name: value[rows] if torch.is_tensor(value) and value.ndim else value
            for name, value in found.items()
        }
        model = self.trainer.model
        model.load_state_dict(self.new)
        model.zero_grad()
        self.trainer._metrics["train"] = defaultdict(list)
        loss = self.trainer._compute_loss(model, part)
        loss.backward()
        metrics = {name: values[0] for name, values in self.trainer._metrics["train"].items()}
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        return loss.item(), metrics, stacked(gradients, self.model.specs)

    def logps(self, weights: dict[str, torch.Tensor], arrays: dict[str, np.ndarray]) -> jax.Array:
        """Ours of the whole window."""
        return _scores(self.model, stacked(weights, self.model.specs), arrays).logp

    def by_us(
        self, batch: dict[str, Any], settings: Grpo, items: jax.Array
    ) -> tuple[float, dict[str, float], Params]:
        """Ours of the same; the loss depends on the weights through log-probs alone."""
        params = stacked(self.new, self.model.specs)
        scores = _scores(self.model, params, batch)

        def loss(logp: jax.Array) -> Any:
            given = {name: batch[name] for name in ("old_logps", "ref_logps")}
            found = grpo_metrics(
                logp, scores.entropy, batch["mask"], batch["advantages"], settings, **given, items=items
            )
            return found["loss"].total / found["loss"].weight, found

        direction, metrics = jax.grad(loss, has_aux=True)(scores.logp)
        means = finish(metrics)
        return means["loss"], means, _pulled_back(self.model, params, batch, direction)


@partial(jax.jit, static_argnums=0)
def _scores(model: Model, params: Params, batch: dict[str, Any]) -> Scored:
    return completion_scores(model, params, batch, TEMPERATURE)


@partial(jax.jit, static_argnums=0)
def _pulled_back(model: Model, params: Params, batch: dict[str, Any], direction: jax.Array) -> Params:
    """The gradient of the weights, from that of the log-probs."""
    return jax.vjp(lambda params: _scores(model, params, batch).logp, params)[1](direction)[0]


def changed(state: dict[str, torch.Tensor], size: float, seed: int) -> dict[str, torch.Tensor]:
    """Weights a step away."""
    dice = torch.Generator().manual_seed(seed)
    return {name: x + size * torch.randn(x.shape, generator=dice) for name, x in state.items()}


def unasked(**_: Any) -> list[float | None]:
    """A reward function: the scores are given."""
    raise AssertionError


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The reference model is the folder's; old and new weights are near it.

    A small head keeps gradients small: of large ones float32 rounds off more than 1e-5.
    """
    folder = tmp_path_factory.mktemp("grpo")
    model: Any = torch_model(TINY)
    with torch.no_grad():
        model.lm_head.weight /= 10
    model.save_pretrained(folder)
    options: dict[str, Any] = {"per_device_train_batch_size": STEP, "gradient_accumulation_steps": 1}
    options |= {"steps_per_generation": PARTS, "num_generations": GROUP, "temperature": TEMPERATURE}
    options |= {"max_completion_length": 6, "beta": 0.1, "epsilon": EPSILON, "reward_weights": WEIGHTS}
    options |= {"bf16": False, "use_cpu": True, "report_to": "none", "activation_checkpointing": False}
    trainer: Any = GRPOTrainer(
        causal(folder),
        reward_funcs=[unasked, unasked],
        args=GRPOConfig(str(folder / "out"), **options),
        train_dataset=Dataset.from_list([{"prompt": ""}] * N),
        processing_class=tiny_tokenizer(),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    reference = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    old = changed(reference, 0.02, 1)
    place = Place(trainer, build(TINY), old, changed(old, 0.02, 2))
    drawn = place.window
    trainer._generate = lambda prompts: (
        *(drawn.prompts, drawn.completions, None, [""] * N),
        *(None, {}, None, None),
    )
    trainer._calculate_rewards = lambda *_: torch.tensor(SCORES, dtype=torch.float32)
    return place


def advantages(scale: str = "group", aggregation: str = "sum_then_normalize") -> Advantages:
    return group_advantages(SCORES, np.array(WEIGHTS), GROUP, scale, aggregation)


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_and_metrics_of_rewards(place: Place, scale: str, aggregation: str) -> None:
    found, metrics = place.scored(scale_rewards=scale, multi_objective_aggregation=aggregation)
    ours = advantages(scale, aggregation)
    assert found["advantages"].abs().max() > 0.5
    np.testing.assert_allclose(ours.advantages, found["advantages"].numpy(), rtol=0, atol=TOLERANCE)
    for name, value in finish(ours.metrics).items():
        assert value == pytest.approx(metrics[name][0], abs=TOLERANCE), name


CASES: list[dict[str, Any]] = [
    *({"loss_type": name} for name in LOSSES),
    *({"loss_type": name, "mask_truncated_completions": True} for name in ("dapo", "grpo", "bnpo")),
    {"importance_sampling_level": "sequence"},
    {"top_entropy_quantile": 0.5},
    {"off_policy_mask_threshold": 0.005},
    {"delta": 1.1},
]
DEFAULTS: dict[str, Any] = {"mask_truncated_completions": False, "importance_sampling_level": "token"}
DEFAULTS |= {"top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "delta": None}
DEFAULTS |= {"loss_type": "dapo", "scale_rewards": "group"}
DEFAULTS |= {"multi_objective_aggregation": "sum_then_normalize"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_loss_metrics_and_gradients_of_both_steps(place: Place, case: dict[str, Any]) -> None:
    options = DEFAULTS | case
    found, _ = place.scored(**options)
    arrays = place.window.arrays(options["mask_truncated_completions"])
    arrays |= {"advantages": advantages().advantages.astype(np.float32)}
    arrays["old_logps"] = np.asarray(place.logps(place.old, arrays))
    arrays["ref_logps"] = np.asarray(place.logps(place.trainer.ref_model.state_dict(), arrays))
    settings = Grpo(
        **{name: options[name] for name in Grpo.__dataclass_fields__ if name in options},
        beta=0.1,
        epsilon=EPSILON,
        max_completion_length=6,
    )
    items = jnp.full(STEP, arrays["mask"].sum() / N)
    for step in range(PARTS):
        rows = slice(step * STEP, (step + 1) * STEP)
        loss, metrics, gradients = place.by_trl(found, rows)
        batch = {name: array[rows] for name, array in arrays.items()}
        our_loss, means, our_gradients = place.by_us(batch, settings, items)
        assert abs(our_loss - loss) <= TOLERANCE
        assert max(float(jnp.abs(x).max()) for x in gradients.values()) > 1e-2, "nothing to compare"
        for name, gradient in gradients.items():
            np.testing.assert_allclose(our_gradients[name], gradient, rtol=0, atol=TOLERANCE, err_msg=name)
        for name, value in metrics.items():
            assert means[name] == pytest.approx(value, abs=TOLERANCE), name
