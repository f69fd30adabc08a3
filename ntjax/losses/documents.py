"""From values of tokens to values of documents, where several documents may share a row.

Axes: B slots, 2 the chosen and the rejected row of a slot, T time, S documents of a row. Document k is segment k + 1,
and documents lie in a row in that order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def document_sums(values: jax.Array, mask: jax.Array, segments: jax.Array, documents: int) -> jax.Array:
    """Sums [..., S] over each document's tokens where `mask` is true; values, mask, segments [..., T]."""
    kept = jnp.where(mask, values, 0)
    if documents == 1:
        return kept.sum(axis=-1, keepdims=True)
    # A one-hot product would be a matmul, which TPUs take in bf16.
    belongs = segments[..., None] == jnp.arange(1, documents + 1)
    return jnp.where(belongs, kept[..., None], 0).sum(axis=-2)


def completion_weights(
    mask: jax.Array, segments: jax.Array, documents: int, ld_alpha: float | None
) -> jax.Array:
    """How much each token's log-probability counts [B, 2, T] fp32: 1, or `ld_alpha` past the pair's shorter completion.

    mask, segments [B, 2, T]. Length-desensitised DPO (arXiv:2409.06411).
    """
    if ld_alpha is None:
        return jnp.ones(mask.shape, jnp.float32)
    counts = document_sums(mask.astype(jnp.int32), mask, segments, documents)
    earlier = jnp.cumsum(counts, axis=-1) - counts
    shared = earlier + counts.min(
        axis=1, keepdims=True
    )  # learned tokens of the row up to where the shared part ends
    place = jnp.maximum(segments - 1, 0)
    tail = jnp.cumsum(mask, axis=-1) > jnp.take_along_axis(shared, place, axis=-1)
    return jnp.where(tail, ld_alpha, 1.0)


def last_positions(segments: jax.Array, documents: int) -> jax.Array:
    """Where each document of a row ends, [..., S] int32 of segments [..., T]; 0 for a document that isn't there."""
    belongs = segments[..., None] == jnp.arange(1, documents + 1)
    time = jnp.arange(segments.shape[-1])[:, None]
    return jnp.where(belongs, time, 0).max(axis=-2)
