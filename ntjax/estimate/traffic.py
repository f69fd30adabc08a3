"""What a compiled program moves, read off its text: bytes of memory, and collectives with their bytes.

XLA's own `cost_analysis` counts the body of a loop once. Here a body counts as often as the loop goes round, where its
condition compares a counter with a constant, and once where what ends it is data (a step of decoding). What of an
operand is read follows XLA's HloCostAnalysis.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ntjax.estimate.flops import at_most
from ntjax.estimate.hlo import Computation, Instruction, arrays, computations

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Names for what is there already, and loops, whose bodies are looked at by themselves.
NOTHING = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id"}
NOTHING |= {"while", "call", "conditional", "iota", "replica-id", "opt-barrier"}
READS_PART = {"dynamic-slice", "gather"}
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
CALLED = re.compile(r"(?:calls|to_apply|branch_computations)=(?:\{([^}]*)\}|%?([\w.-]+))")


@dataclass(frozen=True)
class Collective:
    """One that all devices take part in, `times` a call: `bytes` of its larger side on a device, within groups of
    `group` devices, the first of which is `members`."""

    kind: str
    bytes: float
    times: int
    members: tuple[int, ...]

    @property
    def group(self) -> int:
        """Devices that take part together."""
        return len(self.members)

    @property
    def moved(self) -> float:
        """Bytes that a device sends, all times together, in rings (Chan et al. 2007, Concurrency 19:1749)."""
        n = self.group
        share = 1.0 if self.kind == "collective-permute" else (n - 1) / n
        return self.times * self.bytes * share * (2 if self.kind == "all-reduce" else 1)


class Program:
    """A compiled program's text."""

    def __init__(self, text: str):
        self.computations, self.entry = computations(text)

    def walk(self, name: str | None = None, times: int = 1) -> Iterator[tuple[Computation, Instruction, int]]:
        """Every instruction that isn't inside a fusion, with how often a call runs it."""
        computation = self.computations[name or self.entry]
        for one in computation.instructions.values():
            yield computation, one, times
            if one.opcode == "while":
                body, condition = one.called("body"), one.called("condition")
                assert body is not None
                assert condition is not None
                yield from self.walk(body, times * self.trips(one, condition))
            elif one.opcode in ("call", "conditional", "async-start"):
                for several, single in CALLED.findall(one.rest):
                    for inner in (several or single).replace("%", "").split(","):
                        yield from self.walk(inner.strip(), times)

    def trips(self, loop: Instruction, condition: str) -> int:
        """How often a loop goes round, at most where data end it and its scope says that; else it counts once."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        inside = self.computations[condition].instructions
        root = self.computations[condition].root
        if root.opcode == "fusion":
            inner = self.computations[root.called("calls") or ""]
            outer, root = root, inner.root
            inside = inside | inner.instructions
            given = dict(zip([o.name for o in _parameters(inner)], outer.operands, strict=True))
        else:
            given = {}
        if root.opcode != "compare":
            return at_most(loop.rest)
        constants = [inside[given.get(name, name)] for name in root.operands]
        found = [int(c.operands[0]) for c in constants if c.opcode == "constant" and c.operands[0].isdigit()]
        return found[0] if found else at_most(loop.rest)

    @cached_property
    def bytes(self) -> float:
        """Of main memory that a device reads and writes in a call."""
        return sum(times * self._moved(where, one) for where, one, times in self.walk())

    @cached_property
    def cycles(self) -> int:
        """Of a TPU's core in a call, as XLA reckons for all but hand-written kernels and collectives; 0 elsewhere."""
        return sum(
            times * int(found[1]) for _, one, times in self.walk() if (found := CYCLES.search(one.rest))
        )

    def _moved(self, where: Computation, one: Instruction) -> float:
        if one.opcode in NOTHING or one.opcode.endswith("-done"):
            return 0.0
        inputs = [where.instructions[name] for name in one.operands if name in where.instructions]
        if one.opcode == "slice-start":  # its result is a tuple of the whole, the part, and a token
            part, near = list(arrays(one.type))[1]
            return part if near else 2 * part
        if one.opcode.endswith("-start"):  # a tuple of both sides
            return one.bytes
        if one.opcode in READS_PART:
            return 2 * one.bytes
        if one.opcode == "dynamic-update-slice":
            return 2 * inputs[1].bytes
        inner = self.computations.get(one.called("calls") or "")
        if one.opcode != "fusion" or inner is None:
            return one.bytes + sum(x.bytes for x in inputs)
        read = 0.0
        for given, inside in zip(inputs, _parameters(inner), strict=False):
            read += min(given.bytes, self._read(inner, inside.name))
        return read + min(one.bytes, self._written(inner, inner.root))

    def _read(self, inner: Computation, name: str) -> float:
        """Bytes that a fusion reads of a parameter: parts of it, or all; nothing of what it writes into."""
        total = 0.0
        for user in inner.users[name]:
            nested = self.computations.get(user.called("calls") or "")
            if nested is not None and nested.root.opcode == "copy" and not user.root:
                total += self._read(inner, user.name)  # tiled anew on the way, as far as it is read
            elif user.opcode == "fusion" and nested is not None:
                names = [inside.name for inside in _parameters(nested)]
                places = [place for place, given in enumerate(user.operands) if given == name]
                total += sum(self._read(nested, names[place]) for place in places) if places else math.inf
            elif user.opcode in READS_PART and _first(inner, user) == name:
                total += user.size
            elif user.opcode != "dynamic-update-slice" or _first(inner, user) != name:
                return math.inf
        return total

    def _written(self, inner: Computation, one: Instruction) -> float:
        """Bytes that a fusion writes: of an array that it updates in place, the part alone."""
        nested = self.computations.get(one.called("calls") or "")
        if one.opcode == "fusion" and nested is not None:
            return self._written(nested, nested.root)
        if one.opcode == "tuple":
            return sum(self._written(inner, inner.instructions[name]) for name in one.operands)
        if one.opcode == "bitcast":
            return self._written(inner, inner.instructions[one.operands[0]])
        if one.opcode == "dynamic-update-slice":
            return inner.instructions[one.operands[1]].size
        return one.bytes

    @cached_property
    def collectives(self) -> list[Collective]:
        """All of them, fused ones too. One that a TPU spreads over several fusions (`chain_id`) is there once."""
        found, chains = [], set()
        for where, one, times in self._with_fused():
            kind = one.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            if chain := re.search(r'chain_id="(\d+)"', one.rest):
                if chain[1] in chains:
                    continue
                chains.add(chain[1])
            inputs = [where.instructions[name].size for name in one.operands if name in where.instructions]
            sides = [array for array, _ in arrays(one.type)] if one.opcode.endswith("-start") else [one.size]
            members = _members(one.rest)
            if len(members) > 1:
                larger = max([*sides, sum(inputs)])
                # A TPU's reduce-scatter is a fusion around an all-reduce.
                scatters = kind == "all-reduce" and "reduce-scatter" in where.name
                found.append(Collective("reduce-scatter" if scatters else kind, larger, times, members))
        return found

    def _with_fused(self) -> Iterator[tuple[Computation, Instruction, int]]:
        for where, one, times in self.walk():
            inner = self.computations.get(one.called("calls") or "")
            yield where, one, times
            if one.opcode == "fusion" and inner is not None:
                yield from ((inner, fused, times) for fused in inner.instructions.values())

    @cached_property
    def kernels(self) -> dict[str, int]:
        """Calls of hand-written kernels in the text: name -> how many."""
        found: dict[str, int] = {}
        for computation in self.computations.values():
            for one in computation.instructions.values():
                if one.opcode == "custom-call" and (name := _kernel(one)):
                    found[name] = found.get(name, 0) + 1
        return found


def _parameters(computation: Computation) -> list[Instruction]:
    found = [one for one in computation.instructions.values() if one.opcode == "parameter"]
    return sorted(found, key=lambda one: int(one.operands[0]))


def _first(inner: Computation, one: Instruction) -> str:
    """The name of the first operand, seen through bitcasts."""
    name = one.operands[0]
    while (found := inner.instructions.get(name)) is not None and found.opcode == "bitcast":
        name = found.operands[0]
    return name


def _members(rest: str) -> tuple[int, ...]:
    """The first group of devices, from its list or one of its short forms: `[groups,size]<=[shape]T(order)`, or axes of
    a mesh, `mesh['a'=4,'b'=2] {'b'}`, of which `'a':(2)2` takes two devices after leaving out a factor of two."""
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", rest):
        return tuple(int(number) for number in listed[1].split(","))
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        numbers = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        chosen = {}
        for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[2]):
            outer, inner = int(before or 1), int(size or sizes[name])
            after = sizes[name] // outer // inner
            chosen[name] = slice(0, inner * after, after)
        return tuple(numbers[tuple(chosen.get(name, 0) for name in sizes)].ravel().tolist())
    short = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if short is None:
        return ()
    shape = [int(size) for size in short[3].split(",")]
    numbers = np.arange(np.prod(shape)).reshape(shape)
    if short[4]:
        numbers = numbers.transpose([int(axis) for axis in short[4].split(",")])
    return tuple(numbers.reshape(int(short[1]), int(short[2]))[0].tolist())


def _kernel(one: Instruction) -> str | None:
    target = re.search(r'custom_call_target="([^"]*)"', one.rest)
    if target is None:
        return None
    if "fmha" in target[1]:
        return "cudnn"
    if target[1] == "tpu_custom_call":
        return "splash" if one.name.startswith("splash") else "pallas"
    return None
