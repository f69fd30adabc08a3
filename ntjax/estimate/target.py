"""The devices a plan is for: those there are, or named ones that compilers know without the hardware.

A TPU slice is named by generation and shape, "v5e:4x4": libtpu compiles for it (extra `tpu`). A GPU box is named by
chip and count, "h100:8": the CUDA plugin does (extra `cuda`).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ntjax.errors import ConfigError, InputMissing
from ntjax.estimate.chips import CHIPS, KINDS, Chip

TPUS = ("v4", "v5e", "v5p", "v6e")
GPUS = ("h100", "h200")
HOST = {"v5e": (2, 2), "v6e": (2, 2), "v4": (2, 2, 1), "v5p": (2, 2, 1)}  # chips of a host
# XLA's description of an H100 SXM, from NVIDIA's "H100 architecture" paper; the others differ in memory alone.
DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


@dataclass(frozen=True)
class Target:
    """Devices to compile for. `chip` is None where their peaks aren't known, as a CPU's."""

    name: str
    devices: Sequence[Any]
    chip: Chip | None


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
        return Target(name, _gpus(CHIPS[chip], int(shape)), CHIPS[chip])
    raise ConfigError(
        f"{name!r} names no devices that there is a compiler for",
        where=where,
        fix=f"write one of {', '.join(TPUS)} with its shape, as v5e:4x4, or {' or '.join(GPUS)} with a count, as h100:8",
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
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # nobody has to be asked what this machine is
    host = [min(size, part) for size, part in zip(sizes, HOST[chip], strict=True)]
    try:
        found = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{chip}:{shape}",
            chips_per_host_bounds=[*host, *[1] * (3 - len(host))],
            **({"num_slices": 1}),
        )
    except Exception as error:  # what jax raises differs between its versions
        raise ConfigError(
            f"libtpu knows no {name}: {str(error).splitlines()[0]}",
            where=where,
            fix="name a shape that the chip is sold in",
        ) from None
    return found.devices


def _gpus(chip: Chip, count: int) -> Sequence[Any]:
    from jax.experimental import topologies

    description = DESCRIPTION.format(
        bandwidth=int(chip.bandwidth), memory=int(chip.memory), name=f"NVIDIA {chip.name.upper()} 80GB HBM3"
    )
    try:
        import jax_plugins  # noqa: F401

        found = topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=f"1x1x{count}", target_config=description
        )
    except (ImportError, NotImplementedError, RuntimeError, AssertionError, KeyError) as error:
        raise InputMissing(
            f"{chip.name} is compiled for by JAX's CUDA plugin: {str(error).splitlines()[0]}",
            where="--topology",
            fix="pip install 'ntjax[cuda]'",
        ) from None
    assert len(found.devices) == math.prod((1, 1, count))
    return found.devices
