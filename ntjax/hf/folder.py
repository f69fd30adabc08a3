"""A checkpoint to the weights of a model and back, tensor by tensor.

What a `Spec` declares must all be in the checkpoint, in its shape, and the checkpoint must hold nothing else:
nothing is initialised at random because a name was missed, and nothing trained is dropped without a word.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from ntjax.errors import BadData, ConfigError, InputMissing, Refused
from ntjax.hf.bnb import Prequantised
from ntjax.hf.files import LARGEST_FILE, Layout, Source, exported_config, read_json, to_json
from ntjax.hf.flax_msgpack import EMBEDDING, LAYER_NORM, LINEAR, PLAIN, FlaxMsgpack, write_flax
from ntjax.hf.gguf_file import GGUF
from ntjax.hf.names import FAMILIES, Renamed, in_file
from ntjax.hf.shards import Safetensors, write_safetensors
from ntjax.mesh import on_device
from ntjax.params import Params, Spec, Specs
from ntjax.weights import dense

# (path, shapes of the arrays a weight is made of) -> where they lie: a sharding, or a tree of them
Placing = Callable[[str, Any], Any]
Quantise = Callable[[str, np.ndarray], Any]  # (path, a tensor) -> the same quantised, or None

# Computed from config.json, and saved all the same by old versions of transformers.
HARMLESS = (r"rotary_emb\.inv_freq$", r"embeddings\.position_ids$")


def open_weights(path: Path) -> Source:
    """The checkpoint in a folder (safetensors, else Flax msgpack), or in a GGUF file, under the names of transformers'
    modules.

    Raises:
        InputMissing: no weights, or a file of the index isn't there. Refused: only pickled weights.
        BadData: a file isn't what its name says, or is cut short.
    """
    if path.is_file():
        return GGUF(path)
    for stem, kind in (("model.safetensors", Safetensors), ("flax_model.msgpack", FlaxMsgpack)):
        if (path / stem).exists() or (path / f"{stem}.index.json").exists():
            config = read_json(path / "config.json") if (path / "config.json").exists() else {}
            weights: Source = kind(path)
            if (family := config.get("model_type")) in FAMILIES:
                weights = Renamed(weights, family)
            return Prequantised(weights) if "quantization_config" in config else weights
    found = sorted(file.name for file in path.iterdir()) if path.is_dir() else []
    if pickles := [name for name in found if name.endswith((".bin", ".pt", ".pth"))]:
        raise Refused(
            f"the weights are only there as {pickles[0]}, a pickle, which can run code when opened",
            where=str(path),
            fix="where you trust it and have torch, convert it once: transformers' "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW) writes safetensors",
        )
    raise InputMissing(
        f"no model.safetensors, no flax_model.msgpack, nor an index of either; there is {found or 'nothing'}",
        where=str(path),
        fix="name the folder that holds the model's weights",
    )


def check(source: Source, specs: Specs, ignore: Sequence[str] = HARMLESS) -> None:
    """Raises BadData unless the checkpoint holds just the tensors that `specs` declare, in their shapes.

    A tied model's `lm_head.weight` may be there too if it equals the embedding: one weight, saved twice. If
    it differs, it was trained on its own, and dropping it would make another model.
    """
    wanted = {name: spec.torch_shape for spec in specs.values() for _, name in spec.tensors()}
    there = source.names()
    harmless = {name for name in there if any(re.search(pattern, name) for pattern in ignore)}
    faults = [f"{name} is missing" for name in wanted if name not in there]
    faults += [
        f"{name} in {source.file(name).name} is {source.shape(name)}, the model's is {shape}"
        for name, shape in wanted.items()
        if name in there and source.shape(name) != shape
    ]
    faults += [
        fault
        for name in sorted(there - wanted.keys() - harmless)
        if (fault := _unwanted(source, name, wanted.keys()))
    ]
    if faults:
        shown = faults[:8] + ([f"and {len(faults) - 8} more"] if len(faults) > 8 else [])
        raise BadData(
            "\n    ".join(["the weights are not those of the model in config.json:", *shown]),
            where=str(source.path),
            fix="name a folder whose config.json and weights belong together",
        )


def _unwanted(source: Source, name: str, wanted: Collection[str]) -> str | None:
    """What is wrong with a tensor that no weight asks for."""
    tables = [table for table in wanted if table.endswith("embed_tokens.weight") and table in source.names()]
    if name != "lm_head.weight" or not tables:
        return f"{name} in {source.file(name).name} is no weight of the model"
    table = tables[0]
    if source.shape(name) == source.shape(table) and np.array_equal(source.read(name), source.read(table)):
        return None
    return f"{name} differs from {table}, although tie_word_embeddings is true"


def load_params(
    source: Source | Path,
    specs: Specs,
    *,
    dtype: str,
    dtypes: Mapping[str, str] | None = None,
    sharding: Placing | None = None,
    ignore: Sequence[str] = HARMLESS,
    quantise: Quantise | None = None,
    packed: Callable[[str, Any], Any] = lambda path, node: node,
) -> Params:
    """The weights that `specs` declare, in `dtype` or what `dtypes` has for their path, each where
    `sharding(path, shapes)` says: a sharding, or, for a quantised weight, a tree like that of its arrays' shapes.

    Each tensor is read, quantised where `quantise(path, tensor)` says so (it gives a node, or None for a weight that
    stays as it is), laid out by `packed(path, node)`, sent to the devices and written into its place in the stacked
    weight there, so that the host holds one at a time. The largest tensors go first, when least is allocated beside
    them. Weights that lie in the host's memory are put together on the devices one by one. On several hosts each one
    reads what its devices hold.

    Raises BadData as `check` does, and what `open_weights` raises.
    """
    source = open_weights(source) if isinstance(source, Path) else source
    check(source, specs, ignore)
    params: Params = {}
    for path, spec in sorted(specs.items(), key=lambda item: -math.prod(item[1].torch_shape)):
        kind = jnp.dtype((dtypes or {}).get(path, dtype))
        params[path] = _load(source, path, spec, kind, sharding, quantise, packed)
    return {path: params[path] for path in specs}


def _load(
    source: Source,
    path: str,
    spec: Spec,
    dtype: jnp.dtype,
    sharding: Placing | None,
    quantise: Quantise | None,
    packed: Callable[[str, Any], Any],
) -> Any:
    stacked = len(spec.stacked)
    lead, shape = spec.shape[:stacked], spec.shape[stacked:]
    weight: Any = None
    places: Any = None
    held: Any = None
    names = [name for _, name in spec.tensors()]
    # A stack of layers is quantised as a whole or not at all, and a checkpoint may leave out some of them.
    plain = isinstance(source, Prequantised) and not all(map(source.quantised, names))
    for index, name in spec.tensors():
        tensor = packed(path, _read(source, name, shape, dtype, path, quantise, plain=plain))
        if weight is None:
            given = dtype if isinstance(tensor, np.ndarray) else None
            shapes = jax.tree.map(
                lambda x, given=given: jax.ShapeDtypeStruct((*lead, *x.shape), given or x.dtype), tensor
            )
            held = sharding(path, shapes) if sharding else None
            places = jax.tree.map(on_device, held)
            weight = _over(places, lambda at, x: _zeros(x.shape, x.dtype, at), shapes)
        at = np.array(index, np.int32)
        tensor = _over(places, lambda at, x: _placed(x, stacked, at), tensor)
        weight = _over(places, lambda where, x, part, at=at: _write(x, part, at, where), weight, tensor)
        jax.block_until_ready(weight)  # or tensors queue up faster than they are written
    return weight if held is None else jax.device_put(weight, held)


def _over(places: Any, function: Callable[..., Any], *weights: Any) -> Any:
    """`function(sharding or None, *arrays)` of each array that weights are made of."""
    if places is None or isinstance(places, Sharding):
        return jax.tree.map(lambda *arrays: function(places, *arrays), *weights)
    return jax.tree.map(function, places, *weights)


def _read(
    source: Source,
    name: str,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    path: str,
    quantise: Quantise | None,
    *,
    plain: bool,
) -> Any:
    """One tensor: an array, or a quantised weight that the checkpoint has, unless it is to be `plain`, or `quantise`
    makes."""
    if isinstance(source, Prequantised) and not plain and (node := source.node(name, shape)) is not None:
        return node
    tensor = source.read(name).reshape(shape)
    node = quantise(path, tensor.astype(dtype)) if quantise else None
    return tensor if node is None else node


@partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, sharding: Sharding | None) -> jax.Array:
    return _constrained(jnp.zeros(shape, dtype), sharding)


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def _write(weight: jax.Array, tensor: jax.Array, index: jax.Array, sharding: Sharding | None) -> jax.Array:
    """`weight` with `tensor` at `index` of its stacked axes, in place."""
    stacked = weight.ndim - tensor.ndim
    start = (*index, *(0,) * tensor.ndim)
    tensor = tensor.astype(weight.dtype).reshape((1,) * stacked + tensor.shape)
    return _constrained(jax.lax.dynamic_update_slice(weight, tensor, start), sharding)


def _constrained(x: jax.Array, sharding: Sharding | None) -> jax.Array:
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def _placed(tensor: np.ndarray, stacked: int, sharding: Sharding | None) -> jax.Array | np.ndarray:
    """One tensor on the devices, each getting the part that its share of the stacked weight needs."""
    if not isinstance(sharding, NamedSharding):
        return tensor
    part = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[stacked:]))
    return jax.make_array_from_callback(tensor.shape, part, lambda index: tensor[index])


def save_params(
    folder: Path,
    params: Params,
    specs: Specs,
    *,
    dtype: str,
    config: Mapping[str, Any],
    max_shard_bytes: int = LARGEST_FILE,
) -> None:
    """Writes what transformers' `from_pretrained(folder)` loads: config.json, safetensors in `dtype`.

    One tensor is on the host at a time, and the files appear together or not at all. On several hosts all
    must call this; the first one writes.
    """
    tensors = Tensors(params, specs, dtype, config.get("model_type"))
    write_safetensors(
        folder,
        tensors.layouts,
        tensors.read,
        extra={"config.json": to_json(exported_config(config, dtype))},
        max_shard_bytes=max_shard_bytes,
        discard=jax.process_index() != 0,
    )


def save_flax(
    folder: Path,
    params: Params,
    specs: Specs,
    *,
    dtype: str,
    config: Mapping[str, Any],
    max_shard_bytes: int = LARGEST_FILE,
) -> None:
    """The same as flax_model.msgpack, in the layout of transformers 4's Flax models, none of which had convolutions.

    Raises ConfigError for a model that has.
    """
    if any(spec.kernel for spec in specs.values()):
        raise ConfigError(
            f"transformers never had {config.get('model_type')} in Flax", where="--format", fix="leave it out"
        )
    tensors = Tensors(params, specs, dtype)
    write_flax(
        folder,
        tensors.layouts,
        flax_kinds(specs),
        tensors.read,
        extra={"config.json": to_json(exported_config(config, dtype))},
        max_shard_bytes=max_shard_bytes,
        discard=jax.process_index() != 0,
    )


def flax_kinds(specs: Specs) -> dict[str, str]:
    """What Flax calls the `weight` of each torch name: kernel, embedding, scale or weight."""
    specs_by_name = {name: spec for spec in specs.values() for _, name in spec.tensors()}

    def kind(name: str, spec: Spec) -> str:
        if spec.inputs:
            return LINEAR
        if len(spec.torch_shape) == 2:
            return EMBEDDING
        return LAYER_NORM if name.removesuffix("weight") + "bias" in specs_by_name else PLAIN

    return {name: kind(name, spec) for name, spec in specs_by_name.items()}


class Tensors:
    """The torch tensors that `params` are made of, layer by layer, each fetched when it is read. Names are those in the
    files of a `model_type`, by default those of modules."""

    def __init__(self, params: Params, specs: Specs, dtype: str, model_type: object = None):
        assert params.keys() == specs.keys(), params.keys() ^ specs.keys()
        self._params, self._specs = params, specs
        places = ((in_file(name, model_type), place) for name, place in self._all())
        self._places = dict(sorted(places, key=lambda item: by_number(item[0])))
        shapes = {name: specs[path].torch_shape for name, (path, _) in self._places.items()}
        self.layouts = {name: Layout(shape, jnp.dtype(dtype)) for name, shape in shapes.items()}

    def _all(self) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
        for path, spec in self._specs.items():
            for index, name in spec.tensors():
                yield name, (path, index)

    def read(self, name: str) -> np.ndarray:
        path, index = self._places[name]
        weight = self._params[path]
        assert weight.shape == self._specs[path].shape, path
        placed = jax.tree.leaves(weight)[0].sharding
        everywhere = None
        if isinstance(placed, NamedSharding):
            everywhere = NamedSharding(placed.mesh, PartitionSpec())
        return np.asarray(_take(weight, np.array(index, np.int32), self.layouts[name], everywhere))


@partial(jax.jit, static_argnums=(2, 3))
def _take(weight: Any, index: jax.Array, layout: Layout, sharding: Sharding | None) -> jax.Array:
    """The tensor at `index` of the stacked axes, in torch's shape: dequantised, its adapter merged."""
    one = jax.tree.map(lambda leaf: leaf[tuple(index)], weight)
    return _constrained(dense(one, layout.dtype).reshape(layout.shape), sharding)


def by_number(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
