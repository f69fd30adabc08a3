"""What the forward pass keeps for the backward pass, layer by layer; the rest is formed again.

A layer's residual input is always kept. With B T tokens, a layer of Llama-2-7B at bf16 keeps about 34 D B T bytes of
named activations under "minimal", and 2 D B T under "full".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ntjax import narrow
from ntjax.config.remat import NAMES

INPUT = "input"  # of a layer, where it goes by a name


def named(x: jax.Array, name: str) -> jax.Array:
    """x, known to policies as one of `NAMES`."""
    assert name in NAMES, name
    return _as_words(x, name) if _by_words(x) else checkpoint_name(x, name)


def _by_words(x: jax.Array) -> bool:
    """Whether x is kept as the words that its numbers are. XLA for CPUs has no bf16: to lay one layer's aside it would
    turn those of all layers into fp32 and back."""
    return x.dtype == jnp.bfloat16 and narrow.target() == "cpu"


def _named_words(x: jax.Array, name: str) -> jax.Array:
    words = checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.uint16), name)
    return jax.lax.bitcast_convert_type(words, x.dtype)


_as_words = jax.custom_jvp(_named_words, nondiff_argnums=(1,))  # words have no gradient; x has its own


@_as_words.defjvp
def _as_words_jvp(name: str, x: tuple[jax.Array], dx: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return _named_words(*x, name), *dx


def rematerialised(layer: Callable[..., Any], keep: str | tuple[str, ...]) -> Callable[..., Any]:
    """The layer, which keeps nothing ("full"), its named activations ("minimal"), all products with a weight ("dots"),
    those of some names, the named ones in the host's memory ("offload"), or both named ones and products ("none").

    With "none" no product is formed again, and no kernel of attention run: only what is elementwise, which takes less
    time than writing and reading it. Differentiating keeps twice as much by itself ("everything", for counting).
    """
    if keep == "everything":
        return layer

    def named_input(x: jax.Array, weights: Any) -> Any:
        return layer(_as_words(x, INPUT) if _by_words(x) else x, weights)

    return jax.checkpoint(named_input, prevent_cse=False, policy=_policy(keep))


def _policy(keep: str | tuple[str, ...]) -> Any:
    policies = jax.checkpoint_policies
    if keep == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[INPUT],
            names_which_can_be_offloaded=list(NAMES),
            offload_src="device",
            offload_dst="pinned_host",
        )
    names = NAMES if keep in ("minimal", "none") else () if keep in ("full", "dots") else keep
    named = policies.save_only_these_names(INPUT, *names)
    if keep in ("dots", "none"):
        return policies.save_from_both_policies(named, policies.dots_with_no_batch_dims_saveable)
    return named
