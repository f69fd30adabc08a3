"""A weight is declared once, by the names of its axes; everything else follows from that line.

    weight(sizes, "embed -> heads head_dim", "model.layers.{layers}.self_attn.q_proj.weight")

says what the weight contracts (left of the arrow) and what it produces (right). No arrow: an embedding table
or an elementwise vector. From it come the shape, the initial scale, the torch tensor it is read from and
written to, the weight-decay mask, the sharding.

Weights are stored as torch stores them, outputs first: `(layers, *outputs, *inputs)`. An `{axis}` in the
Hugging Face name is an axis stacked here that is one tensor per index there. Reading and writing a checkpoint
is then a reshape and never a transpose, quantisation blocks agree with bitsandbytes', and XLA on CPU gets the
layout its matmul wants.

Outside `models/`, the weights of a model are a flat dict `{"blocks.attn.q": array, ...}`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Params = dict[str, Any]  # path -> jax.Array (later: a quantised or adapted weight)
Specs = dict[str, "Spec"]

# Vectors that don't decay; in transformers layer norms are known by their type, the others by name.
_SPARED = re.compile(r"bias|layer_?norm|layrnorm|rmsnorm|(\.|_)norm(\.|$)")


@dataclass(frozen=True)
class Spec:
    """All that is known of a weight before it exists.

    `init` is "normal" (0.02, the Llama family's), "ones" or "zeros". A `kernel` is a convolution's, whose tensor has an
    axis for each input.
    """

    axes: str
    hf: str
    sizes: tuple[tuple[str, int], ...]  # of every axis named, in stored order
    init: str = "normal"
    kernel: bool = False

    @cached_property
    def stacked(self) -> tuple[str, ...]:
        """Axes that are one tensor per index in a Hugging Face checkpoint: ("layers",)."""
        return tuple(re.findall(r"{(\w+)}", self.hf))

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Contracted axes; empty for embeddings, biases and norms."""
        return tuple(self.axes.split("->")[0].split()) if "->" in self.axes else ()

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """Produced axes, or all of them where there is no arrow."""
        return tuple(self.axes.split("->")[-1].split())

    @property
    def names(self) -> tuple[str, ...]:
        """Axis names in stored order: stacked, then outputs, then inputs."""
        return tuple(name for name, _ in self.sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Stored shape."""
        return tuple(size for _, size in self.sizes)

    @property
    def linear(self) -> bool:
        """Whether it is a linear map's, which adapters and quantisation are for; a convolution's kernel isn't."""
        return bool(self.inputs) and not self.kernel

    @property
    def matrix(self) -> tuple[int, ...]:
        """One tensor as the map that it is: (out, in), a kernel's too; the tensor's own shape where there is none."""
        sizes = dict(self.sizes)
        if "->" not in self.axes:
            return tuple(sizes[name] for name in self.outputs)
        sides = [self.outputs, self.inputs] if self.inputs else [self.outputs]
        return tuple(math.prod(sizes[name] for name in side) for side in sides)

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Shape of one tensor in a Hugging Face checkpoint: (out, in) for a linear layer, (out,) for its bias, (out,
        channels, height, width) for a kernel."""
        sizes = dict(self.sizes)
        return (self.matrix[0], *(sizes[name] for name in self.inputs)) if self.kernel else self.matrix

    @property
    def is_matrix(self) -> bool:
        """Whether a tensor has several axes: it is cast to the dtype that is computed in where it is used. Norms and
        biases stay as they are."""
        return len(self.torch_shape) > 1

    def tensors(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """(index into the stacked axes, Hugging Face name) of every tensor this weight is made of."""
        import itertools

        sizes = dict(self.sizes)
        for index in itertools.product(*(range(sizes[name]) for name in self.stacked)):
            yield index, self.hf.format(**dict(zip(self.stacked, index, strict=True)))


def weight(
    sizes: Mapping[str, int], axes: str, hf: str, init: str = "normal", *, kernel: bool = False
) -> nnx.Param:
    """An abstract `nnx.Param` (a shape, no data) carrying its `Spec` as metadata."""
    stacked = re.findall(r"{(\w+)}", hf)
    left, _, right = axes.rpartition("->")
    names = [*stacked, *right.split(), *left.split()]
    spec = Spec(axes, hf, tuple((name, sizes[name]) for name in names), init, kernel)
    return nnx.Param(jax.ShapeDtypeStruct(spec.shape, jnp.float32), spec=spec)


def unused(specs: Specs) -> set[str]:
    """Paths of weights that a model only carries from one checkpoint to the next: nothing reads them."""
    return {path for path in specs if ".unused." in path}


def decays(spec: Spec) -> bool:
    """Whether weight decay applies: to all but biases and norms. Vectors that transformers doesn't know for norms by
    their names (a class embedding, DoRA's lengths, the norms of Qwen2.5-VL's tower) it decays, and so do we."""
    return spec.is_matrix or not _SPARED.search(spec.hf)


def initial(specs: Specs, key: jax.Array, dtype: jnp.dtype = jnp.float32) -> Params:
    """Random weights for training from scratch."""
    keys = jax.random.split(key, len(specs))
    return {path: _draw(spec, k, dtype) for (path, spec), k in zip(sorted(specs.items()), keys, strict=True)}


def _draw(spec: Spec, key: jax.Array, dtype: jnp.dtype) -> jax.Array:
    if spec.init == "normal":
        return (0.02 * jax.random.normal(key, spec.shape)).astype(dtype)
    return {"ones": jnp.ones, "zeros": jnp.zeros}[spec.init](spec.shape, dtype)
