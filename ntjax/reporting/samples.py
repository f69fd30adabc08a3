"""Some of a stage's completions, from its first to its last, found without reading all of them.

The lines of a completions.jsonl are in the order of steps, so a window is looked up by bisection: a file of gigabytes
costs no more than a short one.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from ntjax.errors import BadData

COMPLETIONS = "completions.jsonl"  # as `rollout`, which needs jax, writes it
WINDOWS = 6
SHOWN, OF_ONE = 8, 4  # completions of a window, of a prompt
LINES = 1024  # of a window that are looked at
SIDE, QUALITY = 112, 72  # of a thumbnail, in pixels and JPEG's


@dataclass(frozen=True)
class Group:
    """A prompt and some of its completions, the best first; there are `count`."""

    prompt: Any  # text or messages
    images: list[str]
    completions: list[dict[str, Any]]
    count: int


@dataclass(frozen=True)
class Window:
    """What was drawn at once, before step `step`: `count` completions, `LINES` where there are more."""

    step: int
    groups: list[Group]
    count: int
    reward: float | None  # the mean


def read_windows(path: Path, count: int = WINDOWS) -> list[Window]:
    """At most `count` windows of a completions.jsonl, spread evenly over it, the first and the last among them.

    A last line cut short is left out. Raises BadData with the place of a line that is no completion.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:
        end = _end(file)
        if not end:
            return []
        last = _line(file, _last(file, end), path)
        places = [end * i // max(count - 1, 1) for i in range(count - 1)]
        steps = {_line(file, start, path)["step"] for p in places if (start := _start(file, p)) < end}
        steps.add(last["step"])
        return [_window(file, _first(file, step, end, path), end, path) for step in sorted(steps)]


def thumbnail(name: str) -> str | None:
    """An image of a completion's line as a small data URI, None unless it is a file that can be shown."""
    from ntjax.data.pictures import Picture

    if not os.path.isfile(name):
        return None
    try:
        image = Picture.of(os.path.abspath(name), name).image()
    except BadData:
        return None
    image.thumbnail((SIDE, SIDE))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}"


def _window(file: BinaryIO, start: int, end: int, path: Path) -> Window:
    """That whose lines begin at `start`."""
    lines: list[dict[str, Any]] = []
    while start < end and len(lines) < LINES:
        line = _line(file, start, path)
        if lines and line["step"] != lines[0]["step"]:
            break
        lines.append(line)
        start = file.tell()
    groups: list[Group] = []
    shown = 0
    for _, each in groupby(lines, key=lambda line: (line.get("prompt"), line.get("images"))):
        of_one = list(each)
        kept = _spread(of_one)[: SHOWN - shown]
        shown += len(kept)
        if kept:
            images = of_one[0].get("images")
            names = [str(name) for name in images] if isinstance(images, list) else []
            groups.append(Group(of_one[0].get("prompt"), names, kept, len(of_one)))
    rewards = [reward for line in lines if (reward := number(line.get("reward"))) is not None]
    mean = sum(rewards) / len(rewards) if rewards else None
    return Window(lines[0]["step"], groups, len(lines), mean)


def number(value: Any) -> float | None:
    """The value if it is a number."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _spread(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """From the best to the worst, those between at even distances."""
    ranked = sorted(lines, key=lambda line: -(number(line.get("reward")) or 0.0))
    few = min(len(ranked), OF_ONE)
    return [ranked[i * (len(ranked) - 1) // max(few - 1, 1)] for i in range(few)]


def _end(file: BinaryIO) -> int:
    """Where the last whole line ends."""
    return _ended(file, file.seek(0, os.SEEK_END))


def _last(file: BinaryIO, end: int) -> int:
    """Where the line that ends at `end` begins."""
    return _ended(file, end - 1)


def _ended(file: BinaryIO, place: int) -> int:
    """Where the last of the lines ends that end before `place` or there."""
    while place > 0:
        block = min(place, 1 << 16)
        file.seek(place - block)
        found = file.read(block).rfind(b"\n")
        place -= block
        if found >= 0:
            return place + found + 1
    return 0


def _start(file: BinaryIO, place: int) -> int:
    """Where the first line begins that begins at `place` or after it."""
    if place:
        file.seek(place - 1)
        file.readline()
        return file.tell()
    return 0


def _first(file: BinaryIO, step: int, end: int, path: Path) -> int:
    """Where the first line of `step` begins."""
    low, high = 0, end
    while low < high:
        middle = (low + high) // 2
        start = _start(file, middle)
        if start < end and _line(file, start, path)["step"] < step:
            low = middle + 1
        else:
            high = middle
    return _start(file, low)


def _line(file: BinaryIO, start: int, path: Path) -> dict[str, Any]:
    """The completion whose line begins at `start`; the file stands after it."""
    file.seek(start)
    text = file.readline()
    try:
        line = json.loads(text)
        line["step"] = int(line["step"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadData(
            f"not a completion: {text[:60].decode(errors='replace').strip()!r}",
            where=f"{path}, byte {start}",
            fix="take the line out",
        ) from error
    return line
