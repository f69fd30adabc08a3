"""FLOPs of a function, counted through its jaxpr: loops as often as they go round, the matmuls of all else alone.

Elementwise work is left out: it is paid for in bytes of memory. Attention's matmuls are counted apart, since half of
them are masked out, and kernels pass these over.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr

ATTENTION = re.compile(r"\battention\b")  # the scope that `ops.attention` gives its part of a program

TIMES = re.compile(r"\bat_most_(\d+)_times\b")


@dataclass(frozen=True)
class Flops:
    """Of one device: `dense` of products with weights, `attention` of those with keys and values, nothing skipped."""

    dense: float = 0.0
    attention: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.dense + other.dense, self.attention + other.attention)

    def __mul__(self, times: float) -> Flops:
        return Flops(self.dense * times, self.attention * times)


def flops(jaxpr: ClosedJaxpr | Jaxpr, devices: int, inside: bool = False) -> Flops:
    """FLOPs of one of `devices` that share the work of `jaxpr` evenly. A loop that data end counts as often as its
    scope says it goes round at most, else once.

    Inside of a `shard_map` shapes are a device's own along the axes it is written for. `inside` says that all of it
    is attention's.
    """
    total = Flops()
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        attends = inside or bool(ATTENTION.search(str(eqn.source_info.name_stack)))
        name = eqn.primitive.name
        if name == "dot_general":
            work = _dot(eqn) / devices
            total += Flops(attention=work) if attends else Flops(dense=work)
        elif name == "cond":
            branches = [flops(branch, devices, attends) for branch in eqn.params["branches"]]
            total += max(branches, key=lambda work: work.dense + work.attention)
        else:
            share, times = devices, 1
            if name == "shard_map":
                mesh, manual = eqn.params["mesh"], eqn.params["newly_manual_axes"]
                share = devices // math.prod(mesh.shape[axis] for axis in manual)
            elif name == "scan":
                times = eqn.params["length"]
            elif name == "while":
                times = at_most(str(eqn.source_info.name_stack))
            for inner in _jaxprs(eqn.params):
                total += flops(inner, share, attends) * times
    return total


def at_most(scopes: str) -> int:
    """How often a loop inside of such scopes goes round at most, as far as they say (`ops.logprobs`); else 1."""
    found = TIMES.findall(scopes)
    return int(found[-1]) if found else 1


def _jaxprs(params: dict[str, Any]) -> Iterator[ClosedJaxpr | Jaxpr]:
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr | Jaxpr):
                yield one


def _dot(eqn: Any) -> float:
    """2 x the result's elements x the contracted elements of each."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left, out = eqn.invars[0].aval, eqn.outvars[0].aval
    return 2.0 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracted)
