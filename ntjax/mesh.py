"""The devices of a run as a mesh, and where rows of a batch lie on it.

Rows of a batch are split over the axes `data` and `fsdp`, their tokens over `sequence`. The devices along `fsdp` share
out weights, gradients or the optimizer's state as well (`ntjax.layout`), those along `tensor` the heads, the inner
dimension of MLPs and the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from ntjax.errors import ConfigError

DATA, FSDP, TENSOR, SEQUENCE = AXES = ("data", "fsdp", "tensor", "sequence")
HOST = "pinned_host"  # the memory that weights and states are offloaded to
ROWS = (DATA, FSDP)  # the axes that a batch's rows are split over
MANUAL = (*ROWS, SEQUENCE)  # the axes that a model is written for, see `ntjax/parallel.py`


def make_mesh(
    sizes: Mapping[str, int] | None = None,
    devices: Sequence[jax.Device] | None = None,
    *,
    slices: Mapping[str, int] | None = None,
    where: str | None = None,
) -> Mesh:
    """A mesh over `devices`, all there are by default, with so many along each axis: -1 for the rest, 1 if not named;
    without `sizes` all are along `data`.

    `slices` says over how many slices of a pod, joined by the data-centre network, an axis goes.

    Raises ConfigError at `where` if the sizes don't multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = _shape(sizes or {DATA: -1}, len(devices), where)
    slices = dict(slices or {})
    if any(count > 1 for count in slices.values()):
        arranged = _across_slices(shape, slices, devices, where)
    elif devices[0].platform == "tpu":
        from jax.experimental import mesh_utils

        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        arranged = np.array(devices).reshape(shape)
    # Auto: XLA places collectives where `layout` doesn't. The default, Explicit, would want a sharding at every einsum.
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _shape(sizes: Mapping[str, int], count: int, where: str | None) -> tuple[int, ...]:
    given = {axis: sizes.get(axis, 1) for axis in AXES}
    fixed = math.prod(size for size in given.values() if size != -1)
    rest = count // fixed
    if count % fixed or (rest != 1 and -1 not in given.values()):
        said = " * ".join(f"{axis} {size}" for axis, size in given.items() if size not in (1, -1))
        divisors = [n for n in range(1, count + 1) if count % n == 0]
        raise ConfigError(
            f"{said} takes {'a multiple of ' if -1 in given.values() else ''}{fixed} devices, and there are {count}",
            where=where,
            fix=f"let the axes multiply to {count}: each is one of {', '.join(map(str, divisors))}, or -1 for the rest",
        )
    return tuple(rest if size == -1 else size for size in given.values())


def _across_slices(
    shape: tuple[int, ...], slices: Mapping[str, int], devices: Sequence[jax.Device], where: str | None
) -> np.ndarray:
    """The devices of each slice as neighbours: the axes in `slices` have the slices as their outer part."""
    from jax.experimental import mesh_utils

    outer = tuple(slices.get(axis, 1) for axis in AXES)
    for axis, size, count in zip(AXES, shape, outer, strict=True):
        if size % count:
            fits = [n for n in range(1, size + 1) if size % n == 0]
            raise ConfigError(
                f"{axis} has {size} devices, which can't be split over {count} slices",
                where=where,
                fix=f"name one of {', '.join(map(str, fits))}",
            )
    there = len({getattr(device, "slice_index", 0) for device in devices})
    if math.prod(outer) != there:
        raise ConfigError(
            f"the mesh goes over {math.prod(outer)} slices, and there are {there}",
            where=where,
            fix=f"let dcn_data * dcn_fsdp be {there}",
        )
    inner = tuple(size // count for size, count in zip(shape, outer, strict=True))
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)


def row_groups(mesh: Mesh) -> int:
    """Into how many parts a batch's rows are split."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def has_host_memory(mesh: Mesh) -> bool:
    """Whether the devices can compute on what lies in the host's memory (`HOST`)."""
    return any(memory.kind == HOST for memory in mesh.local_devices[0].addressable_memories())


def on_host(places: Any) -> Any:
    """The same shardings in the host's memory."""
    return jax.tree.map(lambda place: place.with_memory_kind(HOST), places)


def on_device(place: Sharding) -> Sharding:
    """The same sharding in the devices' memory."""
    return place.with_memory_kind("device") if place.memory_kind == HOST else place


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def own_share(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """(number, count): a process's devices hold that one of `count` equal parts of a batch's rows.

    Processes whose devices are along `tensor` or `sequence` have the same part.
    """
    process = jax.process_index() if process is None else process
    groups = row_groups(mesh)
    by_group = mesh.devices.reshape(groups, -1)
    mine = sorted({group for group in range(groups) for d in by_group[group] if d.process_index == process})
    assert groups % len(mine) == 0, mine
    assert mine == list(range(mine[0], mine[0] + len(mine))), mine
    assert mine[0] % len(mine) == 0, mine
    return mine[0] // len(mine), groups // len(mine)


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows [microbatches, rows, ...] as its part of global arrays, rows split over the devices."""
    sharding = NamedSharding(mesh, PartitionSpec(None, ROWS))
    number, count = own_share(mesh)

    def place(array: np.ndarray) -> jax.Array:
        share = array.shape[1]
        shape = (array.shape[0], share * count, *array.shape[2:])

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[1].indices(shape[1])
            return array[:, start - number * share : stop - number * share]

        return jax.make_array_from_callback(shape, sharding, part)

    return {name: place(array) for name, array in batch.items()}
