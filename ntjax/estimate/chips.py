"""What chips can do, from their makers' pages. A new chip is one line.

TPUs: cloud.google.com/tpu/docs/v5e, v5p, v6e ("System architecture": peak compute, HBM, its bandwidth, inter-chip
interconnect bandwidth, of which half goes one way; a host's data-centre network over its chips). H100, H200: NVIDIA's
SXM data sheets (NVLink 900 GB/s both ways), memory as the driver reports it; network: one 400 Gbit/s port a GPU, as in
DGX H100. All are peaks, dense, of one chip; how much of a peak a program reaches is `estimate.roofline`'s assumption.
Memory is what a program gets: libtpu's limit, and 0.92 of a GPU's, which `ntjax.train` asks for.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Peaks of one chip: bf16 and fp32 matmul FLOP/s, bytes of memory, its bytes/s, and those sent to other chips: over
    all links inside a slice or a box (ICI, NVLink), and out of it (DCN, InfiniBand). `torus` is of how many dimensions
    the links are, 0 where any chip reaches any other at full speed. `clock`: cycles/s of a TPU's core, those by which
    its matrix units come to the peak."""

    name: str
    flops: float
    fp32: float
    memory: float
    bandwidth: float
    links: float
    network: float
    torus: int = 0
    clock: float = 0.0


GB, GiB = 1e9, 2.0**30

CHIPS = {
    chip.name: chip
    for chip in (
        # name, bf16 FLOP/s, fp32 FLOP/s (bf16 in six passes on TPUs), memory, bytes/s, links, network, torus, clock
        Chip("v5e", 197e12, 197e12 / 6, 15.75 * GiB, 819 * GB, 200 * GB, 3.125 * GB, 2, 1.5e9),
        Chip("v5p", 459e12, 459e12 / 6, 95.74 * GiB, 2765 * GB, 600 * GB, 6.25 * GB, 3, 1.75e9),
        Chip("v6e", 918e12, 918e12 / 6, 31.25 * GiB, 1640 * GB, 400 * GB, 12.5 * GB, 2, 1.75e9),
        Chip("h100", 989e12, 67e12, 0.92 * 79.1 * GiB, 3350 * GB, 450 * GB, 50 * GB),
        Chip("h200", 989e12, 67e12, 0.92 * 139.8 * GiB, 4800 * GB, 450 * GB, 50 * GB),
    )
}
# What a device calls itself -> its chip.
KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}
