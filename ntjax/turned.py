"""4-bit weights as TPUs multiply by them.

Codes in the order of `quantised.FourBit` must be spread out and turned into rows of the weight before a product, and
XLA for TPUs writes all that out, several times as large. Here the blocks of all outputs lie side by side, and a byte
holds the codes of two inputs that are half the inputs apart: each half of the weight is a function of the codes, number
by number, and one loop writes both. The numbers are the same.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ntjax.quantised import BLOCK, NESTED, TABLES, FourBit, dynamic_table, selected


@struct.dataclass
class Turned(FourBit):
    """As `FourBit`, of I inputs in B blocks and O outputs; what is stacked is in front.

    codes: uint8 [.., B / 2, 64, O], of input i in the high bits, of input i + I / 2 in the low ones
    absmax: [.., 2, B / 2, O], of either half
    nested: fp32 [.., K, O], the nested absmaxes that an output's blocks meet, one after the other; or None
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array it stands for, stacked axes included."""
        return (*self.codes.shape[:-3], *self.matrix)

    def dense(self, dtype: Any) -> jax.Array:
        """[.., *matrix], computed in fp32."""
        inputs = jnp.concatenate(self.halves(dtype), axis=-2)
        return inputs.swapaxes(-1, -2).reshape(self.shape)

    def product(self, rows: jax.Array) -> jax.Array:
        """rows [N, I] times the weight of one layer -> [N, O]."""
        parts = zip(jnp.split(rows, 2, axis=-1), self.halves(rows.dtype), strict=True)
        first, second = (jnp.einsum("NI,IO->NO", x, w, preferred_element_type=jnp.float32) for x, w in parts)
        return (first + second).astype(rows.dtype)

    def halves(self, dtype: Any) -> list[jax.Array]:
        """The weight of the first half of the inputs and of the second: [.., I / 2, O] each."""
        *lead, blocks, _, outputs = self.codes.shape
        absmax = self._absmax()
        codes, found = self.codes.astype(jnp.int32), []  # whose bits a TPU tests in fewer steps than a byte's
        for half, first in enumerate((4, 0)):
            values = selected(codes, TABLES[self.kind], first)
            found.append((values * absmax[..., half, :, None, :]).astype(dtype))
        # Else XLA may write fp32 values, twice as large, for the product to multiply and round.
        found = jax.lax.optimization_barrier(found)
        return [half.reshape(*lead, blocks * BLOCK, outputs) for half in found]

    def _absmax(self) -> jax.Array:
        """Blocks' magnitudes: fp32 [.., 2, B / 2, O]."""
        if self.nested is None:
            return jnp.asarray(self.absmax)
        _, half, outputs = self.absmax.shape[-3:]
        nested, kept = self.nested[..., None, :, :], _kept(jnp, 2 * half, outputs).reshape(2, half, outputs)
        scale = nested[..., :1, :]
        for k in range(1, nested.shape[-2]):
            scale = jnp.where(kept == k, nested[..., k : k + 1, :], scale)
        # As in FourBit: a product and a sum, rounded one by one.
        return (
            jnp.maximum(_dynamic(self.absmax) * scale, np.finfo(np.float32).min)
            + self.offset[..., None, None, None]
        )


def turned(w: FourBit, inputs: int) -> FourBit:
    """A weight of so many inputs, or a stack of them, turned; as it is where half its inputs aren't whole blocks."""
    if inputs % (2 * BLOCK):
        return w
    xp: Any = np if isinstance(w.codes, np.ndarray) else jnp
    lead, outputs, blocks = w.codes.shape[:-2], math.prod(w.matrix) // inputs, inputs // BLOCK
    codes = xp.stack([w.codes >> 4, w.codes & 15], axis=-1).reshape(*lead, outputs, 2, inputs // 2)
    codes = (codes[..., 0, :] << 4 | codes[..., 1, :]).swapaxes(-1, -2)
    codes = codes.reshape(*lead, blocks // 2, BLOCK, outputs)
    absmax = xp.moveaxis(w.absmax.reshape(*lead, outputs, 2, blocks // 2), -3, -1)
    nested = w.nested
    if nested is not None:
        most = int(_kept(np, blocks, outputs).max()) + 1
        first = np.arange(outputs) * blocks // NESTED
        nested = nested[..., np.minimum(first + np.arange(most)[:, None], nested.shape[-1] - 1)]
    if xp is np:
        codes, absmax = np.ascontiguousarray(codes), np.ascontiguousarray(absmax)
    return Turned(codes, absmax, nested, w.offset, w.matrix, w.kind)


def _dynamic(codes: jax.Array) -> jax.Array:
    """dynamic_table()[codes], of which those below the zero, 127, mirror those above, and the last is by itself."""
    above = codes.astype(jnp.int32) - 127
    size = selected(jnp.abs(above), dynamic_table()[127:255])
    return jnp.where(above < 0, -size, jnp.where(above == 128, np.float32(1), size))


def _kept(xp: Any, blocks: int, outputs: int) -> Any:
    """Which of its output's nested absmaxes a block has: [blocks, outputs]."""
    first = xp.arange(outputs) * blocks % NESTED  # where among those that share one an output begins
    return (first + xp.arange(blocks)[:, None]) // NESTED
