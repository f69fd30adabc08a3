"""Weights in 4 or 8 bits, bit for bit as bitsandbytes 0.50 quantises them on a CPU.

4 bits (QLoRA, arXiv:2305.14314): blocks of 64 numbers, each divided by the block's largest magnitude and given the
nearest of 16 values (NF4 or FP4). Double quantisation stores these magnitudes in 8 bits: less their mean, in blocks
of 256, as codes of the dynamic table (arXiv:2110.02861, 2.1). 8 bits (LLM.int8(), arXiv:2208.07339): a row's numbers
as multiples of 1/127 of its largest magnitude; activations stay as they are.

Quantising is numpy's, whose every operation rounds once and in the order written: XLA fuses products with sums, and a
last bit more or less in a mean changes codes. Where bitsandbytes' kernels for CPU and GPU disagree (ties, the 8-bit
codes), the CPU's is followed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, reduce
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Kind = Literal["nf4", "fp4"]

BLOCK = 64  # numbers that share an absmax
NESTED = 256  # absmaxes that share a nested absmax
WORD = 4  # bytes of a word
TABLES: dict[Kind, np.ndarray] = {
    # Quantiles of a normal distribution, with an exact zero (QLoRA, appendix E).
    "nf4": np.array(
        [
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
            *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
            *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
            *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
        ],
        np.float32,
    ),
    # Sign, two bits of exponent, one of mantissa; 12 is the largest.
    "fp4": np.array(
        [*(0.0, 0.0625, 8, 12, 4, 6, 2, 3), *(-0.0, -0.0625, -8, -12, -4, -6, -2, -3)], np.float32
    )
    / np.float32(12),
}
CHUNK = 1 << 16  # numbers quantised at a time: what is computed on the way stays in the cache


@struct.dataclass
class FourBit:
    """A weight in 4 bits, or a stack of them; about 0.516 bytes a number with double quantisation, else 0.5625.

    Leaves go by blocks, so that they can be sharded along `blocks`; the last block may be partly unused.
    """

    codes: Any  # uint8 [.., blocks, 32], two codes a byte, the first in the high bits; or these in words
    absmax: Any  # [.., blocks]: fp32, or uint8 codes of the dynamic table
    nested: Any  # fp32 [.., ceil(blocks / 256)], or None
    offset: Any  # fp32 [..], or None
    matrix: tuple[int, ...] = struct.field(pytree_node=False)  # (*outputs, *inputs)
    kind: Kind = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array it stands for, stacked axes included."""
        return (*self.absmax.shape[:-1], *self.matrix)

    @property
    def ndim(self) -> int:
        """Of the array it stands for, stacked axes included."""
        return len(self.shape)

    def dense(self, dtype: Any) -> jax.Array:
        """[.., *matrix], computed in fp32. Under jit all of it is one loop that writes the result alone."""
        # An axis of two would be the last one, which TPUs fill up to 128 numbers.
        pairs = jnp.repeat(_bytes(self.codes, jnp.uint8), 2, axis=-1)
        codes = pairs >> np.tile(np.array([4, 0], np.uint8), BLOCK // 2) & 15
        values = selected(codes, TABLES[self.kind]) * self._absmax()[..., None]
        flat = values.astype(dtype).reshape(*self.absmax.shape[:-1], -1)
        return flat[..., : math.prod(self.matrix)].reshape(self.shape)

    def _absmax(self) -> jax.Array:
        if self.nested is None:
            return jnp.asarray(self.absmax)
        values = jnp.asarray(dynamic_table())[self.absmax]
        scale = jnp.repeat(self.nested, NESTED, axis=-1)[..., : self.absmax.shape[-1]]
        # The maximum changes nothing, but with nothing between them XLA fuses product and sum into one rounding,
        # where bitsandbytes has two; a barrier or reduce_precision doesn't keep it from that on a CPU.
        return jnp.maximum(values * scale, np.finfo(np.float32).min) + self.offset[..., None]


@struct.dataclass
class EightBit:
    """A weight in 8 bits, or a stack of them: a number is codes * scale / 127."""

    codes: Any  # int8 [.., *outputs, *inputs], or these in words
    scale: Any  # fp32 [.., *outputs], the largest magnitude of a row
    inputs: int = struct.field(pytree_node=False)  # how many axes are contracted

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array it stands for, stacked axes included."""
        *lead, last = self.codes.shape
        return (*lead, last * WORD if self.codes.dtype == jnp.uint32 else last)

    @property
    def ndim(self) -> int:
        """Of the array it stands for, stacked axes included."""
        return self.codes.ndim

    def dense(self, dtype: Any) -> jax.Array:
        """[.., *outputs, *inputs], computed in fp32."""
        scale = jnp.expand_dims(self.scale, tuple(range(-self.inputs, 0)))
        # Two products, as bitsandbytes rounds: the row's scale, then the reciprocal of 127.
        codes = _bytes(self.codes, jnp.int8).astype(jnp.float32)
        return (codes * scale * np.float32(1 / 127)).astype(dtype)


def in_words(w: Any, parts: int) -> Any:
    """A weight whose codes, if it is quantised, are words of 32 bits, the first byte lowest; as it is where bytes of 8
    bits don't make words that its last axis can be split over `parts` devices by."""
    if not isinstance(w, FourBit | EightBit):
        return w
    parts = 1 if isinstance(w, FourBit) else parts  # which is split by blocks
    if w.codes.shape[-1] % (WORD * parts):
        return w
    if isinstance(w.codes, np.ndarray):
        return w.replace(codes=np.ascontiguousarray(w.codes).view(np.uint32))  # type: ignore[union-attr]
    bytes_ = w.codes.reshape(*w.codes.shape[:-1], -1, WORD)
    return w.replace(codes=jax.lax.bitcast_convert_type(bytes_, jnp.uint32))  # type: ignore[union-attr]


def _bytes(codes: Any, dtype: Any) -> Any:
    """Codes of 8 bits, out of their words if they are in words."""
    if codes.dtype != jnp.uint32:
        return codes
    return jax.lax.bitcast_convert_type(codes, dtype).reshape(*codes.shape[:-1], -1)


def selected(codes: jax.Array, table: np.ndarray, first: int = 0) -> jax.Array:
    """table[codes >> first], chosen bit by bit, higher bits left out: 15 selects for 4-bit codes, where a TPU's gather
    takes elements in turn."""
    values: Sequence[Any] = [np.float32(value) for value in table]
    for bit in range(len(values).bit_length() - 1):
        odd = codes & (1 << bit + first) != 0
        values = [jnp.where(odd, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def quantise_4bit(tensor: np.ndarray, kind: Kind, double: bool, matrix: tuple[int, ...]) -> FourBit:
    """One tensor of fp32, fp16 or bf16 in row-major order, as `bitsandbytes.functional.quantize_4bit` has it.

    The leaves are numpy arrays; `matrix` is the shape to be seen in, of as many numbers.
    """
    assert tensor.size == math.prod(matrix), (tensor.shape, matrix)
    flat = tensor.reshape(-1)
    blocks = -(-flat.size // BLOCK)
    codes, absmax = np.zeros((blocks, BLOCK // 2), np.uint8), np.empty(blocks, np.float32)
    whole = flat.size // BLOCK
    for start in range(0, whole, CHUNK // BLOCK):
        part = slice(start, min(start + CHUNK // BLOCK, whole))
        numbers = flat[part.start * BLOCK : part.stop * BLOCK].astype(np.float32).reshape(-1, BLOCK)
        absmax[part] = np.abs(numbers).max(axis=1)
        scaled = numbers * (np.float32(1) / np.maximum(absmax[part], np.float32(1e-38)))[:, None]
        codes[part] = _packed(scaled, kind)
    if rest := flat.size % BLOCK:
        # bitsandbytes divides here, and its zero is 1e-38.
        numbers = flat[-rest:].astype(np.float32)
        absmax[-1] = np.maximum(np.abs(numbers).max(), np.float32(1e-38))
        packed = _packed(np.pad(numbers / absmax[-1], (0, rest % 2)), kind)
        codes[-1, : packed.size] = packed
    if not double:
        return FourBit(codes, absmax, None, None, matrix, kind)
    offset = _mean(absmax)
    return FourBit(codes, *_nested(absmax - offset), np.asarray(offset), matrix, kind)


def quantise_8bit(tensor: np.ndarray, inputs: int) -> EightBit:
    """One tensor (*outputs, *inputs), as bitsandbytes' Linear8bitLt has it: rounded to fp16 first.

    `inputs` is the number of contracted axes; the leaves are numpy arrays.
    """
    outputs = tensor.shape[: tensor.ndim - inputs]
    rows = tensor.reshape(math.prod(outputs), -1).astype(np.float16).astype(np.float32)
    scale = np.abs(rows).max(axis=1)
    # The reciprocal times 127, as torch divides a number by a tensor.
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    rows *= (inverse * np.float32(127))[:, None]
    return EightBit(
        np.rint(rows, out=rows).astype(np.int8).reshape(tensor.shape), scale.reshape(outputs), inputs
    )


def _packed(scaled: np.ndarray, kind: Kind) -> np.ndarray:
    """The codes of numbers in [-1, 1], two a byte; a number halfway goes to the lower value."""
    order = np.argsort(TABLES[kind], kind="stable").astype(np.uint8)
    values = TABLES[kind][order]
    rank, above = np.zeros(scaled.shape, np.uint8), np.empty(scaled.shape, bool)
    for bound in (values[:-1] + values[1:]) / 2:
        np.greater(scaled, bound, out=above)
        rank += above.view(np.uint8)
    codes = rank if kind == "nf4" else order[rank]
    return codes[..., ::2] << 4 | codes[..., 1::2]


def _nested(centred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 codes [blocks], fp32 absmax [ceil(blocks / 256)]) of absmaxes less their mean.

    bitsandbytes' CPU kernel finds the nearest value of the table to within 1/65535, in a table of 65536 codes.
    """
    rows = np.pad(centred, (0, -centred.size % NESTED)).reshape(-1, NESTED)
    absmax = np.abs(rows).max(axis=1)
    inverse = np.divide(np.float32(1), absmax, out=np.zeros_like(absmax), where=absmax > 0)
    place = (np.clip(rows * inverse[:, None], -1, 1) + 1) * np.float32(0.5) * np.float32(65535) + np.float32(
        0.5
    )
    codes = np.where(absmax[:, None] > 0, _nearest()[place.astype(np.uint16)], 0)
    return codes.reshape(-1)[: centred.size].astype(np.uint8), absmax


@cache
def dynamic_table() -> np.ndarray:
    """The 256 values of the dynamic 8-bit type, ascending (arXiv:2110.02861, 2.1).

    For each power of ten from 1e-6 to 1 the middles of 1, 2, .. 64 equal parts of [0.1, 1], with both signs; 0; 1.
    """
    values: list[np.ndarray] = [np.array([0, 1], np.float32)]
    for exponent in range(7):
        count = 2**exponent
        low, step = np.float32(0.1), np.float32(np.float32(0.9) / np.float32(count))
        # The edges as torch.linspace has them: counted from the nearer end, rounded once.
        index = np.arange(count + 1)
        near = np.float64(low) + np.float64(step) * index
        far = 1 - np.float64(step) * (count - index)
        edges = np.where(index < (count + 1) // 2, near, far).astype(np.float32)
        middles = np.float32(10.0 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles]
    return np.sort(np.concatenate(values))


@cache
def _nearest() -> np.ndarray:
    """The code of each of 65536 numbers from -1 to 1."""
    table = dynamic_table()
    numbers = np.float32(-1) + np.arange(65536, dtype=np.float32) * 2 / np.float32(65535)
    return np.searchsorted((table[:-1] + table[1:]) / 2, numbers).astype(np.uint8)


def _mean(x: np.ndarray) -> np.float32:
    """The mean of an fp32 vector, summed in the order of torch's CPU kernel on one thread.

    32 sums run side by side (4 vectors of 8) over rows of 32 numbers, in a cascade of four levels: every `step`
    rows, a level's sum goes up to the next. With several threads torch adds long vectors in another order.
    """
    vectors = x[: x.size // 8 * 8].reshape(-1, 8)
    whole = len(vectors) // 4 * 4
    rows = vectors[:whole].reshape(-1, 32)
    step = 1 << max(4, (len(rows) - 1).bit_length() // 4)
    levels = []
    for _ in range(3):
        steps = len(rows) // step
        levels.append(_added(rows[steps * step :]))
        rows = _added(rows[: steps * step].reshape(steps, step, 32).swapaxes(0, 1))
    sums = _added(np.stack([*levels, _added(rows)])).reshape(4, 8)
    lanes = _added(np.concatenate([sums[:1], vectors[whole:], sums[1:]]))
    return np.float32(_added(np.concatenate([x[vectors.size :], lanes])) / np.float32(x.size))


def _added(terms: np.ndarray) -> np.ndarray:
    """The sum over the first axis, one term after the other: `np.sum` is free to pair them."""
    return reduce(np.add, terms, np.zeros(terms.shape[1:], np.float32))
