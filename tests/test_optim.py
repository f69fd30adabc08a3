"""Optimizers against torch's and transformers' on the same gradients; schedules at every step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import Adafactor, Trainer, get_scheduler

from ntjax.models import Model, build
from ntjax.optim import direction, schedule
from ntjax.params import Params, decays
from ntjax.stages.base import StageConfig
from tests.torch_reference import TINY, stacked, torch_model

RATE = 0.01
HF = {**TINY, "model_type": "qwen2"}  # biases, norms, embeddings and matrices


def settings(**changes: Any) -> StageConfig:
    """A stage's, without warm-up."""
    defaults = {"learning_rate": RATE, "weight_decay": 0.1, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    return StageConfig(stage_type="sft", **{**defaults, "warmup_steps": 0, **changes})


@cache
def tiny() -> Model:
    return build(HF)


def gradients(step: int) -> Params:
    """The same random gradients for both sides, of very different sizes from weight to weight."""
    rng = np.random.default_rng(step)
    return {
        path: jnp.asarray(10.0 ** (i % 5 - 3) * rng.standard_normal(spec.shape), jnp.float32)
        for i, (path, spec) in enumerate(sorted(tiny().specs.items()))
    }


def trained(stage: StageConfig, params: Params, steps: int) -> Params:
    """`params` after `steps` updates by `gradients`, as the step applies them."""
    optimizer = direction(stage, tiny().specs)
    state = optimizer.init(params)

    @jax.jit
    def update(params: Params, state: optax.OptState, grads: Params) -> tuple[Params, optax.OptState]:
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(lambda p, u: p - stage.learning_rate * u, params, updates), state

    for step in range(steps):
        params, state = update(params, state, gradients(step))
    return params


def decayed_by_transformers(model: Any) -> set[str]:
    """The names of the tensors that transformers' Trainer decays; the method reads nothing of the trainer."""
    trainer: Any = None
    return set(Trainer.get_decay_parameter_names(trainer, model))


def trained_by_torch(
    model: torch.nn.Module, optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], steps: int
) -> Params:
    """The same by a torch optimizer over transformers' two groups: with decay, and without."""
    named = dict(model.named_parameters())
    decayed = decayed_by_transformers(model)
    torched = optimizer(
        [
            {"params": [p for name, p in named.items() if name in decayed], "weight_decay": 0.1},
            {"params": [p for name, p in named.items() if name not in decayed], "weight_decay": 0.0},
        ]
    )
    for step in range(steps):
        grads = gradients(step)
        for path, spec in tiny().specs.items():
            for index, name in spec.tensors():
                named[name].grad = torch.tensor(np.asarray(grads[path][index])).reshape(named[name].shape)
        torched.step()
    return stacked(named, tiny().specs)


def assert_same(ours: Params, theirs: Params, rtol: float) -> None:
    for path in theirs:
        scale = float(jnp.abs(theirs[path]).max())
        np.testing.assert_allclose(ours[path], theirs[path], rtol=rtol, atol=rtol * scale, err_msg=path)


def test_decay_spares_what_transformers_spares() -> None:
    decayed = {name for spec in tiny().specs.values() if decays(spec) for _, name in spec.tensors()}
    assert decayed == decayed_by_transformers(torch_model(HF))


def test_adamw_is_torchs() -> None:
    model = torch_model(HF)
    start = stacked(model.state_dict(), tiny().specs)
    ours = trained(settings(), start, 20)
    theirs = trained_by_torch(model, lambda groups: torch.optim.AdamW(groups, RATE, (0.9, 0.95), 1e-6), 20)
    assert_same(ours, theirs, 2e-6)
    assert float(jnp.abs(ours["embed"] - start["embed"]).max()) > RATE


@pytest.mark.parametrize("optimizer", ["adamw_torch", "lion", "muon"])
def test_the_first_moment_alone_is_kept_in_mu_dtype(optimizer: str) -> None:
    transform = direction(settings(optimizer=optimizer, mu_dtype="bfloat16"), tiny().specs)
    state = jax.eval_shape(transform.init, gradients(0))
    kinds = {
        next(str(key.name) for key in reversed(path) if isinstance(key, jax.tree_util.GetAttrKey)): leaf.dtype
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if leaf.size > 100
    }
    assert kinds.pop("mu") == jnp.bfloat16
    assert set(kinds.values()) <= {jnp.dtype("float32")}


def test_the_second_moment_of_bf16_weights_falls() -> None:
    """By 0.999 a step, which bf16 would round to 1."""
    transform = direction(settings(adam_beta2=0.999), tiny().specs)
    params = {path: jnp.ones(spec.shape, jnp.bfloat16) for path, spec in tiny().specs.items()}
    update = jax.jit(lambda grads, state: transform.update(grads, state, params)[1])
    state = update(jax.tree.map(jnp.ones_like, params), transform.init(params))
    for _ in range(50):
        state = update(jax.tree.map(jnp.zeros_like, params), state)
    adam = next(part for part in state if hasattr(part, "nu"))
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.mu)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(adam.nu["blocks.mlp.up"], 0.001 * 0.999**50, rtol=1e-5)


def test_adamw_rounds_its_first_moment_between_steps() -> None:
    path = "blocks.mlp.up"
    start, grads = stacked(torch_model(HF).state_dict(), tiny().specs), [gradients(i) for i in range(3)]
    ours = trained(settings(mu_dtype="bfloat16"), start, 3)[path]
    p, mu, nu = start[path], jnp.zeros(()), jnp.zeros(())
    for step, g in enumerate((g[path] for g in grads), start=1):
        mu, nu = 0.9 * mu + 0.1 * g, 0.95 * nu + 0.05 * g**2
        update = mu / (1 - 0.9**step) / (jnp.sqrt(nu / (1 - 0.95**step)) + 1e-6)
        p, mu = p - RATE * (update + 0.1 * p), mu.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(ours, p, rtol=2e-6, atol=2e-6)
    assert float(jnp.abs(ours - trained(settings(), start, 3)[path]).max()) > 1e-5


def test_adafactor_is_transformers() -> None:
    model = torch_model(HF)
    start = stacked(model.state_dict(), tiny().specs)
    ours = trained(settings(optimizer="adafactor"), start, 5)

    def adafactor(groups: list[dict[str, Any]]) -> Adafactor:
        return Adafactor(groups, RATE, scale_parameter=False, relative_step=False)

    assert_same(ours, trained_by_torch(model, adafactor, 5), 2e-6)


def test_lion_by_hand() -> None:
    start, grads = stacked(torch_model(HF).state_dict(), tiny().specs), [gradients(i) for i in range(2)]
    ours = trained(settings(optimizer="lion"), start, 2)
    for path, p in start.items():
        decay = 0.1 if decays(tiny().specs[path]) else 0.0
        g0, g1 = grads[0][path], grads[1][path]
        p = p - RATE * (jnp.sign(0.1 * g0) + decay * p)
        momentum = 0.05 * g0
        p = p - RATE * (jnp.sign(0.9 * momentum + 0.1 * g1) + decay * p)
        np.testing.assert_allclose(ours[path], p, atol=1e-6, err_msg=path)


def test_sgd_by_hand() -> None:
    start, grads = stacked(torch_model(HF).state_dict(), tiny().specs), gradients(0)
    ours = trained(settings(optimizer="sgd"), start, 1)
    for path, p in start.items():
        decay = 0.1 if decays(tiny().specs[path]) else 0.0
        np.testing.assert_allclose(ours[path], p - RATE * (grads[path] + decay * p), atol=1e-6, err_msg=path)


def first_direction(optimizer: str, grads: Params) -> Params:
    """What `optimizer` makes of a first gradient, decay apart."""
    transform = direction(settings(optimizer=optimizer, weight_decay=0.0), tiny().specs)
    params = jax.tree.map(jnp.zeros_like, grads)
    return jax.jit(transform.update)(grads, transform.init(params), params)[0]


def matrices() -> dict[str, np.ndarray]:
    """For each matrix inside layers a gradient [layers, out, in] with singular values from 1 to 3, a thousand
    times as large in layer 1 as in layer 0."""
    rng = np.random.default_rng(0)
    grads = {}
    for path, spec in tiny().specs.items():
        if spec.stacked and decays(spec):
            u, _, vt = np.linalg.svd(rng.standard_normal((2, *spec.torch_shape)), full_matrices=False)
            grads[path] = (u * np.linspace(1, 3, u.shape[-1])) @ vt * np.array([1, 1000])[:, None, None]
    return grads


def test_muon_orthogonalises_each_matrix_of_each_layer() -> None:
    grads = matrices()
    assert len(grads) == 7  # q, k, v, o, gate, up, down
    shaped = {
        path: jnp.asarray(g.reshape(tiny().specs[path].shape), jnp.float32) for path, g in grads.items()
    }
    updates = first_direction("muon", gradients(0) | shaped)
    for path, stack in grads.items():
        for update, grad in zip(np.asarray(updates[path]).reshape(stack.shape), stack, strict=True):
            u, _, vt = np.linalg.svd(grad, full_matrices=False)
            # Seen along the gradient's own directions it is diagonal, and, but for the scale of
            # arXiv:2502.16982, eq. 4, in the band that five Newton-Schulz steps reach (Jordan et al. 2024).
            seen = u.T @ update @ vt.T / (0.2 * math.sqrt(max(grad.shape)))
            values = np.diag(seen)
            np.testing.assert_allclose(seen, np.diag(values), atol=1e-4, err_msg=path)
            assert 0.68 < values.min() <= values.max() < 1.14, path


def test_muon_leaves_embeddings_norms_and_biases_to_adam() -> None:
    muon, adam = (first_direction(optimizer, gradients(0)) for optimizer in ("muon", "adamw_torch"))
    others = set(gradients(0)) - set(matrices())
    assert {"embed", "head", "norm", "blocks.attn_norm", "blocks.attn.q_bias"} <= others
    for path in others:
        np.testing.assert_array_equal(muon[path], adam[path])


STEPS = 50
SCHEDULES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "cosine": ("cosine", {}),
    "cosine, two waves": ("cosine", {"num_cycles": 2}),
    "cosine_with_restarts": ("cosine_with_restarts", {"num_cycles": 3}),
    "polynomial": ("polynomial", {}),
    "polynomial, squared": ("polynomial", {"lr_end": 1e-3, "power": 2.0}),
    "constant": ("constant", {}),
    "constant_with_warmup": ("constant_with_warmup", {}),
    "inverse_sqrt": ("inverse_sqrt", {}),
    "inverse_sqrt, timescale": ("inverse_sqrt", {"timescale": 20}),
    "cosine_with_min_lr": ("cosine_with_min_lr", {"min_lr": 2e-3}),
    "cosine_with_min_lr, rate": ("cosine_with_min_lr", {"min_lr_rate": 0.3, "num_cycles": 1.0}),
    "warmup_stable_decay": ("warmup_stable_decay", {"num_decay_steps": 15}),
    "warmup_stable_decay, floor": ("warmup_stable_decay", {"num_decay_steps": 15, "min_lr_ratio": 0.2}),
    "warmup_stable_decay, short": ("warmup_stable_decay", {"num_decay_steps": 9, "num_stable_steps": 12}),
}


def rates_of_transformers(name: str, kwargs: dict[str, Any], warmup: int) -> list[float]:
    """transformers' learning rate of each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], RATE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Both num_training_steps and num_stable_steps")
        scheduler = get_scheduler(name, optimizer, warmup, STEPS, kwargs)
    return [RATE * scheduler.lr_lambdas[0](step) for step in range(STEPS)]


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_transformers_at_every_step(name: str, warmup: int) -> None:
    kind, kwargs = SCHEDULES[name]
    rate = schedule(settings(lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs, warmup_steps=warmup), STEPS)
    ours = [float(rate(jnp.asarray(step))) for step in range(STEPS)]
    np.testing.assert_allclose(ours, rates_of_transformers(kind, kwargs, warmup), rtol=1e-5, atol=1e-6 * RATE)


def test_a_warm_up_below_one_is_a_share_of_the_steps_rounded_up() -> None:
    rate = schedule(settings(lr_scheduler_type="constant_with_warmup", warmup_steps=0.05), STEPS)  # 2.5, so 3
    ours = [float(rate(jnp.asarray(step))) for step in range(5)]
    np.testing.assert_allclose(ours, [0, RATE / 3, 2 * RATE / 3, RATE, RATE], rtol=1e-6)
