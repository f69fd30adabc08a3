"""The line on which each key of a TOML or JSON text stands.

The standard parsers say what a file means but not where. This second pass reads text that they have
already accepted, so it only has to follow keys and brackets.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator

Tokens = deque[tuple[str, int]]  # (token, line it starts on)
Lines = dict[str, int]  # dotted key -> line

_STRINGS = r'"""(?:\\.|(?!""")[^\\])*"{3,5}|\'\'\'(?:(?!\'\'\').)*\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\''
_TOML = re.compile(rf"#[^\n]*|{_STRINGS}|[\[\]{{}}=,\n]|[^\s\[\]{{}}=,#\"']+", re.DOTALL)
_JSON = re.compile(r'"(?:\\.|[^"\\])*"|[\[\]{}:,]|[^\s\[\]{}:,"]+')
_NOT_A_NUMBER = ("NaN", "Infinity", "-Infinity")


def toml_lines(text: str) -> Lines:
    """Dotted key -> line; a table has the line of its header, an item of `[[stages]]` is `stages.0`."""
    tokens: Tokens = deque((token, line) for token, line in _tokens(_TOML, text) if not token.startswith("#"))
    lines: Lines = {}
    arrays: dict[str, int] = {}  # array of tables -> index of its last item
    table: list[str] = []
    while tokens:
        token, line = tokens[0]
        if token == "\n":
            tokens.popleft()
        elif token == "[":
            table = _header(tokens, arrays)
            _note(lines, table, line)
        else:
            _member(tokens, table, lines, [])
            while tokens and tokens[0][0] != "\n":  # a date may be two tokens
                tokens.popleft()
    return lines


def json_lines(text: str) -> tuple[Lines, list[tuple[str, int]]]:
    """Dotted key -> line, and (key, line) of what the standard parser lets pass: repeated keys and NaN."""
    tokens: Tokens = deque(_tokens(_JSON, text))
    faults = [(token, line) for token, line in tokens if token in _NOT_A_NUMBER]
    lines: Lines = {}
    _value(tokens, [], lines, faults)
    return lines, faults


def _tokens(pattern: re.Pattern[str], text: str) -> Iterator[tuple[str, int]]:
    line, end = 1, 0
    for match in pattern.finditer(text):
        line += text.count("\n", end, match.start())
        end = match.start()
        yield match[0], line


def _header(tokens: Tokens, arrays: dict[str, int]) -> list[str]:
    """The table that `[a.b]` or `[[a.b]]` opens; the name of an array of tables means its last item."""
    tokens.popleft()
    is_item = tokens[0][0] == "["
    if is_item:
        tokens.popleft()
    *parents, last = _key(tokens, "]")
    if is_item:
        tokens.popleft()
    table: list[str] = []
    for name in parents:
        table = _last_item([*table, name], arrays)
    table.append(last)
    if is_item:
        arrays[".".join(table)] = arrays.get(".".join(table), -1) + 1
    return _last_item(table, arrays)


def _last_item(table: list[str], arrays: dict[str, int]) -> list[str]:
    return [*table, str(arrays[".".join(table)])] if ".".join(table) in arrays else table


def _key(tokens: Tokens, end: str) -> list[str]:
    """The parts of a dotted key up to and including the token `end`."""
    parts: list[str] = []
    while (token := tokens.popleft()[0]) != end:
        if token[0] == '"':
            parts.append(json.loads(token))
        elif token[0] == "'":
            parts.append(token[1:-1])
        else:
            parts += [part for part in token.split(".") if part]
    return parts


def _member(tokens: Tokens, table: list[str], lines: Lines, faults: list[tuple[str, int]]) -> None:
    line = tokens[0][1]
    # A JSON key is followed by its colon at once; a TOML key ends at the equals sign.
    path = [*table, *_key(tokens, ":" if tokens[1][0] == ":" else "=")]
    if ".".join(path) in lines:
        faults.append((".".join(path), line))
    _note(lines, path, line)
    _value(tokens, path, lines, faults)


def _value(tokens: Tokens, path: list[str], lines: Lines, faults: list[tuple[str, int]]) -> None:
    token, _ = tokens.popleft()
    index = 0
    while token in ("[", "{"):
        following, line = tokens[0]
        if following in ("]", "}"):
            tokens.popleft()
            return
        if following in (",", "\n"):
            tokens.popleft()
        elif token == "{":
            _member(tokens, path, lines, faults)
        else:
            _note(lines, [*path, str(index)], line)
            _value(tokens, [*path, str(index)], lines, faults)
            index += 1


def _note(lines: Lines, path: list[str], line: int) -> None:
    for depth in range(1, len(path)):
        lines.setdefault(".".join(path[:depth]), line)
    lines[".".join(path)] = line
