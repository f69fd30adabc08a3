"""Pictures as a model sees them: pools of units that towers turn to features, and the tokens in whose place they stand.

A batch's rows are in groups of neighbours. A group's pictures lie one after another in a pool of units (tiles of one
size, or whole pictures padded to one), so that a row without pictures costs a tower nothing, and documents that show
the same picture share it. On several devices each has a group.

Axes: B rows, T time, G groups, N units of a group's pool, F features of a unit, D embed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import struct

from ntjax.marks import NEWLINE, UNIT

Units = dict[str, jax.ShapeDtypeStruct]  # the shapes of what a tower reads of a picture, [units, ...] each


class Vision(Protocol):
    """What a family that sees has beside the language model; hashable."""

    @property
    def usual(self) -> Units:
        """The units of a picture of usual size, for plans."""


@struct.dataclass
class Pictures:
    """`index` [B, T] int32: the feature in each token's place, u * F + f for feature f of unit u of the row's group.

    `units`: what a family's tower reads, [G, N, ...] each. `places` [B, T, 3] int32: the time, row and column of each
    token, for rotations in three dimensions (arXiv:2409.12191, 2.1).
    """

    index: jax.Array
    units: dict[str, jax.Array]
    places: jax.Array | None = None

    @classmethod
    def of(cls, batch: Mapping[str, jax.Array]) -> Pictures | None:
        """Those of a batch, None where it has none; the documents of a pair are rows."""
        index = batch.get("picture_index")
        if index is None:
            return None
        time, places = index.shape[-1], batch.get("places")
        return cls(
            index.reshape(-1, time),
            {name.removeprefix(UNIT): x for name, x in batch.items() if name.startswith(UNIT)},
            None if places is None else places.reshape(-1, time, 3),
        )

    def shown(self, words: jax.Array, features: jax.Array, newline: jax.Array | None = None) -> jax.Array:
        """The embeddings of words [B, T, D] with features [G, N, F, D] in the places of pictures."""
        groups, *_, embed = features.shape
        at = jnp.maximum(self.index, 0).reshape(groups, -1, 1)
        seen = jnp.take_along_axis(features.reshape(groups, -1, embed), at, axis=1).reshape(words.shape)
        if newline is not None:
            words = jnp.where((self.index == NEWLINE)[..., None], newline.astype(words.dtype), words)
        return jnp.where((self.index >= 0)[..., None], seen, words)
