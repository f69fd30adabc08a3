"""How weights lie on a mesh.

One table of rules names the mesh axis of each axis of a weight; the ZeRO stage (arXiv:1910.02054) says what the
devices along `fsdp` share out: 1 the optimizer's state, 2 gradients too, 3 weights too. With `offload` matrices, but
for adapters', lie in the host's memory between uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ntjax.errors import ConfigError
from ntjax.mesh import AXES, FSDP, HOST, SEQUENCE, TENSOR, row_groups
from ntjax.params import Params, Spec, Specs
from ntjax.quantised import EightBit, FourBit, in_words
from ntjax.turned import Turned, turned
from ntjax.weights import Adapted, Flat

# Axis of a weight -> axis of the mesh.
RULES: Mapping[str, str] = {
    "embed": FSDP,
    "vocab": TENSOR,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "mlp": TENSOR,
}


@dataclass(frozen=True)
class Layout:
    """A mesh, the rules by which weights lie on it, the ZeRO stage, and whether weights lie in the host's memory.
    Hashable: a model carries it."""

    mesh: Mesh
    zero: int = 0
    rules: tuple[tuple[str, str], ...] = tuple(RULES.items())
    offload: bool = False

    def __str__(self) -> str:
        """For people: "8 devices", "8 devices: fsdp 4, tensor 2, ZeRO 3"."""
        along = [f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1]
        if self.zero and self.mesh.shape[FSDP] > 1:
            along.append(f"ZeRO {self.zero}")
        if self.offload:
            along.append("weights in the host's memory")
        count = f"{self.mesh.size} device{'s' if self.mesh.size > 1 else ''}"
        return f"{count}: {', '.join(along)}" if along else count

    @property
    def platform(self) -> str:
        """Of the devices, as JAX names it."""
        return self.mesh.devices.flat[0].platform

    @property
    def rows(self) -> int:
        """Into how many parts a batch's rows are split."""
        return row_groups(self.mesh)

    @property
    def sequence(self) -> int:
        """Into how many parts a row's tokens are split."""
        return self.mesh.shape[SEQUENCE]

    @property
    def gathers(self) -> bool:
        """Whether the sampler's weights are a copy of those that are held between steps."""
        return self.offload or (self.zero >= 3 and self.mesh.shape[FSDP] > 1)

    def check(self, specs: Specs, where: Callable[[str], str | None]) -> None:
        """Raises ConfigError at `where(mesh axis)` unless every axis that is split divides evenly."""
        for path, spec in specs.items():
            for name, axis, size in zip(spec.names, self._axes(spec, True), spec.shape, strict=True):
                count = self.mesh.shape[axis] if axis else 1
                if size % count:
                    fits = [n for n in range(1, size + 1) if size % n == 0 and n <= self.mesh.size]
                    raise ConfigError(
                        f"{axis} = {count}: {path} has {size} {name}, which {count} devices can't share evenly",
                        where=where(axis or ""),
                        fix=f'set it to one of {", ".join(map(str, fits))}, or [mesh.rules] {name} = "none"',
                    )

    def axis(self, name: str) -> str | None:
        """The mesh axis that a weight's axis is split over."""
        return self._named((name,), True)[0]

    def partition(self, spec: Spec, *, parted: bool) -> PartitionSpec:
        """Where the axes of a weight lie; the devices along `fsdp` share it out only if it is `parted`."""
        return PartitionSpec(*self._axes(spec, parted))

    def _axes(self, spec: Spec, parted: bool) -> list[str | None]:
        return self._named(spec.names, _worth_sharing(spec) and parted)

    def _named(self, names: tuple[str, ...], parted: bool) -> list[str | None]:
        """The mesh axis of each named one: each is used once, and only if it has more than one device."""
        found: list[str | None] = []
        rules = dict(self.rules)
        for name in names:
            axis = rules.get(name)
            usable = axis in AXES and self.mesh.shape[axis] > 1 and axis not in found
            found.append(axis if usable and (parted or axis != FSDP) else None)
        return found

    def partitions(self, spec: Spec, w: Any, *, parted: bool) -> Any:
        """`partition` of every array that a weight is made of: a tree like `w` of PartitionSpecs."""
        if isinstance(w, Adapted):
            stacked, rank = spec.stacked, int(w.b.shape[-1])
            parts = parted and rank > 1
            magnitude = PartitionSpec(*self._named((*stacked, *spec.outputs), False))
            return w.replace(  # type: ignore[attr-defined]
                base=self.partitions(spec, w.base, parted=parted),
                a=PartitionSpec(*self._named((*stacked, "rank", *spec.inputs), parts)),
                b=PartitionSpec(*self._named((*stacked, *spec.outputs, "rank"), parts)),
                scale=PartitionSpec(),
                magnitude=None if w.magnitude is None else magnitude,
                key=None if w.key is None else PartitionSpec(),
            )
        axes = self._axes(spec, parted)
        if isinstance(w, Flat):
            lead, ends = len(spec.stacked), len(spec.stacked) + len(spec.outputs)
            sides = [tuple(filter(None, side)) or None for side in (axes[lead:ends], axes[ends:])]
            return w.replace(matrix=PartitionSpec(*axes[:lead], *sides))  # type: ignore[attr-defined]
        if isinstance(w, EightBit):
            scale = self._named((*spec.stacked, *spec.outputs), False)
            return w.replace(codes=PartitionSpec(*axes), scale=PartitionSpec(*scale))  # type: ignore[attr-defined]
        if isinstance(w, FourBit):
            return self._of_blocks(spec, w, [axis for axis in (FSDP, TENSOR) if axis in axes])
        return PartitionSpec(*axes)

    def _of_blocks(self, spec: Spec, w: FourBit, axes: list[str]) -> Any:
        """4-bit weights are split by blocks, those that are turned by outputs, as far as these divide; what is nested
        stays whole."""
        lead, count = [None] * len(spec.stacked), w.absmax.shape[-1]
        while axes and count % math.prod(self.mesh.shape[axis] for axis in axes):
            axes = axes[:-1]
        lead += [None, None] if isinstance(w, Turned) else []
        split = PartitionSpec(*lead, tuple(axes) or None)
        return w.replace(  # type: ignore[attr-defined]
            codes=split,
            absmax=split,
            nested=None if w.nested is None else PartitionSpec(),
            offset=None if w.offset is None else PartitionSpec(),
        )

    def placed(self, tree: Any) -> Any:
        """The shardings of a tree of PartitionSpecs."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), tree)

    def shardings(self, params: Params, specs: Specs, *, parted: bool | None = None) -> dict[str, Any]:
        """The shardings of weights as they are held between steps, parted from ZeRO 3 on and in the host's memory if
        they are offloaded; if it is said whether they are `parted`, on the devices."""
        kept, parted = parted is None, self.zero >= 3 if parted is None else parted
        places = {
            path: self.placed(self.partitions(specs[path], w, parted=parted)) for path, w in params.items()
        }
        if not (kept and self.offload):
            return places
        return {path: _moved(place, _far(specs[path], params[path])) for path, place in places.items()}

    def packed(self, spec: Spec, w: Any) -> Any:
        """A weight of a layer, or a stack of them, as it is held: quantised codes in words where they are offloaded,
        4-bit ones turned on TPUs. XLA tiles bytes in one way in the host's memory and in another where it computes, and
        would form all layers' anew, four times as large, to tile those of one."""
        if self.offload:
            return in_words(w, self.mesh.size)
        if isinstance(w, FourBit) and self.platform == "tpu":
            return turned(w, math.prod(w.matrix[-len(spec.inputs) :]))
        return w

    def put(self, params: Params, specs: Specs) -> Params:
        """The weights, as they are held between steps."""
        return jax.device_put(params, self.shardings(params, specs))

    def of_state(self, state: Any, specs: Specs) -> Any:
        """The shardings of an optimizer's state, whose arrays are like the weights they are kept for, or like
        a stack of the Hugging Face tensors those are made of. What is kept of blocks (`ntjax.moments`) is split by
        blocks, where the devices share them evenly."""

        def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
            keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
            spec = next((specs[key] for key in reversed(keys) if key in specs), None)
            axes: list[str | None] = []
            if spec is not None and leaf.shape == spec.shape:
                axes = self._axes(spec, self.zero >= 1)
            elif spec is not None and leaf.shape[1:] == spec.matrix and _worth_sharing(spec):
                stored = dict(zip(spec.names, self._axes(spec, self.zero >= 1), strict=True))
                axes = [None, stored[spec.outputs[0]], stored[spec.inputs[0]]]
            elif spec is not None and getattr(path[-1], "name", "") == "absmax":
                shared = self.zero >= 1 and FSDP in self._axes(spec, True)
                even = leaf.shape[-1] % self.mesh.shape[FSDP] == 0
                axes = [*[None] * (leaf.ndim - 1), FSDP if shared and even else None]
            return NamedSharding(self.mesh, PartitionSpec(*axes))

        return jax.tree_util.tree_map_with_path(place, state)

    def shared(self, gradients: Params, specs: Specs) -> Params:
        """Gradients or updates as the devices share them out, inside a compiled function."""
        if self.zero < 2:
            return gradients
        return {
            path: jax.lax.with_sharding_constraint(
                w, NamedSharding(self.mesh, self.partition(specs[path], parted=True))
            )
            for path, w in gradients.items()
        }

    def gathered(self, params: Params, specs: Specs) -> Params:
        """Weights on the devices with no part of them along `fsdp` missing, inside a compiled function."""
        return jax.lax.with_sharding_constraint(params, self.shardings(params, specs, parted=False))


def placing(layout: Layout, specs: Specs) -> dict[str, Any]:
    """How `hf.folder.load_params` is to leave weights: as they are held between steps."""
    return {
        "sharding": lambda path, shapes: layout.shardings({path: shapes}, specs)[path],
        "packed": lambda path, w: layout.packed(specs[path], w),
    }


def _far(spec: Spec, w: Any) -> Any:
    """Which arrays of a weight lie in the host's memory if it is offloaded: a tree like `w` of bools.

    Adapters, vectors and what is small beside a quantised weight stay: they are little, and would be waited for. So do
    bytes, see `Layout.packed`.
    """
    near = jax.tree.map(lambda _: False, w)
    if isinstance(w, Adapted):
        return near.replace(base=_far(spec, w.base))
    far = _worth_sharing(spec) and "rank" not in spec.names
    if isinstance(w, EightBit | FourBit):
        codes = far and w.codes.dtype == jnp.uint32
        if isinstance(w, EightBit):
            return near.replace(codes=codes)
        return near.replace(codes=codes, absmax=codes and w.absmax.dtype == jnp.float32)
    return far


def _moved(places: Any, far: Any) -> Any:
    """The shardings, those that are `far` in the host's memory."""
    return jax.tree.map(lambda place, far: place.with_memory_kind(HOST) if far else place, places, far)


def _worth_sharing(spec: Spec) -> bool:
    """Vectors and single rows are not worth sharing out."""
    return len(spec.matrix) == 2 and min(spec.matrix) > 1
