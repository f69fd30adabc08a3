"""Products of bf16 matrices on CPUs that have instructions for them.

XLA for CPUs widens both sides of such a product to fp32, unless its result is to be fp32 and each side lies as its
kernels (YNNPACK's, by AMX or AVX-512) read it: then it is several times as fast. So results are rounded after the
product, as everywhere, and what lies across is turned before it.

Axes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

INSTRUCTIONS = {"amx_bf16", "avx512_bf16"}
TARGET: ContextVar[str | None] = ContextVar("target", default=None)
wide = partial(jnp.einsum, preferred_element_type=jnp.float32)  # sums and result are fp32


def product(rows: jax.Array, matrix: jax.Array) -> jax.Array:
    """rows [N, I] times matrix [O, I] -> [N, O], all of one dtype; sums are fp32."""
    return _narrow(rows, matrix) if rows.dtype == jnp.bfloat16 and fitted() else _plain(rows, matrix)


@contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """What is traced within is for devices of a platform that need not be here."""
    token = TARGET.set(platform)
    try:
        yield
    finally:
        TARGET.reset(token)


def fitted() -> bool:
    """Whether a program that is being traced will run on a processor that multiplies bf16."""
    return target() == "cpu" and not INSTRUCTIONS.isdisjoint(_instructions())


def target() -> str:
    """The platform that a program which is being traced will run on."""
    return TARGET.get() or jax.default_backend()


@cache
def _instructions() -> frozenset[str]:
    """Of this machine's processor, as Linux names them."""
    info = Path("/proc/cpuinfo")
    return frozenset(info.read_text().split()) if info.exists() else frozenset()


def turned(x: jax.Array) -> jax.Array:
    """x [..., A, B] as [..., B, A], which is also how it lies in memory where products of its dtype want that."""
    y = x.swapaxes(-1, -2)
    if x.dtype != jnp.bfloat16 or not fitted():
        return y
    return with_layout_constraint(y, Layout(major_to_minor=tuple(range(y.ndim))))


def _plain(rows: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.einsum("NI,OI->NO", rows, matrix)


@jax.custom_vjp
def _narrow(rows: jax.Array, matrix: jax.Array) -> jax.Array:
    return wide("NI,OI->NO", rows, matrix).astype(rows.dtype)


def _forward(rows: jax.Array, matrix: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _narrow(rows, matrix), (rows, matrix)


def _backward(kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows, matrix = kept
    drows, dmatrix = wide("NO,OI->NI", dy, matrix), wide("ON,NI->OI", turned(dy), rows)
    return drows.astype(rows.dtype), dmatrix.astype(matrix.dtype)


_narrow.defvjp(_forward, _backward)
