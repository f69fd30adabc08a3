"""Optimizers and learning-rate schedules by the names users know; the mathematics is optax's.

An optimizer here turns gradients into a direction; the step multiplies it by the learning rate of its step, so the
schedule depends on the step alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from ntjax import moments
from ntjax.params import Params, Specs, decays

if TYPE_CHECKING:
    from ntjax.stages.base import StageConfig

Schedule = Callable[[jax.Array], jax.Array]  # step [] int32 -> multiplier of the peak learning rate


def direction(stage: StageConfig, specs: Specs) -> optax.GradientTransformation:
    """Gradient -> what is added to the weights per unit of learning rate (before the sign), decay included.

    Decay leaves biases and norms alone, as transformers does.
    """
    b1, b2, eps = stage.adam_beta1, stage.adam_beta2, stage.adam_epsilon
    adam = _kept_in(stage.mu_dtype, optax.scale_by_adam(b1, b2, eps))
    decay = optax.add_decayed_weights(stage.weight_decay, mask=lambda params: _decayed(params, specs))
    if stage.optimizer == "adafactor":
        return optax.chain(per_tensor(_adafactor(), specs), decay)
    if stage.optimizer == "lion":
        return optax.chain(_kept_in(stage.mu_dtype, optax.scale_by_lion(b1, b2)), decay)
    if stage.optimizer == "adamw_8bit":
        return optax.chain(moments.adam(b1, b2, eps, specs), decay)
    if stage.optimizer == "lion_8bit":
        return optax.chain(moments.lion(b1, b2, specs), decay)
    if stage.optimizer == "sgd":
        return decay
    if stage.optimizer == "muon":
        labels = {
            path: "muon" if spec.stacked and len(spec.torch_shape) > 1 else "adam"
            for path, spec in specs.items()
        }
        parts = {"muon": per_tensor(_muon(stage.mu_dtype), specs), "adam": adam}
        return optax.chain(optax.multi_transform(parts, lambda params: {p: labels[p] for p in params}), decay)
    return optax.chain(adam, decay)


def per_tensor(transform: optax.GradientTransformation, specs: Specs) -> optax.GradientTransformation:
    """`transform` applied to each tensor of the Hugging Face checkpoint by itself, as (out, in), kernels too.

    For transforms that are not elementwise: a stack of layers is not one matrix.
    """

    def tensors(path: str, stacked: jax.Array) -> jax.Array:
        return stacked.reshape(-1, *specs[path].matrix)

    def init(params: Params) -> dict[str, Any]:
        return {path: jax.vmap(transform.init)(tensors(path, p)) for path, p in params.items() if _present(p)}

    def update(
        grads: Params, state: dict[str, Any], params: Params | None = None
    ) -> tuple[Params, dict[str, Any]]:
        assert params is not None
        updates, states = dict(grads), {}
        for path in state:
            of = tensors(path, grads[path]), state[path], tensors(path, params[path])
            update, states[path] = jax.vmap(transform.update)(*of)
            updates[path] = update.reshape(grads[path].shape)
        return updates, states

    return optax.GradientTransformation(init, update)


def _kept_in(mu_dtype: str | None, transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """`transform` computed in fp32, its first moment between updates in `mu_dtype` (None: the weights' own), a second
    one in fp32: in bf16 a factor of 0.99 is 0.988, and one of 0.999 is 1, so that the moment would never fall."""

    def init(params: Params) -> Any:
        state = transform.init(params)
        return wide(state)._replace(mu=optax.tree.cast(state.mu, mu_dtype))

    def update(grads: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        updates, new = transform.update(wide(grads), wide(state), params)
        return updates, new._replace(mu=optax.tree.cast_like(new.mu, state.mu))

    def wide(tree: Any) -> Any:  # but for counts
        return jax.tree.map(
            lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
        )

    return optax.GradientTransformation(init, update)


def _present(leaf: Any) -> bool:
    return not isinstance(leaf, optax.MaskedNode)


def _adafactor() -> optax.GradientTransformation:
    """Factored second moments, updates clipped at rms 1 (arXiv:1804.04235), with transformers' Trainer's settings:
    no momentum, no relative step, no scaling by the weight's rms."""
    return optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=1), optax.clip_by_block_rms(1.0))


def _muon(mu_dtype: str | None) -> optax.GradientTransformation:
    """Orthogonalised momentum (Jordan et al. 2024) for the matrices inside layers, scaled to Adam's rms
    (arXiv:2502.16982, eq. 4), so that one learning rate serves them and the rest, which Adam trains."""
    scale = optax.stateless_with_tree_map(lambda u, _: 0.2 * math.sqrt(max(u.shape)) * u)
    return optax.chain(_kept_in(mu_dtype, optax.contrib.scale_by_muon()), scale)


def _decayed(params: Params, specs: Specs) -> dict[str, bool]:
    return {path: decays(specs[path]) for path in params}


def schedule(stage: StageConfig, steps: int) -> Schedule:
    """The learning rate of each of `steps` steps, as transformers' schedulers give it (the first warm-up step is 0)."""
    if stage.lr_scheduler_type == "constant":
        return lambda step: jnp.full((), stage.learning_rate)
    warmup = stage.warmup_steps if stage.warmup_steps >= 1 else math.ceil(stage.warmup_steps * steps)
    options: dict[str, Any] = stage.lr_scheduler_kwargs
    decay = _SHAPES[stage.lr_scheduler_type](stage.learning_rate, int(warmup), steps, **options)
    start = options.get("min_lr_ratio", 0.0)  # warmup_stable_decay rises from the floor it ends at

    def rate(step: jax.Array) -> jax.Array:
        t = step.astype(jnp.float32)
        return stage.learning_rate * jnp.where(t < warmup, start + (1 - start) * t / max(1, warmup), decay(t))

    return rate


def _progress(t: jax.Array, warmup: int, steps: int) -> jax.Array:
    return jnp.clip((t - warmup) / max(1, steps - warmup), 0.0, 1.0)


def _constant(peak: float, warmup: int, steps: int) -> Schedule:
    return lambda t: jnp.ones_like(t)


def _linear(peak: float, warmup: int, steps: int) -> Schedule:
    return lambda t: 1 - _progress(t, warmup, steps)


def _cosine(peak: float, warmup: int, steps: int, num_cycles: float = 0.5) -> Schedule:
    return lambda t: jnp.maximum(
        0.0, 0.5 * (1 + jnp.cos(2 * jnp.pi * num_cycles * _progress(t, warmup, steps)))
    )


def _cosine_with_restarts(peak: float, warmup: int, steps: int, num_cycles: int = 1) -> Schedule:
    def decay(t: jax.Array) -> jax.Array:
        done = _progress(t, warmup, steps)
        return jnp.where(done >= 1, 0.0, 0.5 * (1 + jnp.cos(jnp.pi * jnp.mod(num_cycles * done, 1.0))))

    return decay


def _cosine_with_min_lr(
    peak: float,
    warmup: int,
    steps: int,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float = 0.0,
) -> Schedule:
    floor = min_lr / peak if min_lr is not None else min_lr_rate
    cosine = _cosine(peak, warmup, steps, num_cycles)
    return lambda t: floor + (1 - floor) * cosine(t)


def _polynomial(peak: float, warmup: int, steps: int, lr_end: float = 1e-7, power: float = 1.0) -> Schedule:
    return lambda t: ((peak - lr_end) * (1 - _progress(t, warmup, steps)) ** power + lr_end) / peak


def _inverse_sqrt(peak: float, warmup: int, steps: int, timescale: int | None = None) -> Schedule:
    scale = timescale or warmup or 10_000
    return lambda t: 1 / jnp.sqrt((t + scale - warmup) / scale)


def _warmup_stable_decay(
    peak: float,
    warmup: int,
    steps: int,
    num_decay_steps: int,
    num_stable_steps: int | None = None,
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> Schedule:
    stable = steps - warmup - num_decay_steps if num_stable_steps is None else num_stable_steps

    def decay(t: jax.Array) -> jax.Array:
        done = jnp.clip((t - warmup - stable) / max(1, num_decay_steps), 0.0, 1.0)
        cosine = jnp.maximum(0.0, 0.5 * (1 + jnp.cos(2 * jnp.pi * num_cycles * done)))
        return jnp.where(done >= 1, min_lr_ratio, min_lr_ratio + (1 - min_lr_ratio) * cosine)

    return decay


_SHAPES: dict[str, Callable[..., Schedule]] = {
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "warmup_stable_decay": _warmup_stable_decay,
}
