"""Which weights an adapter changes, what is trained of them, and the weights that come of it.

The settings mean what they mean to PEFT, which knows each layer's linear map as a module of its own. Here all
layers are one weight, so a plan says for each layer which rank and scale it has. Layers of lower rank are
padded with zeros, whose gradients are zero; a layer without an adapter has rank 0 and scale 0.

Trained of the weight at path P: "P.lora_A" [layers, r, *inputs], "P.lora_B" [layers, *outputs, r] and, for
DoRA, "P.lora_magnitude_vector" [layers, *outputs]. A weight that is trained whole keeps its path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ntjax.elsewhere import whole
from ntjax.errors import ConfigError
from ntjax.params import Params, Spec, Specs, unused, weight
from ntjax.targets import Where, modules, rules
from ntjax.weights import Adapted, dense

if TYPE_CHECKING:
    from ntjax.config import LoraConfig


@dataclass(frozen=True, eq=False)
class Plan:
    """What is trained of each weight; arrays are indexed by the weight's stacked axes."""

    ranks: dict[str, np.ndarray]  # of adapted weights; 0: this layer has no adapter
    scales: dict[str, np.ndarray]  # fp32: alpha / r, or alpha / sqrt(r) for rslora
    whole: dict[str, np.ndarray]  # of weights trained whole: in which layers
    rate: float  # of dropout
    dora: bool
    start: bool | str  # init_lora_weights

    @property
    def changes_base(self) -> bool:
        """Whether the adapter starts as a part of the weights it is around (PiSSA), which then lack it."""
        return str(self.start).startswith("pissa")

    @property
    def starts_at_nothing(self) -> bool:
        """Whether the adapter changes nothing before the first step."""
        return self.start in (True, "gaussian")

    def has(self, other: Plan) -> bool:
        """Whether the adapter that `other` describes can be trained on as this plan says."""
        return (
            self.dora == other.dora
            and _equal(self.ranks, other.ranks)
            and _equal(self.scales, other.scales)
            and all(path in self.whole for path in other.whole)
        )

    def specs(self, specs: Specs) -> Specs:
        """Declarations of all that is trained, under PEFT's tensor names without "base_model.model."."""
        trained = {path: specs[path] for path in self.whole}
        for path, ranks in self.ranks.items():
            parts = _parts(specs[path], int(ranks.max()), self.dora)
            trained |= {f"{path}.{name}": spec for name, spec in parts.items()}
        return trained

    def initial(self, base: Params, specs: Specs, key: jax.Array, dtype: Any) -> tuple[Params, Params]:
        """The frozen weights and the trainable ones, in `dtype`, as PEFT's `init_lora_weights` starts them.

        The frozen weights are those of `base`, unless PiSSA takes their principal parts out of them.

        Raises ConfigError: PiSSA on a quantised weight, or with a rank above the weight's.
        """
        base = dict(base)
        trained = {path: jnp.array(dense(base[path], dtype), copy=True) for path in self.whole}
        for number, path in enumerate(sorted(self.ranks)):
            spec, ranks, scales = specs[path], self.ranks[path], self.scales[path]
            drawing = jax.random.fold_in(key, number)
            if self.changes_base:
                _check_pissa(path, base[path], spec, int(ranks.max()))
                w = whole(base[path])
                left, a, b = _principal(w, spec, ranks, scales, str(self.start), drawing)
                base[path] = jax.device_put(left, base[path].sharding)
            else:
                a, b = _drawn(spec, ranks, self.start, drawing)
            trained[f"{path}.lora_A"], trained[f"{path}.lora_B"] = a.astype(dtype), b.astype(dtype)
            if self.dora:
                lengths = _over_layers(_lengths, spec, base[path], a, b, jnp.asarray(scales))
                adapted = _aligned(ranks > 0, lengths.ndim)
                trained[f"{path}.lora_magnitude_vector"] = jnp.where(adapted, lengths, 0).astype(dtype)
        return base, trained

    def join(self, frozen: Params, trainable: Params, key: jax.Array | None = None) -> Params:
        """The model's weights: `frozen` with what is trained in place. Dropout acts only with a key."""
        params = dict(frozen)
        for path, layers in self.whole.items():
            params[path] = trainable[path]
            if not layers.all():
                kept = dense(frozen[path], trainable[path].dtype)
                params[path] = jnp.where(_aligned(layers, kept.ndim), whole(trainable[path]), kept)
        for number, path in enumerate(sorted(self.ranks)):
            keys = None
            if key is not None and self.rate:
                keys = jax.random.split(jax.random.fold_in(key, number), self.ranks[path].shape)
            params[path] = Adapted(
                params[path],
                trainable[f"{path}.lora_A"],
                trainable[f"{path}.lora_B"],
                jnp.asarray(self.scales[path]),
                trainable[f"{path}.lora_magnitude_vector"] if self.dora else None,
                keys,
                self.rate,
            )
        return params


def plan(
    config: LoraConfig,
    specs: Specs,
    *,
    where: Where = lambda _: None,
    unmatched: bool = False,
    frozen: Collection[str] = (),
) -> Plan:
    """What `config` trains of the weights that `specs` declare, but for those at the paths `frozen` and those that
    nothing reads; a `score` head is always trained whole.

    PEFT passes over a name, expression or layer that is nowhere in the model; here only with `unmatched`.

    Raises ConfigError: no linear layer is a target, a target isn't linear, something named is nowhere in the
    model, a tied head is to be trained by itself.
    """
    frozen = {*frozen, *unused(specs)}
    found = rules(config, specs, where=where, unmatched=unmatched, frozen=frozen)
    ranks: dict[str, np.ndarray] = {}
    scales: dict[str, np.ndarray] = {}
    whole: dict[str, np.ndarray] = {}
    for path, spec in ((path, spec) for path, spec in specs.items() if path not in frozen):
        rank, scale, trained = (np.zeros(_lead(spec), kind) for kind in (np.int32, np.float32, bool))
        for index, module in modules(spec):
            trained[index] = found.trains(spec, module)
            if spec.linear and found.adapts(module):
                rank[index], scale[index] = found.rank(module), found.scale(module)
        if rank.any():
            ranks[path], scales[path] = rank, scale
        if trained.any():
            whole[path] = trained
    return Plan(ranks, scales, whole, config.lora_dropout, config.use_dora, config.init_lora_weights)


def _lead(spec: Spec) -> tuple[int, ...]:
    """The sizes of the stacked axes."""
    return spec.shape[: len(spec.stacked)]


def _parts(spec: Spec, rank: int, dora: bool) -> Specs:
    """The declarations of A, B and perhaps the magnitudes of one weight."""
    inputs, outputs, module = " ".join(spec.inputs), " ".join(spec.outputs), spec.hf.removesuffix(".weight")
    declared = {
        "lora_A": (f"{inputs} -> rank", f"{module}.lora_A.weight"),
        "lora_B": (f"rank -> {outputs}", f"{module}.lora_B.weight"),
    }
    if dora:
        declared["lora_magnitude_vector"] = f"-> {outputs}", f"{module}.lora_magnitude_vector"
    sizes = dict(spec.sizes) | {"rank": rank}
    return {name: weight(sizes, *line).get_metadata()["spec"] for name, line in declared.items()}


def _drawn(spec: Spec, ranks: np.ndarray, start: bool | str, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Random A and zero B; for False both are random, as torch starts a linear layer."""
    rank = int(ranks.max())
    a, b = (part.shape for part in _parts(spec, rank, False).values())
    a_key, b_key = jax.random.split(key)
    if start == "gaussian":
        drawn_a = jax.random.normal(a_key, a) / _aligned(np.maximum(ranks, 1), len(a))
    else:
        drawn_a = jax.random.uniform(a_key, a, minval=-1) / math.sqrt(spec.torch_shape[1])
    drawn_b = jnp.zeros(b)
    if start is False:
        drawn_b = jax.random.uniform(b_key, b, minval=-1) / _aligned(np.sqrt(np.maximum(ranks, 1)), len(b))
    there = np.arange(rank) < ranks[..., None]
    of_a = there.reshape(*there.shape, *(1 for _ in spec.inputs))
    of_b = there.reshape(*ranks.shape, *(1 for _ in spec.outputs), rank)
    return jnp.where(of_a, drawn_a, 0), jnp.where(of_b, drawn_b, 0)


def _check_pissa(path: str, w: Any, spec: Spec, rank: int) -> None:
    most = min(spec.torch_shape)
    if not isinstance(w, jax.Array):
        raise ConfigError(
            "PiSSA can't start from quantised weights: what it leaves of them would be quantised anew",
            fix="set init_lora_weights = true, or load the weights unquantised",
        )
    if rank > most:
        raise ConfigError(
            f"PiSSA takes at most {most} parts out of {path}, not {rank}", fix=f"set r = {most}"
        )


def _principal(
    w: jax.Array, spec: Spec, ranks: np.ndarray, scales: np.ndarray, start: str, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """W - scale B A, A and B, where scale B A is the closest to W of that rank (PiSSA, arXiv:2404.02948).

    "pissa_niter_N" finds the singular vectors by N subspace iterations (arXiv:0909.4061, algorithm 4.4).
    """
    most, lead = int(ranks.max()), _lead(spec)
    iterations = start.partition("_niter_")[2]

    def split(w: jax.Array, rank: Any, scale: Any, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        matrix = w.reshape(spec.torch_shape).astype(jnp.float32)
        u, s, v = _randomised(matrix, most, int(iterations), key) if iterations else _svd(matrix)
        root = jnp.sqrt(jnp.where((jnp.arange(most) < rank), s[:most] / jnp.where(rank, scale, 1), 0))
        a, b = root[:, None] * v[:most], u[:, :most] * root
        left = (matrix - scale * jnp.matmul(b, a, precision="highest")).astype(w.dtype)
        inner, outer = w.shape[len(spec.outputs) :], w.shape[: len(spec.outputs)]
        return left.reshape(w.shape), a.reshape(most, *inner), b.reshape(*outer, most)

    return _over_layers(split, spec, w, jnp.asarray(ranks), jnp.asarray(scales), jax.random.split(key, lead))


def _svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    u, s, v = jnp.linalg.svd(matrix, full_matrices=False)
    return u, s, v


def _randomised(
    matrix: jax.Array, rank: int, iterations: int, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    multiply = partial(jnp.matmul, precision="highest")
    basis = jnp.linalg.qr(multiply(matrix, jax.random.normal(key, (matrix.shape[1], rank))))[0]
    for _ in range(iterations):
        across = jnp.linalg.qr(multiply(matrix.T, basis))[0]
        basis = jnp.linalg.qr(multiply(matrix, across))[0]
    u, s, v = _svd(multiply(basis.T, matrix))
    return multiply(basis, u), s, v


def _lengths(w: Any, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """The length of each row of W + scale B A: [*outputs]."""
    merged = Adapted(w, a, b, scale).dense(jnp.float32)
    return jnp.sqrt(jnp.sum(jnp.square(merged), axis=tuple(range(b.ndim - 1, merged.ndim))))


def _over_layers(function: Callable[..., Any], spec: Spec, *arrays: Any) -> Any:
    """`function` of one layer after the other, so that what it needs is there for one layer at a time."""
    return jax.lax.map(lambda layer: function(*layer), arrays) if spec.stacked else function(*arrays)


def _aligned(per_layer: np.ndarray, ndim: int) -> np.ndarray:
    """An array over the stacked axes with axes of size 1 after them."""
    return per_layer.reshape(per_layer.shape + (1,) * (ndim - per_layer.ndim))


def _equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[path], other[path]) for path in one)
