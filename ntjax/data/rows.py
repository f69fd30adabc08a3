"""Files, folders and hub data sets as a sequence of dicts that know where they came from."""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ntjax.data.chat import missing_columns
from ntjax.data.files import KINDS, Row, Rows, Table, Undecoded, open_file
from ntjax.data.placeholders import with_paths
from ntjax.errors import BadData, ConfigError, InputMissing, Refused

if TYPE_CHECKING:
    from ntjax.config import DatasetConfig
    from ntjax.data.pictures import Vision

__all__ = ["Row", "Rows", "held_out", "open_rows"]

# The words by which `datasets` tells the splits of a folder.
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


@dataclass(frozen=True)
class Chosen(Rows):
    """Stretches of other rows, one after another: (rows, first, end)."""

    parts: Sequence[tuple[Rows, int, int]]

    def __len__(self) -> int:
        return sum(end - first for _, first, end in self.parts)

    def __getitem__(self, index: Any) -> Any:
        rows, at = self._find(index)
        return rows[at]

    def where(self, index: int) -> str:
        rows, at = self._find(index)
        return rows.where(at)

    def folder(self, index: int) -> Path | None:
        rows, at = self._find(index)
        return rows.folder(at)

    def _find(self, index: int) -> tuple[Rows, int]:
        index += len(self) if index < 0 else 0
        for rows, first, end in self.parts:
            if 0 <= index < end - first:
                return rows, first + index
            index -= end - first
        raise IndexError(index)


@dataclass(frozen=True)
class Picked(Rows):
    """Some of other rows, by number."""

    rows: Rows
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[self.numbers[index]]

    def where(self, index: int) -> str:
        return self.rows.where(self.numbers[index])

    def folder(self, index: int) -> Path | None:
        return self.rows.folder(self.numbers[index])


@dataclass(frozen=True)
class Located(Rows):
    """Other rows whose images' paths, relative to the file a row is in, have become absolute."""

    rows: Rows
    column: str | None  # of the images, where it has a name of its own

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row, folder = self.rows[index], self.folder(index)
        return row if folder is None else with_paths(row, folder.absolute(), self.column)

    def where(self, index: int) -> str:
        return self.rows.where(index)

    def folder(self, index: int) -> Path | None:
        return self.rows.folder(index)


def shown_rows(rows: Rows, dataset: DatasetConfig, vision: Vision | None) -> Rows:
    """The rows for a model that has `vision` or hasn't."""
    return rows if vision is None else Located(rows, dataset.image_field)


def check_image_field(rows: Rows, dataset: DatasetConfig, vision: Vision | None, where: str) -> None:
    """Raises ConfigError for an `image_field`, set at `where`, that a model without `vision` can't see, and
    InputMissing for one that no row has; some may be without it."""
    field = dataset.image_field
    if field is None:
        return
    if vision is None:
        raise ConfigError(
            f"image_field = {field!r}, but the model reads text alone",
            where=where,
            fix="name a model that sees images, or remove image_field",
        )
    if not any(field in row for row in _readable(rows)):
        for row in _readable(rows):
            raise missing_columns(row, [field], rows.where(0), fix="correct image_field")


def _readable(rows: Rows) -> Iterator[Row]:
    """Those that can be read; the others are counted where rows are encoded."""
    for index in range(len(rows)):
        with suppress(BadData):
            yield rows[index]


def held_out(rows: Rows, ratio: float, seed: int) -> tuple[Rows, Rows]:
    """(rows to train on, rows to evaluate on): ceil(ratio * rows) drawn for evaluation, both in order."""
    order = np.random.default_rng(seed).permutation(len(rows))
    count = math.ceil(ratio * len(rows))
    return Picked(rows, sorted(order[count:].tolist())), Picked(rows, sorted(order[:count].tolist()))


def open_rows(dataset: DatasetConfig, folders: Sequence[Path], split: str | None = None) -> Rows:
    """The rows of a `[datasets.NAME]` table, in file order, the first `num_samples` of them.

    A relative `dataset_path` is looked for in each of `folders` in turn. `split` overrides `dataset_split`,
    and may be a slice as `datasets` writes them ("train[:10%]"). Without either, a source of one split gives
    that one and a source of several gives its "train". Raises InputMissing, BadData, ConfigError.
    """
    split = split or dataset.dataset_split
    rows = _hub_rows(dataset, split) if dataset.dataset_path is None else _local_rows(dataset, folders, split)
    if not len(rows):
        raise BadData(f"no rows in {dataset.dataset_path or dataset.dataset_name}")
    return rows


def _local_rows(dataset: DatasetConfig, folders: Sequence[Path], split: str | None) -> Rows:
    path = existing(Path(str(dataset.dataset_path)).expanduser(), folders)
    if dataset.dataset_kwargs:
        raise ConfigError(
            f"dataset_kwargs go to datasets.load_dataset, but {path.name} is read as a file",
            fix="remove dataset_kwargs, or give dataset_name",
        )
    splits: dict[str, list[Path]] = {}
    if path.is_dir():
        for file in data_files(path):
            splits.setdefault(split_of(file.relative_to(path)), []).append(file)
        root = path
    else:
        splits["train"] = [path]
        root = path.parent
    if split is None:
        split = next(iter(splits)) if len(splits) == 1 else "train"
    wanted = {word for word in re.findall(r"\w+", re.sub(r"\[.*?\]", "", split))}
    if unknown := sorted(wanted - set(splits)):
        raise InputMissing(
            f"{path.name} has no split {unknown[0]!r}; there is {', '.join(splits)}",
            fix=f"dataset_split = {next(iter(splits))!r}",
        )
    opened = {
        name: Chosen([(part, 0, len(part)) for part in (open_file(f, root, dataset) for f in splits[name])])
        for name in sorted(wanted)
    }
    return _cut(opened, split, dataset.num_samples)


def _cut(splits: Mapping[str, Rows], split: str, count: int | None) -> Rows:
    """The stretches that a split such as "train[:10%]+test" means, and the first `count` rows of those."""
    from datasets import ReadInstruction

    try:
        pieces = ReadInstruction.from_spec(split).to_absolute(
            {name: len(rows) for name, rows in splits.items()}
        )
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            f"dataset_split = {split!r}: {error}", fix='write "train" or "train[:10%]"'
        ) from error
    parts, left = [], sys.maxsize if count is None else count
    for piece in pieces:
        rows = splits[piece.splitname]
        first, end = piece.from_ or 0, len(rows) if piece.to is None else piece.to
        end = max(first, min(end, first + left))
        left -= end - first
        parts.append((rows, first, end))
    return Chosen(parts)


def existing(path: Path, folders: Sequence[Path]) -> Path:
    places = [path] if path.is_absolute() else [folder / path for folder in folders]
    for place in places:
        if place.exists():
            return place
    folder = places[0].parent
    while not folder.is_dir():
        folder = folder.parent
    there = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    close = difflib.get_close_matches(path.name, there, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    shown = ", ".join(there[:20]) + (", ..." if len(there) > 20 else "") if there else "nothing"
    raise InputMissing(
        f"dataset_path {str(path)!r} isn't there{hint} {folder} has: {shown}", fix="correct dataset_path"
    )


def data_files(folder: Path) -> list[Path]:
    """Every data file below a folder, sorted by path, hidden ones left out."""
    found = [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in KINDS
        and file.is_file()
        and not any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
        and file.name not in ("dataset_info.json", "dataset_infos.json", "state.json")
    ]
    if not found:
        raise InputMissing(f"no data file in {folder}; a data file ends in {', '.join(KINDS)}")
    return found


def split_of(path: Path) -> str:
    """The split a file's name or its folder's says it is of; "train" if they say nothing."""
    for part in (path.stem, *(parent.name for parent in path.parents)):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return "train"


def _hub_rows(dataset: DatasetConfig, split: str | None) -> Rows:
    """Rows of a hub data set."""
    found = from_hub(dataset, split or "train")
    count = len(found) if dataset.num_samples is None else min(len(found), dataset.num_samples)
    return Chosen([(Table(str(dataset.dataset_name), Undecoded.of(found)), 0, count)])


def from_hub(dataset: DatasetConfig, split: str, *, streaming: bool = False) -> Any:
    """A data set of the hub as `datasets` gives it; streaming, it is fetched as it is read and not cached."""
    import datasets

    kwargs, name = dict(dataset.dataset_kwargs or {}), str(dataset.dataset_name)
    if kwargs.pop("trust_remote_code", False):
        raise Refused("dataset_kwargs.trust_remote_code: code from the hub is never run", fix="remove it")
    try:
        return datasets.load_dataset(name, split=split, streaming=streaming, **kwargs)
    except ValueError as error:  # an unknown split or configuration: the message lists what there is
        raise InputMissing(f"{name}: {error}", fix="correct dataset_split, or dataset_kwargs.name") from error
    except OSError as error:
        raise InputMissing(
            f"{name} can't be read from the hub: {error}",
            fix="check the name; set HF_TOKEN for a private one, HF_ENDPOINT for a mirror, HTTPS_PROXY for a "
            "proxy; or download it elsewhere and give dataset_path",
        ) from error
