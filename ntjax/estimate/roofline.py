"""Seconds from FLOPs and bytes: a roofline (Williams et al. 2009, CACM 52:65) with links beside memory.

    seconds = max(matmuls, memory, collectives along data and fsdp) + collectives along tensor and sequence

Assumptions, all of them: what moves weights and gradients (data, fsdp) runs beside the matmuls, as XLA's asynchronous
collectives do; what moves activations (tensor, sequence) is waited for; memory is read and written beside both; and
peaks are reached as far as `REACHED` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ntjax.estimate.chips import Chip
from ntjax.estimate.flops import Flops
from ntjax.estimate.traffic import Collective
from ntjax.mesh import ROWS

# Shares of a peak. Matmuls of a layer of 7B reach this on TPUs and H100s alike; attention's are smaller.
REACHED = {"dense": 0.8, "attention": 0.5, "memory": 0.8, "links": 0.8}
SKIPPED = 0.5  # of attention's matmuls, by kernels that pass over what is masked
WRAPS = {"v5e": 16, "v6e": 16, "v5p": 4}  # chips along an axis of the torus that close a ring


@dataclass(frozen=True)
class Times:
    """Seconds of a call by what they are spent on; `overlapped` and `waited` are of collectives."""

    compute: float
    memory: float
    overlapped: float
    waited: float

    @property
    def total(self) -> float:
        """Of the call."""
        return max(self.compute, self.memory, self.overlapped) + self.waited

    @property
    def bound(self) -> str:
        """What takes longest."""
        named = {"compute": self.compute, "memory": self.memory, "links": self.overlapped + self.waited}
        return max(named, key=lambda name: named[name])


def times(
    work: Flops,
    moved: float,
    collectives: Sequence[Collective],
    chip: Chip,
    mesh: Mesh,
    dtype: str,
    skips: bool,
) -> Times:
    """Of a program that computes in `dtype`, whose attention `skips` what is masked or doesn't."""
    peak = chip.fp32 if dtype == "float32" else chip.flops
    attention = work.attention * (SKIPPED if skips else 1.0)
    compute = work.dense / (peak * REACHED["dense"]) + attention / (peak * REACHED["attention"])
    spent = {True: 0.0, False: 0.0}
    for one in collectives:
        beside = axes(one, mesh) <= set(ROWS)
        spent[beside] += one.moved / (rate(one, chip, mesh) * REACHED["links"])
    memory = moved / (chip.bandwidth * REACHED["memory"])
    return Times(compute, memory, overlapped=spent[True], waited=spent[False])


def axes(collective: Collective, mesh: Mesh) -> set[str]:
    """The axes of the mesh that a collective goes along."""
    places = np.array(np.unravel_index(collective.members, mesh.devices.shape))
    return {axis for axis, along in zip(mesh.axis_names, places, strict=True) if len(set(along)) > 1}


def rate(collective: Collective, chip: Chip, mesh: Mesh) -> float:
    """Bytes/s that a device sends: over those links of a torus that go where the group's devices are, half as many
    where the group is a line that no link closes to a ring; over the network, if they are in several slices."""
    devices = [mesh.devices.flat[number] for number in collective.members]
    if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        return chip.network
    if not chip.torus:
        return chip.links
    spans, extents = _extents(devices)[: chip.torus], _extents(mesh.devices.flat)[: chip.torus]
    share = 0.0
    for span, extent in zip(spans, extents, strict=True):
        if span > 1:
            share += 1.0 if span == extent and extent % WRAPS[chip.name] == 0 else 0.5
    return chip.links * share / chip.torus


def _extents(devices: Any) -> list[int]:
    return [len(set(along)) for along in zip(*(device.coords for device in devices), strict=True)]
