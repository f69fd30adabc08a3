"""Data sets read from their beginning, row by row, never whole."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntjax.data.files import Row, json_object, named
from ntjax.data.rows import data_files, existing, from_hub, split_of
from ntjax.data.stream import Lazy
from ntjax.errors import BadData, ConfigError, InputMissing

if TYPE_CHECKING:
    from ntjax.config import DatasetConfig

CHUNK = 1 << 20  # characters of text or rows of a table read at once


@dataclass(frozen=True)
class Files:
    """Rows of files, one file after another, from row n on; `root` is what their names are told from."""

    paths: Sequence[Path]
    root: Path
    dataset: DatasetConfig

    def __call__(self, start: int) -> Iterator[Lazy]:
        return islice(chain.from_iterable(map(self._rows, self.paths)), start, None)

    def digest(self) -> str:
        """Changes when a file is added or changes its size."""
        return " ".join(f"{self._name(path)}:{path.stat().st_size}" for path in self.paths)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _rows(self, path: Path) -> Iterator[Lazy]:
        name = self._name(path)
        try:
            yield from READERS[path.suffix.lower()](path, name, self.dataset)
        except UnicodeDecodeError as error:
            raise BadData(f"not UTF-8: {error.reason}", where=name, fix="save it as UTF-8") from error


@dataclass(frozen=True)
class Hub:
    """Rows of a hub data set, from row n on."""

    name: str
    found: Any  # datasets.IterableDataset

    def __call__(self, start: int) -> Iterator[Lazy]:
        for number, row in enumerate(self.found.skip(start), start + 1):
            yield partial(dict, row), f"{self.name} row {number}"

    def digest(self) -> str:
        """The name: what is behind it isn't read beforehand."""
        return self.name


def open_lazily(dataset: DatasetConfig, folders: Sequence[Path], split: str | None = None) -> Files | Hub:
    """The rows of a `[datasets.NAME]` table with `streaming`; nothing but names and sizes is read.

    Files are chosen as `open_rows` does, but a split is whole. Raises InputMissing, ConfigError.
    """
    split = split or dataset.dataset_split
    if split is not None and any(mark in split for mark in "[+"):
        raise ConfigError(
            f"dataset_split = {split!r}: a streamed data set isn't counted beforehand",
            fix="name a whole split",
        )
    if dataset.dataset_path is None:
        found = from_hub(dataset, split or "train", streaming=True)
        return Hub(str(dataset.dataset_name), found)
    path = existing(Path(str(dataset.dataset_path)).expanduser(), folders)
    if dataset.dataset_kwargs:
        raise ConfigError(
            f"dataset_kwargs go to datasets.load_dataset, but {path.name} is read as a file",
            fix="remove dataset_kwargs, or give dataset_name",
        )
    splits: dict[str, list[Path]] = {} if path.is_dir() else {"train": [path]}
    for file in data_files(path) if path.is_dir() else []:
        splits.setdefault(split_of(file.relative_to(path)), []).append(file)
    if split is None:
        split = next(iter(splits)) if len(splits) == 1 else "train"
    if split not in splits:
        raise InputMissing(
            f"{path.name} has no split {split!r}; there is {', '.join(splits)}",
            fix=f"dataset_split = {next(iter(splits))!r}",
        )
    for file in splits[split]:
        if file.suffix.lower() not in READERS:
            raise InputMissing(
                f"{file.name} can't be read row by row; what can ends in {', '.join(READERS)}",
                fix="write it as .jsonl, or remove streaming",
            )
    return Files(splits[split], path if path.is_dir() else path.parent, dataset)


def _json_lines(path: Path, name: str, dataset: DatasetConfig) -> Iterator[Lazy]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if text.strip():
                yield partial(json_object, text.rstrip(b"\r\n"), f"{name}:{number}"), f"{name}:{number}"


def _text(path: Path, name: str, dataset: DatasetConfig) -> Iterator[Lazy]:
    """Lines; with a delimiter that has a newline, documents."""
    field, delimiter = dataset.text_field or "text", dataset.txt_delimiter
    if dataset.txt_field_names or (delimiter and "\n" not in delimiter):
        raise ConfigError(
            "streamed text has no fields",
            fix="write it as .csv or .tsv, or remove txt_delimiter or streaming",
        )
    with path.open(encoding="utf-8-sig") as file:
        if delimiter:
            documents = (part.strip("\n") for part in _parts(file, delimiter))
            numbered = ((f"{name} row {i}", part) for i, part in enumerate(filter(str.strip, documents), 1))
        else:
            lines = ((f"{name}:{i}", line.rstrip("\n")) for i, line in enumerate(file, 1))
            numbered = ((where, line) for where, line in lines if line.strip())
        for where, text in numbered:
            yield partial(dict, {field: text}), where


def _parts(file: Any, delimiter: str) -> Iterator[str]:
    """What stands between delimiters."""
    rest = ""
    while chunk := file.read(CHUNK):
        *parts, rest = (rest + chunk).split(delimiter)
        yield from parts
    yield rest


def _separated(path: Path, name: str, dataset: DatasetConfig) -> Iterator[Lazy]:
    """Comma or tab separated values under a line of column names; every value is text."""
    csv.field_size_limit(2**31 - 1)  # the default refuses documents over 128 KiB
    names: list[str] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        last = 0
        try:
            for record in reader:
                if record and names:
                    yield partial(_record, name, last + 1, record, names), f"{name}:{last + 1}"
                elif record:
                    names = record
                    named(name, [], names)
                last = reader.line_num
        except csv.Error as error:
            raise BadData(str(error), where=f"{name}:{reader.line_num}") from error


def _record(name: str, number: int, record: list[str], names: list[str]) -> Row:
    return named(name, [(number, record)], names)[0]


def _parquet(path: Path, name: str, dataset: DatasetConfig) -> Iterator[Lazy]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield partial(dict, row), f"{name} row {number}"
    except pyarrow.ArrowInvalid as error:
        raise BadData(f"not parquet: {error}", where=name) from error


READERS: dict[str, Callable[[Path, str, Any], Iterator[Lazy]]] = {
    ".jsonl": _json_lines,
    ".txt": _text,
    ".csv": _separated,
    ".tsv": _separated,
    ".parquet": _parquet,
}
