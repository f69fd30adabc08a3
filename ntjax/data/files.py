"""Data files as sequences of dicts that know their line numbers."""

from __future__ import annotations

import csv
import io
import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntjax.errors import BadData, ConfigError, InputMissing

if TYPE_CHECKING:
    from ntjax.config import DatasetConfig

Row = dict[str, Any]

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")


class Rows(Sequence[Row]):
    """Rows by number, with the place of each for messages."""

    @abstractmethod
    def where(self, index: int) -> str:
        """ "train.jsonl:1817", or "train.parquet row 1817" (from 1) where lines mean nothing."""

    def folder(self, index: int) -> Path | None:
        """The folder of the file that a row is in: what relative paths in it start from; None for rows of no file."""
        return None


@dataclass(frozen=True)
class JsonLines(Rows):
    """One JSON object a line, parsed when it is asked for; blank lines are passed over.

    `spans` are (line number, first byte, byte count). Asking for a malformed line raises BadData.
    """

    path: Path
    name: str
    spans: Sequence[tuple[int, int, int]]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: Any) -> Any:
        _, first, count = self.spans[index]
        with self.path.open("rb") as file:
            file.seek(first)
            return json_object(file.read(count).rstrip(b"\r\n"), self.where(index))

    def where(self, index: int) -> str:
        return f"{self.name}:{self.spans[index][0]}"

    def folder(self, index: int) -> Path | None:
        return self.path.parent


@dataclass(frozen=True)
class Table(Rows):
    """Rows already read; `lines` are their line numbers where the file has lines, `place` is the file's folder."""

    name: str
    rows: Sequence[Row]
    lines: Sequence[int] | None = None
    place: Path | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[index]
        if not isinstance(row, dict):
            raise BadData(f"a row must be an object, not {_kind(row)}", where=self.where(index))
        return row

    def where(self, index: int) -> str:
        return f"{self.name} row {index + 1}" if self.lines is None else f"{self.name}:{self.lines[index]}"

    def folder(self, index: int) -> Path | None:
        return self.place


@dataclass(frozen=True)
class Undecoded(Sequence[Row]):
    """Rows of a `datasets.Dataset` whose images stay as they are stored, {"bytes": ..., "path": ...}.

    Decoded, a photograph takes ten times the memory, and what has been encoded again is another image.
    """

    table: Any  # in Arrow's format
    features: Any

    @classmethod
    def of(cls, found: Any) -> Sequence[Row]:
        """The data set itself where it has no images."""
        features = _undecoded(found.features)
        return found if features == found.features else cls(found.with_format("arrow"), features)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        return dict(self.features.decode_example(self.table[index].to_pylist()[0]))


def open_file(path: Path, root: Path, dataset: DatasetConfig) -> Rows:
    """The rows of one file, named in messages by its path below `root`."""
    name, kind = path.relative_to(root).as_posix(), path.suffix.lower()
    if kind not in KINDS:
        raise InputMissing(
            f"{name}: {kind or 'no extension'} isn't a kind of data file; allowed: {', '.join(KINDS)}"
        )
    if kind == ".jsonl":
        rows: Rows = _json_lines(path, name)
    elif kind == ".json":
        rows = _json(path, name)
    elif kind == ".parquet":
        rows = _parquet(path, name)
    elif kind == ".txt":
        rows = _text(path, name, dataset)
    else:
        rows = _separated(path, name, "\t" if kind == ".tsv" else ",")
    if isinstance(rows, Table):
        rows = replace(rows, place=path.parent)
    if not len(rows):
        raise BadData("the file has no rows", where=name)
    return rows


def _json_lines(path: Path, name: str) -> JsonLines:
    spans, first = [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            mark = 3 if number == 1 and line.startswith(b"\xef\xbb\xbf") else 0
            if line[mark:].strip():
                spans.append((number, first + mark, len(line) - mark))
            first += len(line)
    return JsonLines(path, name, spans)


def json_object(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise BadData(
            f"not UTF-8: {error.reason} at byte {error.start + 1} of the line", where=where
        ) from error
    except json.JSONDecodeError as error:
        shown = error.doc[max(0, error.pos - 20) : error.pos + 20].strip()
        raise BadData(
            f"not JSON: {error.msg.removesuffix(' at')}, at column {error.colno} near {shown!r}", where=where
        ) from error
    if not isinstance(row, dict):
        raise BadData(f"a row must be an object, not {_kind(row)}", where=where)
    return row


def _json(path: Path, name: str) -> Rows:
    """An array of objects; or, as such files often are, one object a line."""
    text = _decoded(path, name)
    if not text.lstrip().startswith("["):
        return _json_lines(path, name)
    try:
        return Table(name, json.loads(text))
    except json.JSONDecodeError as error:
        raise BadData(
            f"not JSON: {error.msg} at column {error.colno}", where=f"{name}:{error.lineno}"
        ) from error


def _separated(path: Path, name: str, delimiter: str) -> Table:
    """Comma or tab separated values under a line of column names; every value is text."""
    csv.field_size_limit(2**31 - 1)  # the default refuses documents over 128 KiB
    reader = csv.reader(io.StringIO(_decoded(path, name), newline=""), delimiter=delimiter, strict=True)
    records, last = [], 0
    try:
        for record in reader:
            if record:
                records.append((last + 1, record))
            last = reader.line_num
    except csv.Error as error:
        raise BadData(str(error), where=f"{name}:{reader.line_num}") from error
    return named(name, records, None)


def _text(path: Path, name: str, dataset: DatasetConfig) -> Table:
    """Lines of text; with `txt_delimiter`, fields of lines; with a delimiter that has a newline, documents.

    Fields are named by `txt_field_names`, or by the first line. Nothing is quoted or escaped.
    """
    text, delimiter = _decoded(path, name), dataset.txt_delimiter
    field = dataset.text_field or "text"
    if delimiter and "\n" in delimiter:
        documents = [part.strip("\n") for part in text.replace("\r\n", "\n").split(delimiter)]
        return Table(name, [{field: document} for document in documents if document.strip()])
    # Not by splitlines, which also cuts at form feeds and at separators that are text in Unicode.
    said = (line.removesuffix("\n") for line in io.StringIO(text, newline=None))
    lines = [(number, line) for number, line in enumerate(said, 1) if line.strip()]
    if not delimiter:
        if dataset.txt_field_names:
            raise ConfigError("txt_field_names needs txt_delimiter", fix='txt_delimiter = "\\t"')
        return Table(name, [{field: line} for _, line in lines], [number for number, _ in lines])
    return named(name, [(number, line.split(delimiter)) for number, line in lines], dataset.txt_field_names)


def named(name: str, records: list[tuple[int, list[str]]], names: Sequence[str] | None) -> Table:
    """Records as dicts; without `names` the first record is the names."""
    if names is None:
        if not records:
            return Table(name, [])
        names, records = records[0][1], records[1:]
    if len(set(names)) != len(names):
        raise BadData(f"a column is named twice: {', '.join(names)}", where=f"{name}:1")
    for number, record in records:
        if len(record) != len(names):
            raise BadData(
                f"{len(record)} fields, but there are {len(names)} columns: {', '.join(names)}",
                where=f"{name}:{number}",
            )
    rows = [dict(zip(names, record, strict=True)) for _, record in records]
    return Table(name, rows, [number for number, _ in records])


def _parquet(path: Path, name: str) -> Table:
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    try:
        return Table(name, Undecoded.of(Dataset(pyarrow.parquet.read_table(path))))
    except pyarrow.ArrowInvalid as error:
        raise BadData(f"not parquet: {error}", where=name) from error


def _undecoded(feature: Any) -> Any:
    """Features of `datasets` with images as they are stored."""
    from datasets import Image, LargeList, List

    if isinstance(feature, Image):
        return Image(mode=feature.mode, decode=False)
    if isinstance(feature, List | LargeList):
        return replace(feature, feature=_undecoded(feature.feature))
    if isinstance(feature, dict):
        return type(feature)({name: _undecoded(one) for name, one in feature.items()})
    return feature


def _decoded(path: Path, name: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise BadData(f"not UTF-8: {error.reason}", where=f"{name}:{line}", fix="save it as UTF-8") from error


def _kind(value: object) -> str:
    names = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a boolean"}
    return names.get(type(value), "null")
