"""The train step: one pure function for every stage.

    step(state, frozen, batch) -> (state, metrics)

`TrainState` is exactly what a step changes, a checkpoint keeps and jit donates. Frozen weights are a separate argument.
A batch is a dict of arrays [microbatches, rows, ...]; gradients of the losses' totals are summed over microbatches and
divided once by the summed weight, so one microbatch or eight give the same update whatever the masks.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct

from ntjax.metrics import Mean, Metrics
from ntjax.optim import Schedule
from ntjax.params import Params

Batch = dict[str, jax.Array]
Loss = Callable[[Params, Batch], Metrics]
Step = Callable[["TrainState", Params, Batch], tuple["TrainState", Metrics]]


@struct.dataclass
class TrainState:
    """What a step changes. `step` [] int32 counts the steps done."""

    step: jax.Array
    params: Params  # the trainable ones
    opt_state: optax.OptState


def initial_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))


def train_step(
    loss: Loss, optimizer: optax.GradientTransformation, schedule: Schedule, max_grad_norm: float
) -> Step:
    """The step that minimises `loss`; compiled by the caller.

    Gradients are clipped to a global norm of `max_grad_norm` (0: not at all). If any gradient is not finite the
    weights and the optimizer's state stay bit for bit what they were; the metric `skipped` counts it.
    """

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, metrics = _summed_gradients(loss, state.params, frozen, batch)
        scale = 1 / jnp.maximum(metrics["loss"].weight, 1)
        norm = optax.tree.norm(grads) * scale
        finite = jnp.isfinite(norm)
        if max_grad_norm:
            # torch.nn.utils.clip_grad_norm_ has the same 1e-6.
            scale *= jnp.minimum(1.0, max_grad_norm / (norm + 1e-6))
        grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        rate = schedule(state.step)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), state.params, updates)
        kept = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        one = jnp.ones(())
        metrics = metrics | {
            "grad_norm": Mean(norm, one),
            "learning_rate": Mean(rate, one),
            "skipped": Mean(1.0 - finite, one),
        }
        return TrainState(state.step + 1, *kept), metrics

    return step


def eval_step(loss: Loss) -> Callable[[Params, Batch], Metrics]:
    """Metrics of a batch [microbatches, rows, ...] under `params`, summed over its microbatches."""

    def step(params: Params, batch: Batch) -> Metrics:
        def one(total: Metrics, micro: Batch) -> tuple[Metrics, None]:
            return jax.tree.map(jnp.add, total, loss(params, micro)), None

        first = jax.tree.map(lambda x: x[0], batch)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(loss, params, first))
        return jax.lax.scan(one, zeros, batch)[0]

    return step


def _summed_gradients(loss: Loss, params: Params, frozen: Params, batch: Batch) -> tuple[Params, Metrics]:
    """Gradient of the loss's total, and the metrics, each summed over the microbatches."""

    def total(trainable: Params, micro: Batch) -> tuple[jax.Array, Metrics]:
        metrics = loss({**frozen, **trainable}, micro)
        return metrics["loss"].total, metrics

    gradient = jax.grad(total, has_aux=True)
    first = jax.tree.map(lambda x: x[0], batch)
    if jax.tree.leaves(batch)[0].shape[0] == 1:
        return gradient(params, first)

    def one(summed: tuple[Params, Metrics], micro: Batch) -> tuple[tuple[Params, Metrics], None]:
        return jax.tree.map(jnp.add, summed, gradient(params, micro)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, first))
    return jax.lax.scan(one, zeros, batch)[0]
