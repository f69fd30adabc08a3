"""Random pairs of answers, and TRL's own losses of them."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from ntjax.losses.pairs import Targets, completion_sums
from ntjax.losses.preference import Preference, preference_metrics
from ntjax.metrics import finish
from ntjax.ops.logprobs import TokenLogprobs

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
PAIRS, TIME, VOCAB = 6, 11, 7


@dataclass(frozen=True)
class Answers:
    """Pairs one a slot: ids, mask, segments [N, 2, T], and logits [N, 2, T, V] of the policy and of its reference."""

    ids: np.ndarray
    mask: np.ndarray
    segments: np.ndarray
    logits: np.ndarray
    ref_logits: np.ndarray

    @property
    def targets(self) -> Targets:
        return Targets.of(*map(jnp.asarray, (self.mask, self.segments, np.ones((len(self.ids), 1), bool))))


def answers(pairs: int = PAIRS, seed: int = 0) -> Answers:
    """Prompts of 1 to 3 tokens, answers of 1 to 8, the policy a little away from its reference."""
    rng = np.random.default_rng(seed)
    shape = (pairs, 2, TIME)
    prompts = rng.integers(1, 4, (pairs, 1, 1))
    ends = prompts + rng.integers(1, 9, (pairs, 2, 1))
    at = np.broadcast_to(np.arange(TIME), shape)
    logits = rng.standard_normal((*shape, VOCAB)).astype(np.float32)
    ids = rng.integers(0, VOCAB, shape, dtype=np.int32)
    moved = logits + 0.5 * rng.standard_normal(logits.shape).astype(np.float32)
    return Answers(ids, (at >= prompts) & (at < ends), (at < ends).astype(np.int32), moved, logits)


def token_scores(ids: jax.Array, logits: jax.Array) -> TokenLogprobs:
    """What `token_logprobs` gives, of whole logits."""
    logp = jax.nn.log_softmax(logits)
    targets = jnp.roll(ids, -1, axis=-1)
    chosen = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    entropy = -(jnp.exp(logp) * logp).sum(-1)
    correct = logits.argmax(-1) == targets
    return TokenLogprobs(chosen, entropy, correct, jax.nn.logsumexp(2 * logp, axis=-1))


def ours(data: Answers, preference: Preference, *, free: bool = False) -> tuple[dict[str, float], np.ndarray]:
    """The metrics, and the loss's gradient to the policy's logits."""
    targets = data.targets
    ref = None
    if not free:
        scores = token_scores(jnp.asarray(data.ids), jnp.asarray(data.ref_logits))
        ref = completion_sums(scores.logp, targets, preference.ld_alpha)

    def loss(logits: jax.Array) -> Any:
        scores = token_scores(jnp.asarray(data.ids), logits)
        metrics = preference_metrics(scores, logits.mean(-1), ref, targets, preference)
        return metrics["loss"].total / metrics["loss"].weight, metrics

    gradient, metrics = jax.grad(loss, has_aux=True)(jnp.asarray(data.logits))
    return finish(metrics), np.asarray(gradient)


def rows(x: np.ndarray) -> torch.Tensor:
    """[N, 2, ...] as TRL has it: all chosen rows, then all rejected ones."""
    return torch.tensor(np.concatenate([x[:, 0], x[:, 1]]))


def pairs_of(x: torch.Tensor) -> np.ndarray:
    """TRL's rows as [N, 2, ...]."""
    return np.stack([half.numpy() for half in x.chunk(2)], axis=1)


def _accelerator() -> SimpleNamespace:
    same = {"gather": lambda x: x, "gather_for_metrics": lambda x: x}
    return SimpleNamespace(device=torch.device("cpu"), **same)


def _trl_outputs(logits: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
    """What TRL's fused head gives: zero where nothing is learned."""
    labels, logits = labels[:, 1:], logits[:, :-1]
    learned = labels != -100
    logp = torch.log_softmax(logits, -1)
    per_token = logp.gather(-1, labels.clamp(min=0).long()[..., None])[..., 0]
    return SimpleNamespace(
        log_probs=per_token * learned,
        entropy=-(logp.exp() * logp).sum(-1) * learned,
        is_top1=(logits.argmax(-1) == labels) & learned,
        mean_logits=logits.mean(-1) * learned,
        log_sum_sq_probs=torch.logsumexp(2 * logp, -1).detach() * learned,
    )


def dpo(data: Answers, preference: Preference) -> tuple[dict[str, float], np.ndarray]:
    """The same by TRL's DPOTrainer."""
    from trl import DPOTrainer

    logits = rows(data.logits).requires_grad_()
    model: Any = torch.nn.Module()
    model.is_gradient_checkpointing = False
    trainer = SimpleNamespace(
        model=model,
        ref_model=lambda labels, **_: _trl_outputs(rows(data.ref_logits), labels),
        accelerator=_accelerator(),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=preference.discopop_tau),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        loss_types=preference.losses,
        loss_weights=preference.weights or [1.0] * len(preference.losses),
        beta=preference.beta,
        label_smoothing=preference.label_smoothing,
        ld_alpha=preference.ld_alpha,
        f_divergence_type=preference.f_divergence,
        f_alpha_divergence_coef=preference.f_alpha,
        use_weighting=preference.use_weighting,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    mask = rows(data.mask).long()
    inputs = {"input_ids": rows(data.ids), "completion_mask": mask, "attention_mask": rows(data.segments)}
    loss = DPOTrainer._compute_loss(
        trainer, lambda labels, **_: _trl_outputs(logits, labels), inputs, return_outputs=False
    )
    loss.backward()
    logged = {name: values[0] for name, values in trainer._metrics["train"].items() if name != "num_tokens"}
    assert logits.grad is not None
    return {"loss": loss.item(), **logged}, pairs_of(logits.grad)


def without_reference(data: Answers, preference: Preference) -> tuple[dict[str, float], np.ndarray]:
    """The same by TRL's CPOTrainer, or its ORPOTrainer."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    (name,) = preference.losses
    logits = rows(data.logits).requires_grad_()
    kind: Any = ORPOTrainer if name == "orpo" else CPOTrainer
    trainer = kind.__new__(kind)
    settings = {"beta": preference.beta, "label_smoothing": preference.label_smoothing, "alpha": 0.0}
    settings |= {"loss_type": {"cpo": "sigmoid"}.get(name, name), "simpo_gamma": preference.simpo_gamma}
    settings |= {
        "cpo_alpha": preference.cpo_alpha,
        "accelerator": _accelerator(),
        "is_encoder_decoder": False,
    }
    vars(trainer).update(settings, aux_loss_enabled=False, pad_token_id=0, padding_value=0)
    batch = {}
    for side, answer in enumerate(("chosen", "rejected")):
        ids = torch.tensor(data.ids[:, side]).long()
        batch[f"{answer}_input_ids"] = ids
        batch[f"{answer}_attention_mask"] = torch.tensor(data.segments[:, side])
        batch[f"{answer}_labels"] = ids.masked_fill(~torch.tensor(data.mask[:, side]), -100)
    loss, logged = trainer.get_batch_loss_metrics(lambda ids, **_: SimpleNamespace(logits=logits), batch)
    loss.backward()
    assert logits.grad is not None
    # Means over prompts and padding too.
    logged = {name: value for name, value in logged.items() if not name.startswith("logits/")}
    return {"loss": loss.item(), **logged}, pairs_of(logits.grad)
