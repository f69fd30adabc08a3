"""Activations by their names in config.json."""

from __future__ import annotations

from collections.abc import Callable

import jax

from ntjax import narrow
from ntjax.errors import ConfigError
from ntjax.ops.elementwise import in_fp32


def _rounded_once(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """The function in fp32 on CPUs. Elsewhere XLA computes so within a fusion by itself, and if told to would carry
    fp32 from one to the next as well: a step of 7B on TPUs would take 3% longer."""
    wide = in_fp32(function)
    return lambda x: (wide if narrow.target() == "cpu" else function)(x)


_PLAIN: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": jax.nn.gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
ACTIVATIONS = {name: _rounded_once(function) for name, function in _PLAIN.items()}


def known(name: str, setting: str = "hidden_act") -> str:
    """`name`; raises ConfigError if there is no such activation."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"{setting} {name!r} isn't there", fix=f"one of {sorted(ACTIVATIONS)} is")
    return name
