"""The devices a plan is for: those there are, or named ones that compilers know without the hardware.

A TPU slice is named by generation and shape, "v5e:4x4": libtpu compiles for it (extra `tpu`). A GPU box is named by
chip and count, "h100:8": the CUDA plugin does (extra `cuda`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ntjax.errors import ConfigError, InputMissing
from ntjax.estimate.chips import CHIPS, KINDS, Chip
from ntjax.estimate.cuda import answering, gpus

__all__ = ["Target", "answering", "target"]

TPUS = ("v5e", "v5p", "v6e")
GPUS = ("h100", "h200")
# libtpu asks nobody what this machine is, and takes no chip from anybody: it only compiles.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
HOST = {"v5e": (2, 2), "v6e": (2, 2), "v5p": (2, 2, 1)}  # chips of a host


@dataclass(frozen=True)
class Target:
    """Devices to compile for. `chip` is None where their peaks aren't known, as a CPU's."""

    name: str
    devices: Sequence[Any]
    chip: Chip | None

    @property
    def platform(self) -> str:
        """As JAX calls it."""
        return self.devices[0].platform

    @property
    def memory(self) -> float | None:
        """Bytes that a program gets of each device; None where that isn't known."""
        return self.chip.memory if self.chip else None


def target(name: str | None, where: str = "--topology") -> Target:
    """The devices that `name` means, those there are for None.

    Raises ConfigError for a name that means nothing, InputMissing where its compiler isn't installed.
    """
    import jax

    if name is None:
        devices = jax.devices()
        kind = devices[0].device_kind
        return Target(f"{len(devices)} x {kind}", devices, CHIPS.get(KINDS.get(kind, "")))
    chip, _, shape = name.partition(":")
    if chip in TPUS and re.fullmatch(r"\d+(x\d+)*", shape):
        return Target(name, _tpus(name, chip, shape, where), CHIPS[chip])
    if chip in GPUS and shape.isdigit() and int(shape) > 0:
        return Target(name, gpus(CHIPS[chip], int(shape), where), CHIPS[chip])
    raise ConfigError(
        f"{name!r} names no devices that there is a compiler for",
        where=where,
        fix=f"write one of {', '.join(TPUS)} with its shape (v5e:4x4), or {' or '.join(GPUS)} with a count (h100:8)",
    )


def _tpus(name: str, chip: str, shape: str, where: str) -> Sequence[Any]:
    from jax.experimental import topologies

    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise InputMissing(
            f"{name} is compiled for by libtpu, which isn't installed",
            where=where,
            fix="pip install 'ntjax[tpu]'",
        ) from None
    wanted = len(HOST[chip])
    sizes = [int(size) for size in shape.split("x")]
    if len(sizes) != wanted:
        example = "4x4" if wanted == 2 else "2x2x2"
        raise ConfigError(
            f"{shape!r} has {len(sizes)} dimensions, and a slice of {chip} has {wanted}",
            where=where,
            fix=f"write it as {chip}:{example}",
        )
    for name_, value in QUIET.items():
        os.environ.setdefault(name_, value)
    host = [min(size, part) for size, part in zip(sizes, HOST[chip], strict=True)]
    try:
        found = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{chip}:{shape}",
            chips_per_host_bounds=[*host, *[1] * (3 - len(host))],
            num_slices=1,
        )
    except Exception as error:  # what jax raises differs between its versions
        raise ConfigError(
            f"libtpu knows no {name}: {str(error).splitlines()[0]}",
            where=where,
            fix="name a shape that the chip is sold in",
        ) from None
    return found.devices
