"""Arrays of weights that aren't on the device, or not all of them: in the host's memory, or in parts on the devices
along `fsdp`. They are put together where they are used, and again for the gradient.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ntjax.mesh import FSDP

NEAR, FAR = jax.memory.Space.Device, jax.memory.Space.Host


def is_far(x: Any) -> bool:
    """Whether an array lies in the host's memory."""
    return jax.typeof(x).memory_space == FAR


@struct.dataclass
class Trained:
    """An array in the host's memory that is trained. Its gradient is that of `stead`, zeros of its shape on the device
    which nothing reads: that of an array in the host's memory would be summed there."""

    stead: jax.Array
    far: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of either."""
        return self.far.shape

    @property
    def ndim(self) -> int:
        """Of either."""
        return self.far.ndim

    @property
    def dtype(self) -> Any:
        """Of either."""
        return self.far.dtype

    def whole(self) -> jax.Array:
        """It, on the device."""
        return _fetched(self.stead, self.far)


def steads(params: Any) -> Any:
    """What gradients are taken by in place of `params`: zeros for what lies in the host's memory."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if is_far(x) else x, params)


def trained(steads: Any, params: Any) -> Any:
    """`params` with the gradients of `steads`."""
    return jax.tree.map(lambda stead, x: Trained(stead, x) if is_far(x) else stead, steads, params)


@jax.custom_vjp
def _fetched(stead: jax.Array, far: jax.Array) -> jax.Array:
    """`far` on the device, with a gradient that stays there."""
    return jax.device_put(far, NEAR)


_fetched.defvjp(lambda stead, far: (_fetched(stead, far), None), lambda _, gradient: (gradient, None))


@struct.dataclass
class Parted:
    """An array of which the devices along `fsdp` have a part each, inside `shard_map`.

    With a `copy` each of them has all of it, and only its gradient is shared out (ZeRO 2). `ring` devices that are
    neighbours put their parts together first, and then the rings; 1: all at once.
    """

    part: Any  # an array, or `Trained`
    axis: int = struct.field(
        pytree_node=False
    )  # counted from the last: a scan over layers takes the first away
    copy: jax.Array | None = None
    ring: int = struct.field(pytree_node=False, default=1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        shape = list(self.part.shape)
        shape[self.axis] *= jax.lax.axis_size(FSDP)
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """Of the whole."""
        return self.part.ndim

    @property
    def dtype(self) -> Any:
        """Of the whole."""
        return self.part.dtype

    def whole(self) -> jax.Array:
        """All of it."""
        if self.copy is not None:
            return _copied(self.part, self.copy, self.axis, self.ring)
        return _gathered(whole(self.part), self.axis, self.ring)


def _gathered(part: jax.Array, axis: int, ring: int) -> jax.Array:
    """All devices' parts along `fsdp`. Its transpose scatters a gradient's sum by the same stages."""
    for groups in _stages(ring):
        part = jax.lax.all_gather(part, FSDP, axis=part.ndim + axis, tiled=True, axis_index_groups=groups)
    return part


def _stages(ring: int) -> list[list[list[int]] | None]:
    """Groups of devices along `fsdp` that gather one after the other: those of a ring, then those of one place in all
    rings. Both together send as many bytes as one gather of all."""
    count = jax.lax.axis_size(FSDP)
    if ring in (1, count):
        return [None]
    within = [list(range(first, first + ring)) for first in range(0, count, ring)]
    return [within, [list(range(place, count, ring)) for place in range(ring)]]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _copied(part: jax.Array, copy: jax.Array, axis: int, ring: int) -> jax.Array:
    """The copy; its gradient is summed over the devices and each keeps that of its part."""
    return copy


def _copied_forward(part: jax.Array, copy: jax.Array, axis: int, ring: int) -> tuple[jax.Array, None]:
    return copy, None


def _copied_backward(axis: int, ring: int, _: None, gradient: jax.Array) -> tuple[jax.Array, None]:
    for groups in reversed(_stages(ring)):
        gradient = jax.lax.psum_scatter(
            gradient,
            FSDP,
            scatter_dimension=gradient.ndim + axis,
            tiled=True,
            axis_index_groups=groups,
        )
    return gradient, None


_copied.defvjp(_copied_forward, _copied_backward)


def whole(w: Any) -> Any:
    """The weight with every array of it on the device and put together."""

    def found(x: Any) -> Any:
        if _is_elsewhere(x):
            return x.whole()
        return jax.device_put(x, NEAR) if is_far(x) else x

    return jax.tree.map(found, w, is_leaf=_is_elsewhere)


def _is_elsewhere(x: Any) -> bool:
    return isinstance(x, Parted | Trained)


def is_here(w: Any) -> bool:
    """Whether every array of a weight is on the device, and all of it."""
    return not any(_is_elsewhere(x) or is_far(x) for x in jax.tree.leaves(w, is_leaf=_is_elsewhere))
