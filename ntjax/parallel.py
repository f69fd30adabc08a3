"""How a model runs on the parts of its weights.

Under `shard_map` each device has its own rows and tokens, and fetches the other parts of a weight where the weight
meets an activation (`elsewhere.Parted`), so that the collectives are those that are written down: gathers of weights,
their transposes for gradients, nothing for activations. Only `tensor` is left to XLA, which finds from the weights'
shardings what Megatron writes by hand (arXiv:1909.08053). What comes before and after the model, a few numbers a
token, is left to XLA too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ntjax.elsewhere import Parted
from ntjax.layout import Layout
from ntjax.mesh import FSDP, MANUAL, ROWS, SEQUENCE
from ntjax.params import Params, Spec, Specs


def over_rows(
    layout: Layout,
    function: Callable[..., Any],
    params: Params,
    specs: Specs,
    *arrays: Any,
    units: Any = None,
) -> Any:
    """`function(params, *arrays)`, each device on its own rows and tokens; arrays and results: [rows, time, ...].

    Time is padded with zeros so that it can be split; weights come with their other parts to be fetched. `units`
    [groups of rows, ...], where there are any, are split as rows are and given by their name.
    """
    given = {} if units is None else {"units": units}
    if layout.rows * layout.sequence == 1:
        return function(params, *arrays, **given)
    time = jax.tree.leaves(arrays)[0].shape[1]
    short = -time % layout.sequence

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, short), *[(0, 0)] * (x.ndim - 2)]) if short else x

    ring = neighbours(layout.mesh)
    parts = {path: _parted(layout, specs[path], w, ring) for path, w in params.items()}
    # Axes of one device are left out: sums over them would be compiled as collectives all the same.
    manual = tuple(axis for axis in MANUAL if layout.mesh.shape[axis] > 1)
    rows = tuple(axis for axis in ROWS if axis in manual)
    split = PartitionSpec(rows or None, SEQUENCE if SEQUENCE in manual else None)
    run = jax.shard_map(
        lambda params, arrays, given: function(_with_own_keys(params, manual), *arrays, **given),
        mesh=layout.mesh,
        in_specs=(_by_hand(parts), split, PartitionSpec(rows or None)),
        out_specs=split,
        axis_names=set(manual),
        check_vma=False,
    )
    found = run(parts, jax.tree.map(padded, arrays), given)
    return jax.tree.map(lambda x: x[:, :time], found) if short else found


def neighbours(mesh: Mesh) -> int:
    """How many devices along `fsdp` gather first (`elsewhere.Parted`): those along a dimension of a TPU's slice of two
    or three, where all at once would be compiled to sums over all devices, which send twice as much."""
    devices, count = mesh.devices.flat, mesh.shape[FSDP]
    if devices[0].platform != "tpu" or count < mesh.size:
        return 1
    extents = [len(set(along)) for along in zip(*(device.coords for device in devices), strict=True)]
    if sum(extent > 1 for extent in extents) < 2:
        return 1
    ring = next(n for n, a, b in zip(extents, devices[0].coords, devices[1].coords, strict=True) if a != b)
    return ring if count % ring == 0 else 1


def _parted(layout: Layout, spec: Spec, w: Any, ring: int) -> Any:
    """The weight with each array that is shared out marked as such."""
    if layout.zero < 2:
        return w

    def mark(partition: PartitionSpec, leaf: Any) -> Any:
        at = [number for number, axes in enumerate(partition) if axes == FSDP or FSDP in (axes or ())]
        if not at:
            return leaf
        axis = at[0] - leaf.ndim
        if layout.zero >= 3:
            return Parted(leaf, axis, ring=ring)
        part = jax.lax.with_sharding_constraint(leaf, NamedSharding(layout.mesh, partition))
        return Parted(part, axis, jax.lax.stop_gradient(leaf), ring)

    return jax.tree.map(mark, layout.partitions(spec, w, parted=True), w)


def _by_hand(parted: Any) -> Any:
    """How `shard_map` splits weights: along `fsdp` where they are marked as parts, else not at all."""

    def split(w: Any) -> Any:
        if not isinstance(w, Parted):
            return PartitionSpec()
        axes = [None] * (w.part.ndim + w.axis)
        copy = None if w.copy is None else PartitionSpec()
        return w.replace(part=PartitionSpec(*axes, FSDP), copy=copy)  # type: ignore[attr-defined]

    return jax.tree.map(split, parted, is_leaf=lambda w: isinstance(w, Parted))


def _with_own_keys(params: Params, axes: tuple[str, ...]) -> Params:
    """The weights with keys of dropout that differ between devices, which have different rows."""
    number = jax.lax.axis_index(axes)

    def own(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        fold = jax.random.fold_in
        for _ in leaf.shape:
            fold = jax.vmap(fold, (0, None))
        return fold(leaf, number)

    return jax.tree.map(own, params)
