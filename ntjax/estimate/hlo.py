"""The text of a compiled program: its computations, and the instructions in them.

https://openxla.org/xla/hlo_dumps
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

SIZES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "token": 0,
    "opaque": 0,
}  # else the number in the type's name, in bits
HEADER = re.compile(r"^(ENTRY )?%?(\S+) (\([^=]*)?.*\{$")
COMMENT = re.compile(r"/\*.*?\*/")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")


@dataclass(frozen=True)
class Instruction:
    """`%name = type opcode(operands), rest`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def bytes(self) -> float:
        """Of its result in the devices' main memory; what XLA put into a memory on the chip (`S(1)`) is free."""
        return sum(size for size, near in arrays(self.type) if not near)

    @property
    def size(self) -> float:
        """Bytes of its result, wherever it is."""
        return sum(size for size, _ in arrays(self.type))

    def called(self, what: str) -> str | None:
        """The computation named after `what=`."""
        found = re.search(rf"{what}=%?([\w.-]+)", self.rest)
        return found[1] if found else None


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Name -> what uses it, through bitcasts."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for one in reversed(self.instructions.values()):
            for name in one.operands:
                if name in found:
                    found[name] += found[one.name] if one.opcode == "bitcast" and found[one.name] else [one]
        return found

    @property
    def root(self) -> Instruction:
        return next(one for one in self.instructions.values() if one.root)


def computations(text: str) -> tuple[dict[str, Computation], str]:
    """Those of a program by name, and the name of the one that a call enters."""
    found: dict[str, Computation] = {}
    entry = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" ") and (header := HEADER.match(line)):
            current = found[header[2]] = Computation(header[2])
            entry = current.name if header[1] else entry
        elif line.startswith("  ") and (one := instruction(line)):
            current.instructions[one.name] = one
    return found, entry


def instruction(line: str) -> Instruction | None:
    """A line of a computation, or None for what isn't an instruction."""
    head, sign, tail = COMMENT.sub("", line).strip().partition(" = ")
    if not sign:
        return None
    type_, rest = _split_type(tail)
    opcode, _, rest = rest.partition("(")
    inside, rest = _closing(rest)
    names = tuple(part.strip().rpartition(" ")[2].lstrip("%") for part in _top_level(inside) if part.strip())
    return Instruction(
        head.removeprefix("ROOT ").lstrip("%"), type_, opcode.strip(), names, rest, head.startswith("ROOT ")
    )


def arrays(type_: str) -> Iterator[tuple[float, bool]]:
    """(bytes, whether they are in a memory on the chip) of every array in a type."""
    for name, dims, layout in ARRAY.findall(type_):
        bits = re.search(r"\d+", name)
        size = SIZES.get(name, int(bits[0]) / 8 if bits else 1)
        near = bool(re.search(r"S\([1-9]", layout))
        yield size * float(np.prod([int(d) for d in dims.split(",") if d])), near


def _split_type(text: str) -> tuple[str, str]:
    if not text.startswith("("):
        head, _, rest = text.partition(" ")
        return head, rest
    inside, rest = _closing(text[1:])
    return inside, rest.lstrip()


def _closing(text: str) -> tuple[str, str]:
    """Up to the parenthesis that closes one opened before, and after it."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:place], text[place + 1 :]
    return text, ""


def _top_level(text: str) -> Sequence[str]:
    """Split at the commas that no bracket is around."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]]
