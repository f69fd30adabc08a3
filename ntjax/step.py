"""The train step: one pure function for every stage.

    step(state, frozen, batch) -> (state, metrics)

`TrainState` is exactly what a step changes, a checkpoint keeps and jit donates. Frozen weights are a separate argument.
A batch is a dict of arrays [microbatches, rows, ...]; gradients of the losses' totals are summed over microbatches and
divided once by the summed weight, so one microbatch or eight give the same update whatever the masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from ntjax import narrow
from ntjax.elsewhere import steads, trained, whole
from ntjax.metrics import Mean, Metrics
from ntjax.optim import Schedule
from ntjax.params import Params

Batch = dict[str, jax.Array]
Loss = Callable[[Params, Batch], Metrics]
Join = Callable[
    [Params, Params, jax.Array | None], Params
]  # (frozen, trainable, dropout key) -> the model's weights
Step = Callable[["TrainState", Params, Batch], tuple["TrainState", Metrics]]


@struct.dataclass
class TrainState:
    """What a step changes. `step` [] int32 counts the steps done."""

    step: jax.Array
    params: Params  # the trainable ones
    opt_state: optax.OptState
    reference: Params | None = None  # where it follows the policy; a step leaves it as it is


def initial_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    of_state: Callable[[Any], Any] | None = None,
) -> TrainState:
    """The state before the first step; `of_state` gives the optimizer's shardings."""
    places = of_state(jax.eval_shape(optimizer.init, params)) if of_state else None
    opt_state = jax.jit(lambda params: optimizer.init(whole(params)), out_shardings=places)(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state)


@partial(jax.jit, donate_argnums=0)
def mix(reference: Params, params: Params, share: float) -> Params:
    """share * params + (1 - share) * reference."""

    def mixed(old: jax.Array, new: jax.Array) -> jax.Array:
        sum_ = (share * whole(new) + (1 - share) * whole(old)).astype(old.dtype)
        return jax.device_put(sum_, jax.typeof(old).memory_space)

    return jax.tree.map(mixed, reference, params)


def union(frozen: Params, trainable: Params, key: jax.Array | None = None) -> Params:
    """The model's weights where each is either trained or frozen as a whole: the plain `Join`."""
    return {**frozen, **trainable}


def train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    max_grad_norm: float,
    join: Join = union,
    seed: int = 0,
    shared: Callable[[Params], Params] = lambda gradients: gradients,
    factors: Mapping[str, float] = MappingProxyType({}),
) -> Step:
    """The step that minimises `loss`; compiled by the caller.

    `join` makes the weights that `loss` takes of the frozen and the trainable ones, with a key that depends on the
    seed, the step and the microbatch alone, so that a resumed run drops out what it would have dropped out.
    Gradients and updates lie where `shared` puts them on the devices. A weight's learning rate is the schedule's times
    what `factors` has for its path, decay with it.
    Gradients are clipped to a global norm of `max_grad_norm` (0: not at all). If any gradient is not finite the
    weights and the optimizer's state stay bit for bit what they were; the metric `skipped` counts it.
    """

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def total(trainable: Params, micro: Batch, index: jax.Array) -> tuple[jax.Array, Metrics]:
            metrics = loss(join(frozen, trainable, jax.random.fold_in(key, index)), micro)
            return metrics["loss"].total, metrics

        grads, metrics = _summed_gradients(total, state.params, batch, shared)
        scale = 1 / jnp.maximum(metrics["loss"].weight, 1)
        norm = optax.tree.norm(grads) * scale
        finite = jnp.isfinite(norm)
        if max_grad_norm:
            # torch.nn.utils.clip_grad_norm_ has the same 1e-6.
            scale *= jnp.minimum(1.0, max_grad_norm / (norm + 1e-6))
        grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        rate, before = schedule(state.step), whole(state.params)

        def moved(params: Params, opt_state: Any) -> tuple[Params, Any]:
            updates, opt_state = optimizer.update(grads, opt_state, params)
            updates = shared(updates)
            rates = {path: rate * factors.get(path, 1.0) for path in params}
            return {
                path: (p - rates[path] * updates[path]).astype(p.dtype) for path, p in params.items()
            }, opt_state

        params, opt_state = _taken(finite, moved, before, state.opt_state)
        one = jnp.ones(())
        metrics = metrics | {
            "grad_norm": Mean(norm, one),
            "learning_rate": Mean(rate, one),
            "skipped": Mean(1.0 - finite, one),
        }
        return TrainState(state.step + 1, params, opt_state, state.reference), metrics

    return step


def eval_step(loss: Loss, join: Join = union) -> Callable[[Params, Params, Batch], Metrics]:
    """Metrics of a batch [microbatches, rows, ...], summed over its microbatches: (trainable, frozen, batch) ->."""

    def step(trainable: Params, frozen: Params, batch: Batch) -> Metrics:
        params = join(frozen, trainable, None)

        def one(total: Metrics, micro: Batch) -> tuple[Metrics, None]:
            return jax.tree.map(jnp.add, total, loss(params, micro)), None

        first = jax.tree.map(lambda x: x[0], batch)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(loss, params, first))
        return jax.lax.scan(one, zeros, batch)[0]

    return step


def _taken(whether: jax.Array, change: Callable[..., Any], *old: Any) -> Any:
    """`change(*old)` if `whether`, else `old`.

    By a branch XLA writes new numbers over old ones, where those of a choice would be copied. On GPUs it is the other
    way round: a branch is given copies of all that it may leave as it is.
    """
    if narrow.target() in ("cpu", "tpu"):
        return jax.lax.cond(whether, change, lambda *kept: kept, *old)
    return jax.tree.map(partial(jnp.where, whether), change(*old), old)


def _summed_gradients(
    total: Callable[[Params, Batch, jax.Array], tuple[jax.Array, Metrics]],
    params: Params,
    batch: Batch,
    shared: Callable[[Params], Params],
) -> tuple[Params, Metrics]:
    """Gradient of the loss's total, and the metrics, each summed over the microbatches."""

    def gradient(params: Params, micro: Batch, index: jax.Array) -> tuple[Params, Metrics]:
        def of(near: Params) -> tuple[jax.Array, Metrics]:
            return total(trained(near, params), micro, index)

        grads, metrics = jax.grad(of, has_aux=True)(steads(params))
        return shared(grads), metrics

    first = jax.tree.map(lambda x: x[0], batch)
    count = jax.tree.leaves(batch)[0].shape[0]
    if count == 1:
        return gradient(params, first, jnp.zeros((), jnp.int32))

    def one(summed: tuple[Params, Metrics], scanned: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, summed, gradient(params, *scanned)), None

    shapes = jax.eval_shape(gradient, params, first, jnp.zeros((), jnp.int32))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    zeros = shared(zeros[0]), zeros[1]
    return jax.lax.scan(one, zeros, (batch, jnp.arange(count)))[0]
