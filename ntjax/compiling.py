"""What XLA is told before it looks for devices, and where the programs are kept that it compiles.

What the environment says goes before what is said here.
"""

from __future__ import annotations

import os
from pathlib import Path

FRACTION, TPU_ARGS = "XLA_PYTHON_CLIENT_MEM_FRACTION", "LIBTPU_INIT_ARGS"
DEFAULTS = {
    # Of a GPU's memory; JAX's own default of 0.75 is for programs that share one. `ntjax.plan` counts on it.
    FRACTION: "0.92",
    # KiB of vector memory that a TPU's fusion may take: with XLA's own 16 MiB large products fall behind the matrix
    # units (docs/benchmarks.md); above 32 there is little more to gain, and compiling takes several times as long.
    TPU_ARGS: "--xla_tpu_scoped_vmem_limit_kib=32768",
}

# On GPUs XLA multiplies what several products share by their weights side by side, which decoding would copy next to
# each other at every token.
APART = "xla_gpu_dot_merger_threshold_mb"


def defaults() -> dict[str, str]:
    """What `set_defaults` adds to the environment as it is, by name: flags that it doesn't have."""
    added = {} if FRACTION in os.environ else {FRACTION: DEFAULTS[FRACTION]}
    flag = DEFAULTS[TPU_ARGS]
    if flag.partition("=")[0] not in os.environ.get(TPU_ARGS, ""):
        added[TPU_ARGS] = flag
    return added


def set_defaults() -> None:
    """Completes the environment, for the first look at devices to see."""
    for name, value in defaults().items():
        os.environ[name] = f"{value} {os.environ.get(name, '')}".rstrip()


def for_decoding(platform: str) -> dict[str, int]:
    """What XLA is told when it compiles a program that decodes."""
    return {APART: 0} if platform == "gpu" and APART not in os.environ.get("XLA_FLAGS", "") else {}


def keep_compiled(folder: str) -> None:
    """Compiled programs are kept in `folder` ("auto": the user's cache, "none": nowhere) and found there by later runs;
    JAX_COMPILATION_CACHE_DIR goes before it."""
    import jax

    if folder == "none":
        jax.config.update("jax_enable_compilation_cache", False)
    elif not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ntjax" / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(cache if folder == "auto" else Path(folder)))
