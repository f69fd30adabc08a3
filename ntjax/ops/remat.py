"""What the forward pass keeps for the backward pass, layer by layer; the rest is formed again.

A layer's residual input is always kept. With B T tokens, a layer of Llama-2-7B at bf16 keeps about 34 D B T bytes of
named activations under "minimal", and 2 D B T under "full".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from ntjax.config.remat import NAMES


def named(x: jax.Array, name: str) -> jax.Array:
    """x, known to policies as one of `NAMES`."""
    assert name in NAMES, name
    return checkpoint_name(x, name)


def rematerialised(layer: Callable[..., Any], keep: str | tuple[str, ...]) -> Callable[..., Any]:
    """The layer, which keeps nothing ("full"), its named activations ("minimal"), all products with a weight ("dots"),
    those of some names, the named ones in the host's memory ("offload"), or both named ones and products ("none").

    With "none" no product is formed again, and no kernel of attention run: only what is elementwise, which takes less
    time than writing and reading it. Differentiating keeps twice as much by itself ("everything", for counting).
    """
    if keep == "everything":
        return layer
    return jax.checkpoint(layer, prevent_cse=False, policy=_policy(keep))


def _policy(keep: str | tuple[str, ...]) -> Any:
    policies = jax.checkpoint_policies
    if keep == "full":
        return policies.nothing_saveable
    if keep == "dots":
        return policies.dots_with_no_batch_dims_saveable
    if keep == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(NAMES),
            offload_src="device",
            offload_dst="pinned_host",
        )
    named = policies.save_only_these_names(*(NAMES if keep in ("none", "minimal") else keep))
    if keep == "none":
        return policies.save_from_both_policies(named, policies.dots_with_no_batch_dims_saveable)
    return named
