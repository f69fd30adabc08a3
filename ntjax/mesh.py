"""The devices of a run, and how arrays lie on them.

Today one axis, "data": every device holds the whole model and a share of each batch's rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices`, all there are by default."""
    devices = jax.devices() if devices is None else devices
    # Auto: XLA places the collectives. The default, Explicit, would want a sharding at every einsum.
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows [microbatches, rows, ...] as its part of global arrays, rows split over the devices."""
    sharding = NamedSharding(mesh, PartitionSpec(None, "data"))
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
