"""What a model folder may hold, and how one is written.

A folder from elsewhere is not trusted: names in it may not lead outside, nothing pickled is opened and no
code of its own is run.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from ntjax.errors import BadData, CheckpointError, InputMissing, Refused

LARGEST_FILE = 5 * 10**9  # bytes of tensors in one file, as transformers'


class Layout(NamedTuple):
    """Shape and dtype of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Source(Protocol):
    """A checkpoint that is read one tensor at a time, under the names and in the layout torch gives it."""

    @property
    def path(self) -> Path:
        """The folder or file, for messages."""

    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype:
        """Of what `read` gives; bfloat16 is `ml_dtypes.bfloat16`."""

    def read(self, name: str) -> np.ndarray: ...

    def file(self, name: str) -> Path:
        """The file the tensor is in, for messages."""


def inside(folder: Path, name: str) -> Path:
    """`folder/name`, which is there and is a file of this folder.

    A link may lead only to the hub cache's `blobs` beside `snapshots`.

    Raises:
        Refused: `name` has a folder part, or is a link that leads elsewhere.
        InputMissing: there is no such file.
    """
    path = folder / name
    if not re.fullmatch(r"[^/\\\0]+", name) or name in (".", ".."):
        raise Refused(
            f"the file name {name!r} leads out of the model's folder",
            where=str(folder),
            fix="get the model again from a place you trust",
        )
    if not path.exists():
        raise InputMissing(f"{name} isn't there", where=str(folder), fix="download or copy the whole model")
    root, target = folder.resolve(), path.resolve()
    cached = root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
    if target.parent != root and not cached:
        raise Refused(f"{name} is a link to {target}, outside the model's folder", fix="copy the file itself")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `BadData` where it isn't one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        hint = content_hint(path)
        raise BadData(f"not JSON: {hint or error}", where=str(path), fix="download the file again") from None
    if not isinstance(value, dict):
        raise BadData(f"a {type(value).__name__} where an object belongs", where=str(path))
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    `auto_map` (code that comes with the model) doesn't matter for a `model_type` transformers itself knows,
    since that code is never run; for any other it is refused.

    Raises:
        InputMissing: no config.json. BadData: it isn't a JSON object.
        Refused: the model is only its own code. ConfigError: quantised by another library than bitsandbytes.
    """
    from ntjax.hf.bnb import read_settings

    config = read_json(inside(folder, "config.json"))
    where = str(folder / "config.json")
    if "auto_map" in config and not _known(config.get("model_type")):
        raise Refused(
            f"model_type {config.get('model_type')!r} is code that comes with the model (auto_map); "
            "ntjax never runs it",
            where=where,
            fix="use a model whose architecture transformers has",
        )
    read_settings(config, where)
    return config


def _known(model_type: object) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def content_hint(path: Path) -> str | None:
    """What a file that isn't what its name says probably is."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file it stands for (run `git lfs pull` in the clone)"
    if head.lstrip()[:1] == b"<":
        return "a web page, not the file (an error or login page was saved in its place)"
    if head.startswith((b"\x80\x02", b"PK\x03\x04")):
        return "pickled by torch.save, which ntjax doesn't open"
    return None


@contextmanager
def replacing(folder: Path, stale: str, *, discard: bool = False) -> Iterator[Callable[[str], BinaryIO]]:
    """Yields `create(name)`; the files made with it appear in `folder` together, when all are complete.

    They are written under temporary names and renamed in the order they were created, so what makes a model
    of them (the index) is created last. Older files matching the glob `stale` go. An index that is there goes
    first: killed half-way, the folder holds the old model or none, never a mixture. With `discard` nothing is
    written, for hosts that only take part in gathering.

    Raises CheckpointError: the file system refuses.
    """
    names: list[str] = []
    with ExitStack() as files:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            yield lambda name: files.enter_context(_create(folder, name, names, discard))
            files.close()
            if not discard:
                _swap(folder, stale, names)
        except OSError as error:
            raise CheckpointError(f"can't write: {error.strerror or error}", where=str(folder)) from error
        finally:
            for name in () if discard else names:
                _temporary(folder, name).unlink(missing_ok=True)


@contextmanager
def _create(folder: Path, name: str, names: list[str], discard: bool) -> Iterator[BinaryIO]:
    names.append(name)
    with open(os.devnull if discard else _temporary(folder, name), "wb") as file:
        yield file
        file.flush()
        if not discard:
            os.fsync(file.fileno())


def _temporary(folder: Path, name: str) -> Path:
    return folder / f".{name}.tmp"


def _swap(folder: Path, stale: str, names: list[str]) -> None:
    for index in folder.glob(stale):
        if index.name.endswith(".index.json"):
            index.unlink()
    for name in names:
        _temporary(folder, name).replace(folder / name)
    for path in folder.glob(stale):
        if path.name not in names:
            path.unlink()


def to_json(value: Mapping[str, Any]) -> bytes:
    """As transformers writes its JSON files."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def exported_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config.json that goes with weights of `dtype`, which it names as transformers 5 does; none are quantised."""
    left_out = {"torch_dtype", "quantization_config"}
    return {key: value for key, value in config.items() if key not in left_out} | {"dtype": dtype}


def split(tensors: Mapping[str, Layout], largest: int) -> list[list[str]]:
    """Names, in order, in runs of at most `largest` bytes; a tensor above that is a run of its own."""
    runs: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        if runs[-1] and used + tensor.nbytes > largest:
            runs.append([])
            used = 0
        runs[-1].append(name)
        used += tensor.nbytes
    return runs


def file_names(stem: str, suffix: str, count: int) -> list[str]:
    """model.safetensors, or model-00001-of-00003.safetensors and so on."""
    if count == 1:
        return [f"{stem}{suffix}"]
    return [f"{stem}-{i:05d}-of-{count:05d}{suffix}" for i in range(1, count + 1)]


def index_json(files: dict[str, list[str]], total_bytes: int) -> bytes:
    """The index beside the files of a checkpoint: which tensor is in which."""
    weight_map = {name: file for file, names in files.items() for name in names}
    return to_json({"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def read_index(folder: Path, name: str) -> dict[str, Path]:
    """Tensor name -> file, from an index; every file is checked to be there and to be the folder's own.

    Raises BadData, Refused or InputMissing.
    """
    index = read_json(inside(folder, name))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise BadData("no weight_map of names to files", where=str(folder / name))
    paths = {file: inside(folder, file) for file in sorted(set(weight_map.values()))}
    return {tensor: paths[file] for tensor, file in weight_map.items()}
