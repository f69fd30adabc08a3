"""Compiling for GPUs where there is none: the descriptions of devices, and the answers that a GPU would give."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from ntjax.errors import InputMissing
from ntjax.estimate.chips import Chip

CAPABILITY = (9, 0)  # of Hopper
# What a device calls itself.
NAMES = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
# XLA's description of an H100 SXM, from NVIDIA's "H100 architecture" paper; an H200 differs in memory alone.
DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


def gpus(chip: Chip, count: int, where: str = "--topology") -> Sequence[Any]:
    """So many GPUs of one box, which need not be here.

    Raises InputMissing where JAX's CUDA plugin isn't installed, or was turned away when JAX started.
    """
    from jax.experimental import topologies

    # The plugin wants cuDNN and the other libraries, which only running needs; it is asked once, when JAX starts.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    description = DESCRIPTION.format(
        bandwidth=int(chip.bandwidth),
        memory=int(chip.memory),
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        name=NAMES[chip.name],
    )
    try:
        found = topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=f"1x1x{count}", target_config=description
        )
    except (NotImplementedError, RuntimeError) as error:
        raise InputMissing(
            f"{chip.name} is compiled for by JAX's CUDA plugin: {str(error).splitlines()[0]}",
            where=where,
            fix="pip install 'ntjax[cuda]'; if it is, set JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1",
        ) from None
    assert len(found.devices) == count
    return found.devices


@contextmanager
def answering() -> Iterator[None]:
    """Inside, what JAX asks the attached GPU is answered as a Hopper GPU with the plugin's own cuDNN would.

    JAX decides while it traces a call of cuDNN (`ops.cudnn`) whether the GPU and the library know it, and asks those
    of this machine; the ones that are compiled for aren't here.
    """
    from jax._src.cudnn import fused_attention_stablehlo as fused

    library = fused.cuda_versions.cudnn_build_version() if fused.cuda_versions else 0

    def version(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(".")))

    with (
        patch.object(fused, "check_cudnn_version", lambda: library),
        patch.object(fused, "check_compute_capability", lambda least: version(least) <= CAPABILITY),
        patch.object(fused, "is_cuda_compute_capability_equal", lambda one: version(one) == CAPABILITY),
    ):
        yield
