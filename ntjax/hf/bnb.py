"""Checkpoints that bitsandbytes has quantised, as transformers saves them.

Beside a 4-bit `X.weight` (bytes, two codes each) stand `X.weight.absmax`, `X.weight.quant_map`, with double
quantisation `X.weight.nested_absmax` and `X.weight.nested_quant_map`, and `X.weight.quant_state.bitsandbytes__nf4`,
whose bytes are JSON: shape, dtype, block sizes, the mean of the absmaxes. Beside an int8 `X.weight` stand `X.SCB`,
the largest magnitude of each row, and `X.weight_format`, 0 for row-major. Codes are taken as they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntjax.errors import BadData, ConfigError
from ntjax.hf.files import Source
from ntjax.quantised import BLOCK, NESTED, TABLES, EightBit, FourBit, dynamic_table

STATE = ".quant_state.bitsandbytes__"
FIX = "quantise again with bitsandbytes' defaults, or name the unquantised model and set load_in_4bit"


@dataclass(frozen=True)
class Settings:
    """What a config.json's `quantization_config` says of its checkpoint."""

    bits: int  # 4 or 8
    kind: str | None  # "nf4", "fp4"; None for 8 bits
    double: bool


def read_settings(config: Mapping[str, Any], where: str = "config.json") -> Settings | None:
    """How bitsandbytes quantised the checkpoint; None for one that isn't quantised.

    Raises ConfigError: quantised by something else, to another type, or not a whole block of settings.
    """
    block = config.get("quantization_config")
    if block is None:
        return None
    fix = "name the unquantised model; load_in_4bit and load_in_8bit quantise it on the way in"
    if not isinstance(block, dict):
        raise ConfigError(f"quantization_config is {block!r}, not an object", where=where, fix=fix)
    # Before it was named, bitsandbytes was the only method there was.
    four, eight = bool(block.get("load_in_4bit")), bool(block.get("load_in_8bit"))
    method = block.get("quant_method", "bitsandbytes" if four or eight else "unknown")
    if method != "bitsandbytes":
        raise ConfigError(
            f"the weights are quantised with {method}; what is read is bitsandbytes' (nf4, fp4, int8)",
            where=where,
            fix=fix,
        )
    if four == eight:
        raise ConfigError(
            f"quantization_config has load_in_4bit = {four} and load_in_8bit = {eight}; one of them is true",
            where=where,
            fix=fix,
        )
    if eight:
        return Settings(8, None, False)
    kind = block.get("bnb_4bit_quant_type", "fp4")
    if kind not in TABLES:
        raise ConfigError(
            f"bnb_4bit_quant_type is {kind!r}; allowed are {', '.join(TABLES)}", where=where, fix=fix
        )
    return Settings(4, kind, bool(block.get("bnb_4bit_use_double_quant", False)))


class Prequantised:
    """A checkpoint of bitsandbytes' seen as the one it stands for; a `Source`.

    What is not quantised passes through. `node` gives the quantised weights as they are.

    Raises BadData: a tensor's parts don't fit together, or it is quantised in a way that isn't read.
    """

    def __init__(self, source: Source):
        self._source = source
        there = source.names()
        self._states = {name.partition(STATE)[0]: name for name in there if STATE in name}
        self._eight = {name for name in there if name.endswith(".weight") and _scale(name) in there}
        parts = {part for name in there for part in (*_parts(name), name + "_format")}
        self._names = there - parts - set(self._states.values()) - {_scale(name) for name in self._eight}
        for name in sorted(self._names):
            self._check_whole(name)
        self._headers = {name: self._header(name) for name in self._states}

    @property
    def path(self) -> Path:
        return self._source.path

    def names(self) -> set[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._headers[name]["shape"]) if name in self._states else self._source.shape(name)

    def dtype(self, name: str) -> np.dtype:
        """What was quantised; fp32 for int8, which bitsandbytes doesn't note it for."""
        if name in self._states:
            return jnp.dtype(self._headers[name]["dtype"])
        return np.dtype(np.float32) if name in self._eight else self._source.dtype(name)

    def read(self, name: str) -> np.ndarray:
        node = self.node(name, self.shape(name))
        return self._source.read(name) if node is None else np.asarray(_dense(node, self.dtype(name)))

    def file(self, name: str) -> Path:
        return self._source.file(name)

    def quantised(self, name: str) -> bool:
        """Whether `node` has one for it."""
        return name in self._states or name in self._eight

    def node(self, name: str, matrix: tuple[int, ...]) -> FourBit | EightBit | None:
        """The quantised tensor seen as (*outputs, *inputs), leaves in numpy; None for one that isn't quantised."""
        if name in self._states:
            return self._four_bit(name, matrix)
        return self._eight_bit(name, matrix) if name in self._eight else None

    def _four_bit(self, name: str, matrix: tuple[int, ...]) -> FourBit:
        header, size = self._headers[name], math.prod(matrix)
        kind, blocks = header["quant_type"], -(-size // BLOCK)
        # `bnb_4bit_quant_storage` may call the bytes floats.
        packed = self._source.read(name).reshape(-1).view(np.uint8)
        self._fits(name, name, packed.size, -(-size // 2))
        codes = np.pad(packed, (0, blocks * BLOCK // 2 - packed.size)).reshape(blocks, BLOCK // 2)
        absmax = self._part(name, "absmax", blocks)
        self._table(name, "quant_map", TABLES[kind])
        if "nested_offset" not in header:
            return FourBit(codes, absmax, None, None, matrix, kind)
        self._table(name, "nested_quant_map", dynamic_table())
        nested = self._part(name, "nested_absmax", -(-blocks // NESTED))
        offset = np.asarray(header["nested_offset"], np.float32)
        return FourBit(codes, absmax, nested, offset, matrix, kind)

    def _eight_bit(self, name: str, matrix: tuple[int, ...]) -> EightBit:
        codes, scale = self._source.read(name), self._source.read(_scale(name))
        self._fits(name, name, codes.size, math.prod(matrix))
        # There is a scale a row, so their number says which axes are the outputs.
        sizes = [math.prod(matrix[:count]) for count in range(len(matrix) + 1)]
        self._allowed(name, f"the size of {_scale(name)}", scale.size, sizes[1:-1])
        outputs = sizes.index(scale.size)
        scale = scale.astype(np.float32).reshape(matrix[:outputs])
        return EightBit(codes.reshape(matrix), scale, len(matrix) - outputs)

    def _header(self, name: str) -> dict[str, Any]:
        """The JSON of a 4-bit tensor, checked."""
        try:
            header = json.loads(self._source.read(self._states[name]).tobytes())
            kind, block, dtype = header["quant_type"], header["blocksize"], header["dtype"]
            numbers = [*header["shape"], header.get("nested_offset", 0.0)]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self._bad(name, f"{self._states[name]} isn't bitsandbytes' JSON") from None
        if not all(isinstance(number, int | float) for number in numbers):
            raise self._bad(name, f"{self._states[name]} has {numbers} for its shape and nested_offset")
        self._allowed(name, "blocksize", block, [BLOCK])
        self._allowed(name, "nested_blocksize", header.get("nested_blocksize", NESTED), [NESTED])
        self._allowed(name, "quant_type", kind, list(TABLES))
        self._allowed(name, "dtype", dtype, ["float32", "float16", "bfloat16"])
        wanted = _parts(name)[: 4 if "nested_offset" in header else 2]
        if missing := [part for part in wanted if part not in self._source.names()]:
            raise self._bad(name, f"{missing[0]} is missing")
        return header

    def _check_whole(self, name: str) -> None:
        """Raises BadData for codes without what they mean, or in another layout."""
        there, layout = self._source.names(), name + "_format"
        if name not in self._states and any(part in there for part in _parts(name)):
            raise self._bad(name, f"{name}{STATE}nf4 (or fp4) is missing")
        if layout in there and name not in self._eight:
            raise self._bad(name, f"{_scale(name)} is missing")
        if layout in there and (found := self._source.read(layout).tolist()) != 0:
            raise self._bad(name, f"{layout} is {found}; allowed is 0, row-major")

    def _part(self, name: str, part: str, size: int) -> np.ndarray:
        array = self._source.read(f"{name}.{part}").reshape(-1)
        self._fits(name, f"{name}.{part}", array.size, size)
        return array

    def _table(self, name: str, part: str, table: np.ndarray) -> None:
        """Raises BadData unless the file's values are the known ones; the last bit may be another machine's."""
        found = self._source.read(f"{name}.{part}").reshape(-1)
        if found.shape != table.shape or not np.allclose(found, table, rtol=1e-6, atol=0):
            raise self._bad(name, f"{name}.{part} isn't the table of values that bitsandbytes has")

    def _fits(self, name: str, part: str, found: int, wanted: int) -> None:
        if found != wanted:
            raise self._bad(name, f"{part} holds {found} numbers where the weight's shape wants {wanted}")

    def _allowed(self, name: str, what: str, found: object, allowed: Iterable[object]) -> None:
        if found not in allowed:
            raise self._bad(name, f"{what} is {found}; allowed is {' or '.join(map(str, allowed))}")

    def _bad(self, name: str, message: str) -> BadData:
        return BadData(f"{name}: {message}", where=str(self.file(name)), fix=FIX)


def _parts(name: str) -> tuple[str, ...]:
    """What stands beside the codes of a 4-bit tensor; the last two with double quantisation."""
    parts = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    return tuple(f"{name}.{part}" for part in parts)


def _scale(name: str) -> str:
    """What stands beside the codes of an int8 tensor."""
    return name.removesuffix("weight") + "SCB"


@partial(jax.jit, static_argnums=1)
def _dense(node: FourBit | EightBit, dtype: np.dtype) -> jax.Array:
    return node.dense(dtype)
