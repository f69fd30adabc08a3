"""What chips can do, from their makers' pages. A new chip is one line.

TPUs: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e ("System architecture"); H100: NVIDIA's H100 SXM data sheet; H200:
NVIDIA's H200 SXM data sheet. All are peaks, dense, of one chip; how much of a peak a program reaches is an assumption
of `estimate.roofline`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Peaks of one chip: bf16 FLOP/s, bytes of memory, its bytes/s, and those of links to other chips, one way: inside
    a slice or a box (ICI, NVLink), and across them (DCN, InfiniBand). `fp32` is FLOP/s of fp32 matmuls."""

    name: str
    flops: float
    memory: float
    bandwidth: float
    links: float
    network: float
    fp32: float


GB, GiB = 1e9, 2.0**30

CHIPS = {
    chip.name: chip
    for chip in (
        # name  bf16 FLOP/s  memory  bytes/s  ICI or NVLink  DCN or InfiniBand  fp32 FLOP/s (bf16 in six passes on TPUs)
        Chip("v4", 275e12, 32 * GiB, 1228 * GB, 150 * GB, 6.25 * GB, 275e12 / 6),
        Chip("v5e", 197e12, 16 * GiB, 819 * GB, 100 * GB, 3.125 * GB, 197e12 / 6),
        Chip("v5p", 459e12, 95 * GiB, 2765 * GB, 300 * GB, 6.25 * GB, 459e12 / 6),
        Chip("v6e", 918e12, 32 * GiB, 1640 * GB, 200 * GB, 12.5 * GB, 918e12 / 6),
        Chip("h100", 989e12, 80 * GB, 3350 * GB, 450 * GB, 50 * GB, 67e12),
        Chip("h200", 989e12, 141 * GB, 4800 * GB, 450 * GB, 50 * GB, 67e12),
    )
}
# What a device calls itself -> its chip.
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}
