"""Hugging Face Flax checkpoints (flax_model.msgpack) in and out, one tensor at a time.

The names differ from torch's by a rule: a linear layer's `weight` (out, in) is a `kernel` (in, out), an
embedding's `weight` an `embedding`, a LayerNorm's `weight` (the one beside a bias) a `scale`; an RMSNorm's
stays `weight`. Between the parts of a name stands a level of the tree, "/" in the index.
(transformers 4, modeling_flax_pytorch_utils.py: rename_key_and_reshape_tensor)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import msgpack
import numpy as np

from ntjax.errors import BadData
from ntjax.hf.files import (
    LARGEST_FILE,
    Layout,
    content_hint,
    file_names,
    index_json,
    inside,
    read_index,
    replacing,
    split,
)

CHUNKED = "__msgpack_chunked_array__"  # flax's mark of an array stored in pieces of at most 1 GiB
LINEAR, EMBEDDING, LAYER_NORM, PLAIN = (
    "kernel",
    "embedding",
    "scale",
    "weight",
)  # what a torch `weight` is called


@dataclass(frozen=True)
class _Leaf:
    """Where one array is in a file, as Flax holds it."""

    file: Path
    start: int
    end: int
    shape: tuple[int, ...]
    dtype: np.dtype
    transposed: bool


class FlaxMsgpack:
    """A folder's flax_model.msgpack, or its flax_model.msgpack.index.json and the files named there.

    Names, shapes and tensors are given as torch has them.
    """

    def __init__(self, folder: Path):
        self.path = folder
        if (folder / "flax_model.msgpack").exists():
            files = {inside(folder, "flax_model.msgpack")}
        else:
            files = set(read_index(folder, "flax_model.msgpack.index.json").values())
        self._leaves: dict[str, _Leaf] = {}
        for file in sorted(files):
            for path, leaf in _leaves(file):
                self._leaves[torch_name(path)] = leaf

    def names(self) -> set[str]:
        return set(self._leaves)

    def shape(self, name: str) -> tuple[int, ...]:
        leaf = self._leaves[name]
        return leaf.shape[::-1] if leaf.transposed else leaf.shape

    def dtype(self, name: str) -> np.dtype:
        return self._leaves[name].dtype

    def read(self, name: str) -> np.ndarray:
        from flax.serialization import msgpack_restore

        leaf = self._leaves[name]
        with leaf.file.open("rb") as file:
            file.seek(leaf.start)
            array = msgpack_restore(file.read(leaf.end - leaf.start))
        return array.T if leaf.transposed else array

    def file(self, name: str) -> Path:
        return self._leaves[name].file


def torch_name(path: tuple[str, ...]) -> str:
    """("model", "norm", "scale") -> "model.norm.weight"."""
    last = "weight" if path[-1] in (LINEAR, EMBEDDING, LAYER_NORM) else path[-1]
    return ".".join((*path[:-1], last))


def flax_path(name: str, kind: str) -> tuple[str, ...]:
    """ "model.norm.weight" -> ("model", "norm", kind)."""
    *parts, last = name.split(".")
    return (*parts, kind if last == "weight" else last)


def _leaves(file: Path) -> Iterator[tuple[tuple[str, ...], _Leaf]]:
    """Every array in a file and where it is; one array is in memory at a time."""
    try:
        with file.open("rb") as stream, file.open("rb") as peek:
            unpacker = msgpack.Unpacker(
                stream, raw=False, strict_map_key=False, max_buffer_size=0, ext_hook=_header
            )
            yield from _walk(unpacker, peek, file, ())
            if unpacker.tell() != file.stat().st_size:
                raise ValueError("bytes after the end")
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        hint = content_hint(file) or f"cut short, or not msgpack ({type(error).__name__}: {error})"
        raise BadData(hint, where=str(file), fix="download the file again") from None


def _walk(
    unpacker: msgpack.Unpacker, peek: BinaryIO, file: Path, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], _Leaf]]:
    for _ in range(unpacker.read_map_header()):
        key = unpacker.unpack()
        if key == CHUNKED:
            raise ValueError("an array in pieces at the top of the file")
        start = unpacker.tell()
        if _is_tree(peek, start):
            yield from _walk(unpacker, peek, file, (*path, str(key)))
        else:
            shape, dtype = _shape_and_dtype(unpacker.unpack())
            transposed = key == LINEAR
            if transposed and len(shape) != 2:
                raise BadData(
                    f"{'/'.join((*path, key))} of shape {shape} is no linear layer's", where=str(file)
                )
            yield (*path, str(key)), _Leaf(file, start, unpacker.tell(), shape, dtype, transposed)


def _is_tree(peek: BinaryIO, start: int) -> bool:
    """Whether the object at `start` is a map and not an array in pieces (a map with `CHUNKED` first)."""
    peek.seek(start)
    head = peek.read(32)
    is_map = 0x80 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)
    return is_map and not head[2:].startswith(CHUNKED.encode())


def _header(code: int, data: bytes) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of a packed array, in place of the array."""
    if code != 1:
        raise ValueError(f"a value of kind {code} where an array belongs")
    shape, dtype, buffer = msgpack.unpackb(data, raw=False)
    if len(buffer) != math.prod(shape) * _dtype(dtype).itemsize:
        raise ValueError(f"{len(buffer)} bytes for an array of shape {shape} and dtype {dtype}")
    return tuple(shape), dtype


def _dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _shape_and_dtype(value: Any) -> tuple[tuple[int, ...], np.dtype]:
    if isinstance(value, dict):
        shape = tuple(value["shape"][str(i)] for i in range(len(value["shape"])))
        return shape, _dtype(value["chunks"]["0"][1])
    shape, dtype = value
    return shape, _dtype(dtype)


def write_flax(
    folder: Path,
    tensors: Mapping[str, Layout],
    kinds: Mapping[str, str],
    read: Callable[[str], np.ndarray],
    *,
    extra: Mapping[str, bytes],
    max_shard_bytes: int = LARGEST_FILE,
    discard: bool = False,
) -> None:
    """Writes flax_model.msgpack, or shards and their index, and the `extra` files, all or nothing.

    `kinds` says for each torch name what Flax calls its `weight`; `read` gives tensors in torch's layout.
    """
    runs = split(tensors, max_shard_bytes)
    files = dict(zip(file_names("flax_model", ".msgpack", len(runs)), runs, strict=True))
    paths = {name: flax_path(name, kinds[name]) for name in tensors}
    with replacing(folder, "flax_model*.msgpack*", discard=discard) as create:
        for name, content in extra.items():
            create(name).write(content)
        for name, run in files.items():
            _pack(create(name), _tree({paths[tensor]: tensor for tensor in run}), read, kinds)
        if len(files) > 1:
            keys = {file: ["/".join(paths[name]) for name in run] for file, run in files.items()}
            total = sum(tensor.nbytes for tensor in tensors.values())
            create("flax_model.msgpack.index.json").write(index_json(keys, total))


def _tree(leaves: Mapping[tuple[str, ...], str]) -> dict[str, Any]:
    from flax.traverse_util import unflatten_dict

    return unflatten_dict(leaves)


def _pack(
    file: BinaryIO, tree: dict[str, Any], read: Callable[[str], np.ndarray], kinds: Mapping[str, str]
) -> None:
    """What `flax.serialization.to_bytes` gives for the tree of tensors, holding one of them at a time."""
    from flax.serialization import msgpack_serialize

    packer = msgpack.Packer()
    file.write(packer.pack_map_header(len(tree)))
    for key, value in tree.items():
        file.write(packer.pack(key))
        if isinstance(value, dict):
            _pack(file, value, read, kinds)
        else:
            array = read(value)
            file.write(msgpack_serialize(np.ascontiguousarray(array.T if kinds[value] == LINEAR else array)))
