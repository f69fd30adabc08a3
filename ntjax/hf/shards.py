"""Tensors of a safetensors checkpoint, and writing one.

Reading: the library checks a file's header; the tensors are views of the mapped file, so a slice costs only
the pages it touches. Writing is by hand because the library wants all tensors of a file at once in memory,
5 GB of them; the format is eight bytes of header length, a JSON header and the bytes of the tensors.
(https://huggingface.co/docs/safetensors)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
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

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Safetensors:
    """A folder's model.safetensors, or its model.safetensors.index.json and the files named there."""

    def __init__(self, folder: Path):
        self.path = folder
        if (folder / "model.safetensors").exists():
            file = inside(folder, "model.safetensors")
            headers = {file: _header(file)}
            self._files = dict.fromkeys(headers[file], file)
        else:
            self._files = read_index(folder, "model.safetensors.index.json")
            headers = {file: _header(file) for file in sorted(set(self._files.values()))}
            _check_index(folder, self._files, headers)
        self._entries = {name: entry for header in headers.values() for name, entry in header.items()}
        self._maps = {file: np.memmap(file, np.uint8, "r") for file in headers}

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> np.dtype:
        code = self._entries[name]["dtype"]
        if code not in DTYPES:
            raise BadData(
                f"{name} is {code}; weights are {', '.join(DTYPES)}",
                where=str(self.file(name)),
                fix="name a checkpoint that isn't quantised",
            )
        return DTYPES[code]

    def read(self, name: str) -> np.ndarray:
        start, end = self._entries[name]["data_offsets"]
        return self._maps[self._files[name]][start:end].view(self.dtype(name)).reshape(self.shape(name))

    def file(self, name: str) -> Path:
        return self._files[name]


def _header(path: Path) -> dict[str, dict]:
    """Tensor name -> dtype, shape and offsets from the start of the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        hint = content_hint(path) or f"cut short, or not safetensors ({error})"
        raise BadData(hint, where=str(path), fix="download the file again") from None
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    for entry in header.values():
        entry["data_offsets"] = [8 + size + offset for offset in entry["data_offsets"]]
    return header


def _check_index(folder: Path, files: Mapping[str, Path], headers: Mapping[Path, Mapping]) -> None:
    where = str(folder / "model.safetensors.index.json")
    for name, file in files.items():
        if name not in headers[file]:
            raise BadData(
                f"{name} should be in {file.name} and isn't", where=where, fix="download the model again"
            )
    for file, header in headers.items():
        for name in header:
            if files.get(name) != file:
                raise BadData(f"{file.name} has {name}, which the index doesn't place there", where=where)


def write_safetensors(
    folder: Path,
    tensors: Mapping[str, Layout],
    read: Callable[[str], np.ndarray],
    *,
    extra: Mapping[str, bytes],
    max_shard_bytes: int = LARGEST_FILE,
    discard: bool = False,
) -> None:
    """Writes model.safetensors, or shards and an index, and the `extra` files (config.json), all or nothing.

    `read(name)` is called once a tensor and gives it as `tensors` says; one tensor is held at a time. With
    `discard`, tensors are read and nothing is written.
    """
    runs = split(tensors, max_shard_bytes)
    files = dict(zip(file_names("model", ".safetensors", len(runs)), runs, strict=True))
    with replacing(folder, "model*.safetensors*", discard=discard) as create:
        for name, content in extra.items():
            create(name).write(content)
        for name, run in files.items():
            file = create(name)
            run.sort(key=lambda tensor: -tensors[tensor].dtype.itemsize)  # keeps all aligned
            file.write(_packed_header({tensor: tensors[tensor] for tensor in run}))
            for tensor in run:
                array = read(tensor)
                assert Layout(array.shape, array.dtype) == tensors[tensor], tensor
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        if len(files) > 1:
            total = sum(tensor.nbytes for tensor in tensors.values())
            create("model.safetensors.index.json").write(index_json(files, total))


def _packed_header(tensors: Mapping[str, Layout]) -> bytes:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
