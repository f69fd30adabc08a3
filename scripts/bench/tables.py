"""Writes into docs/benchmarks.md, between `<!-- bench: NAME -->` and `<!-- end -->`, the tables of
docs/bench/NAME/*.json, one a processor.

python scripts/bench/tables.py
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Json = dict[str, Any]
DOCS = Path(__file__).parents[2] / "docs"
HEAD = (
    "| what | | s a step | tokens/s | CPU-s a step | peak GB | first is times as fast | asked |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)
MARKED = re.compile(r"(<!-- bench: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(document: str, records_of: Callable[[str], Sequence[Json]]) -> str:
    """The document with tables between each pair of marks."""

    def marked(match: re.Match[str]) -> str:
        opening, name, end = match.groups()
        records = records_of(name)
        tables = "\n\n".join(table(record, named=len(records) > 1) for record in records)
        body = tables or f"Not measured yet: `python scripts/bench/{name}.py`."
        return f"{opening}\n{body}\n\n{end}"

    return MARKED.sub(marked, document)


def table(record: Json, *, named: bool = False) -> str:
    """A line a contestant, and one that says how, on what, with what and when they were measured; under the name of the
    processor, if it is to be told from other tables."""
    rows, machine = record["rows"], record["machine"]
    title = [f"**{machine['accelerator'] or machine['cpu']}**", ""] if named else []
    lines = [*title, HEAD, *(line for row in rows for line in lines_of(row))]
    kinds = [f"{machine['cores']} CPU cores ({machine['cpu']})", f"{machine['memory_gb']} GB"]
    kinds += [machine["accelerator"]] if machine["accelerator"] else []
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    rounds = _span([row["rounds"] for row in rows])
    told = f"`{record['command']}`, {_span([row['date'] for row in rows])}, medians of rounds: {rounds}. "
    told += f"{', '.join(kinds)}; {versions}."
    return "\n".join([*lines, "", textwrap.fill(told, 120, break_long_words=False, break_on_hyphens=False)])


def _span(values: list[Any]) -> str:
    return " to ".join(str(value) for value in sorted({min(values), max(values)}))


def lines_of(row: Json) -> list[str]:
    """A row's: beside each contestant but the first, how many times as fast the first is."""
    lines = []
    for place, (who, found) in enumerate(row["figures"].items()):
        what, asked = (row["what"], row["asked"]) if place == 0 else ("", "")
        times = row["ratio"].get(who)
        ratio = "" if times is None else f"{times:.0f}" if times >= 100 else f"{times:.2f}"
        cells = " | ".join([what, who, *_cells(found), ratio, asked])
        lines.append(f"| {cells} |".replace("  ", " "))
    return lines


def _cells(found: Json) -> list[str]:
    if "absent" in found:
        return [f"absent: {found['absent']}", "", "", ""]
    speed, cpu = found["tokens_per_s"], found["cpu"]
    return [
        f"{found['seconds']:.3g}",
        "" if speed is None else f"{speed:.0f}" if speed >= 100 else f"{speed:.3g}",
        "" if cpu is None else f"{cpu:.3g}",
        f"{found['peak_gb']:.3g}",
    ]


def kept(name: str) -> list[Json]:
    """The records of a table, the latest first."""
    records = [json.loads(path.read_text()) for path in sorted((DOCS / "bench" / name).glob("*.json"))]
    return sorted(records, key=lambda record: record["date"], reverse=True)


if __name__ == "__main__":
    document = DOCS / "benchmarks.md"
    document.write_text(filled(document.read_text(), kept))
