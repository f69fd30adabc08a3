"""Activations by their names in config.json."""

from __future__ import annotations

from collections.abc import Callable

import jax

from ntjax.errors import ConfigError
from ntjax.ops.elementwise import in_fp32

_KNOWN: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": jax.nn.gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
ACTIVATIONS = {name: in_fp32(function) for name, function in _KNOWN.items()}


def known(name: str, setting: str = "hidden_act") -> str:
    """`name`; raises ConfigError if there is no such activation."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"{setting} {name!r} isn't there", fix=f"one of {sorted(ACTIVATIONS)} is")
    return name
