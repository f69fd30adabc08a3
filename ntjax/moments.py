"""Optimizers whose moments are held in 8 bits, with the mathematics of bitsandbytes 0.50's (arXiv:2110.02861).

A tensor of the Hugging Face checkpoint, flattened, is cut into blocks of 256 numbers. Each is divided by its block's
largest magnitude and given the code of the nearest value of the dynamic type: a moment is decoded, updated and encoded
in fp32, and 2 or 1 bytes a weight are kept. Tensors of fewer than 4096 numbers and embeddings keep fp32.

The dynamic type needs no table. Values of both signs have codes 127 + n and 127 - n, those without a sign n - 1, and
the leading bit of n says which power of ten: the bits below it count equal parts of [0.1, 1]. So coding is arithmetic,
which every device does at its own width, where a TPU would look its numbers up one by one. Decoded values are within
two units in the last place of bitsandbytes' tables; where its kernels differ in encoding, the nearest value is taken:
on a CPU it rounds to multiples of 1/32767 first, on GPUs a first moment just below zero stays below it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ntjax.params import Params, Spec, Specs

BLOCK = 256  # numbers that share an absmax
LEAST = 4096  # numbers of a tensor whose moments are in 8 bits
EMBEDDING = "vocab embed"  # whose moments keep fp32, as transformers' Trainer has it
POWERS = 7  # of ten, from 1e-6 to 1

# (steps done with this one, gradient, *moments), all fp32 but the first -> (update, *moments)
Rule = Callable[..., tuple[jax.Array, ...]]


class Moment(NamedTuple):
    """A weight's moment in 8 bits: about 1.016 bytes a number."""

    codes: jax.Array  # uint8, in the weight's shape
    absmax: jax.Array  # fp32 [*stacked, blocks]


class Moments(NamedTuple):
    """An optimizer's state: the steps done, and the moments of each weight."""

    done: jax.Array  # [] int32
    of: dict[str, tuple[Any, ...]]


def adam(b1: float, b2: float, eps: float, specs: Specs) -> optax.GradientTransformation:
    """Adam (arXiv:1412.6980) with both moments in 8 bits."""

    def rule(done: jax.Array, grad: jax.Array, mu: jax.Array, nu: jax.Array) -> tuple[jax.Array, ...]:
        mu, nu = b1 * mu + (1 - b1) * grad, b2 * nu + (1 - b2) * grad * grad
        mean, scale = mu / _correction(b1, done), jnp.sqrt(nu / _correction(b2, done))
        return mean / (scale + eps), mu, nu

    return _by_blocks(rule, (SIGNED, UNSIGNED), specs)


def lion(b1: float, b2: float, specs: Specs) -> optax.GradientTransformation:
    """Lion (arXiv:2302.06675) with its moment in 8 bits."""

    def rule(done: jax.Array, grad: jax.Array, mu: jax.Array) -> tuple[jax.Array, ...]:
        return jnp.sign(b1 * mu + (1 - b1) * grad), b2 * mu + (1 - b2) * grad

    return _by_blocks(rule, (SIGNED,), specs)


def _correction(decay: float, done: jax.Array) -> jax.Array:
    """1 - decay^done, without the difference of two numbers near 1."""
    return -jnp.expm1(done * (math.log(decay) if decay else -math.inf))


def _by_blocks(rule: Rule, kinds: Sequence[Dynamic], specs: Specs) -> optax.GradientTransformation:
    """`rule` for each weight, its moments held as `kinds`."""

    def init(params: Params) -> Moments:
        of = {path: tuple(_zeros(specs[path], p.shape) for _ in kinds) for path, p in params.items()}
        return Moments(jnp.zeros((), jnp.int32), of)

    def update(grads: Params, state: Moments, params: Params | None = None) -> tuple[Params, Moments]:
        done = state.done + 1

        def tensor(held: tuple[Any, ...]) -> tuple[Any, ...]:
            grad, *moments = held
            update, *new = rule(done, grad.astype(jnp.float32), *map(_dense, moments, kinds))
            return update.astype(grad.dtype), *map(_like, new, moments, kinds)

        updates, of = {}, {}
        for path, grad in grads.items():
            updates[path], *moments = _each(tensor, (grad, *state.of[path]), len(specs[path].stacked))
            of[path] = tuple(moments)
        return updates, Moments(done, of)

    return optax.GradientTransformation(init, update)


def _zeros(spec: Spec, shape: tuple[int, ...]) -> Any:
    """What a moment is before the first step."""
    size = math.prod(spec.torch_shape)
    if size < LEAST or spec.axes == EMBEDDING:
        return jnp.zeros(shape, jnp.float32)
    stacked = shape[: len(spec.stacked)]
    return Moment(jnp.zeros(shape, jnp.uint8), jnp.zeros((*stacked, -(-size // BLOCK)), jnp.float32))


def _each(function: Callable[[Any], Any], held: Any, stacked: int) -> Any:
    """`function` of one tensor after the other, written over what it was made of: all that is computed on the way is
    there for one tensor only. Small ones are done at once."""
    if not stacked or not isinstance(held[1], Moment):
        return function(held)
    lead = held[0].shape[:stacked]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[stacked:]), held)

    def one(index: jax.Array, held: Any) -> Any:
        here = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), held)
        # A branch that is always taken: XLA doesn't fuse across it, so that a tensor is read before it is written over.
        # Without it, it copied all tensors for each of them (Lion on a CPU: 41 ns a weight instead of 8).
        new = jax.lax.cond(index >= 0, function, lambda here: here, here)
        return jax.tree.map(lambda x, of: jax.lax.dynamic_update_index_in_dim(x, of, index, 0), held, new)

    found = jax.lax.fori_loop(0, math.prod(lead), one, flat)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)


def _dense(moment: Any, kind: Dynamic) -> jax.Array:
    """A tensor's moment in fp32."""
    if not isinstance(moment, Moment):
        return jnp.asarray(moment)
    return kind.values(moment.codes) * _spread(moment.absmax, moment.codes.shape)


def _like(x: jax.Array, moment: Any, kind: Dynamic) -> Any:
    """An fp32 moment as `moment` is held."""
    if not isinstance(moment, Moment):
        return x
    absmax = _largest(x)
    inverse = 1 / jnp.maximum(absmax, np.float32(1e-38))  # bitsandbytes' zero
    return Moment(kind.nearest(x * _spread(inverse, x.shape)), absmax)


# A block is made of runs along the last axis, which is where a weight is shared out between devices: where a part of
# it is whole runs, only the runs' largest numbers are sent.


def _largest(x: jax.Array) -> jax.Array:
    """The largest magnitude of each block [blocks] of a tensor."""
    run = math.gcd(x.shape[-1], BLOCK)
    largest = jnp.abs(x).reshape(*x.shape[:-1], -1, run).max(-1).reshape(-1)
    per_block = BLOCK // run
    return jnp.pad(largest, (0, -largest.size % per_block)).reshape(-1, per_block).max(-1)


def _spread(of_blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """What is said of each block, for each number of a tensor of `shape`."""
    run = math.gcd(shape[-1], BLOCK)
    runs = jnp.repeat(of_blocks, BLOCK // run)[: math.prod(shape) // run]
    return jnp.repeat(runs.reshape(*shape[:-1], -1), run, axis=-1)


@dataclass(frozen=True)
class Dynamic:
    """The dynamic 8-bit type (arXiv:2110.02861, 2.1): 10^(e - 6) times the middles of 2^e equal parts of [0.1, 1], for
    e from 0 to 6, 0 and 1. Without a sign there is room for twice as many parts."""

    signed: bool

    @property
    def first(self) -> int:
        """The parts of the lowest power of ten, and its lowest n."""
        return 1 if self.signed else 2

    def values(self, codes: jax.Array) -> jax.Array:
        """What uint8 codes stand for."""
        codes = codes.astype(jnp.int32)
        if not self.signed:
            return self._value(codes + 1)
        return jnp.sign(codes - 127) * self._value(jnp.abs(codes - 127))

    def nearest(self, x: jax.Array) -> jax.Array:
        """The uint8 codes of numbers from -1 (0 without a sign) to 1."""
        n = self._nearest(jnp.abs(x))
        if self.signed:
            n = jnp.where(x < 0, 127 - jnp.minimum(n, 127), 127 + n)  # there is no -1
        else:
            n = n - 1
        return n.astype(jnp.uint8)

    def _value(self, n: jax.Array) -> jax.Array:
        """The value that n, from 0 to 2^7 * first, stands for."""
        n = n.astype(jnp.float32)
        exponent = jax.lax.bitcast_convert_type(n, jnp.int32) & 0x7F800000
        parts = jax.lax.bitcast_convert_type(exponent, jnp.float32)  # the leading bit of n
        # 0.1 + 0.9 * (n - parts + 1/2) / parts is a whole number of twentieths of a part: one rounding.
        value = (18 * n - 16 * parts + 9) * self._chosen(n, self._starts, self._scales)
        return jnp.where(n < self.first, 0.0, jnp.where(n < self.first * 2**POWERS, value, 1.0))

    def _nearest(self, x: jax.Array) -> jax.Array:
        """The n (float32) whose value is nearest to x >= 0."""
        bounds = [0.0, *((self._middle(e - 1, -1) + self._middle(e, 0)) / 2 for e in range(1, POWERS))]
        parts = self._chosen(x, bounds, self._starts)
        ninths = x * self._chosen(x, bounds, [1 / (18 * scale) for scale in self._scales])
        n = jnp.clip(jnp.ceil(ninths + parts * np.float32(8 / 9)) - 1, parts, 2 * parts - 1)
        n = jnp.where(x > np.float32(self._middle(0, 0) / 2), n, self.first - 1.0)
        most = np.float32((self._middle(POWERS - 1, -1) + 1) / 2)
        return jnp.where(x > most, self.first * 2.0**POWERS, n)

    @property
    def _starts(self) -> list[float]:
        """The lowest n of each power of ten, which is the number of its parts."""
        return [float(self.first * 2**e) for e in range(POWERS)]

    @property
    def _scales(self) -> list[float]:
        """A twentieth of a part's share of each power of ten."""
        return [10.0 ** (e + 1 - POWERS) / (20 * parts) for e, parts in enumerate(self._starts)]

    def _middle(self, e: int, part: int) -> float:
        """The middle of a part, or of the last one (-1), of the power of ten numbered `e`."""
        parts = self._starts[e]
        return 10.0 ** (e + 1 - POWERS) * (0.1 + 0.9 * (part % parts + 0.5) / parts)

    @staticmethod
    def _chosen(x: jax.Array, bounds: Sequence[float], values: Sequence[float]) -> jax.Array:
        """The value of the last bound that x has reached."""
        found: Any = np.float32(values[0])
        for bound, value in zip(bounds[1:], values[1:], strict=True):
            found = jnp.where(x >= np.float32(bound), np.float32(value), found)
        return jnp.asarray(found)


SIGNED, UNSIGNED = Dynamic(True), Dynamic(False)
