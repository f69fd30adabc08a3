"""What arrays take of a device's memory, and whether it has room for weights as products have them beside those that
are held."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from ntjax.mesh import HOST
from ntjax.models import Model
from ntjax.params import Params

SPARE = 0.1  # of a device's memory, for what programs need while they run


def held(tree: Any) -> int:
    """Bytes that a device has of the arrays of a tree, or of shapes with places; what lies in the host's memory it
    doesn't have."""
    near = (x for x in jax.tree.leaves(tree) if x.sharding.memory_kind != HOST)
    return sum(_bytes(x, x.sharding.shard_shape(x.shape)) for x in near)


def for_copies(model: Model, params: Params, state: Any, memory: float, taken: float) -> bool:
    """Whether `Model.copies` of the weights and a sampler's `state`, shapes, fit in what is left of a device's
    `memory`, of which so many bytes are `taken`."""
    share = held(params) / _total(params)
    copies = share * _total(jax.eval_shape(model.copies, params))
    devices = model.layout.mesh.size if model.layout else 1
    return taken + copies + _total(state) / devices <= (1 - SPARE) * memory


def now(devices: Iterable[jax.Device]) -> tuple[float, float] | None:
    """Bytes of a device's memory, and how many of them are taken, of the fullest; None where they don't tell, as CPUs
    don't, whose memory isn't theirs."""
    stats = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in known for known in stats):
        return None
    fullest = max(stats, key=lambda known: known["bytes_in_use"])
    return fullest["bytes_limit"], fullest["bytes_in_use"]


def _total(tree: Any) -> int:
    return sum(_bytes(x, x.shape) for x in jax.tree.leaves(tree))


def _bytes(x: Any, shape: tuple[int, ...]) -> int:
    """Of an array of this shape; keys of random numbers are too few to count."""
    return 0 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else math.prod(shape) * x.dtype.itemsize
