"""What is written in a file, and on which line."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from ntjax.config.files import Source, read
from ntjax.config.lines import json_lines, toml_lines
from ntjax.errors import ConfigError, InputMissing, UserCodeError


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def leaves(value: object, path: str = "") -> set[str]:
    """The dotted keys of everything in nested data."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    keys = {f"{path}.{key}".removeprefix("."): item for key, item in items}
    return set(keys).union(*(leaves(item, key) for key, item in keys.items()))


TOML = '''\
a = 1   # a = 2
"b.c" = "# not a comment"
d.e = 3
long = """
x = 1
[not.a.table]
a quote: \\""" and two at the end"""""
raw = \'\'\'
it\\'s\'\'\'
[table]
list = [
  1,
  [2, 3],  # nested
  { x = 4, "y z" = 5 },
]
day = 1979-05-27 07:32:00
inline = { p.q = 1, r = [ ] }
[[items]]
name = 'one'
[items.more]
deep = true
[[items]]
[[items.inner]]
k = 1
[[items.inner]]
k = 2
[last]
'''
TOML_LINES = {
    "a": 1, "b.c": 2, "d": 3, "d.e": 3, "long": 4, "raw": 8, "table": 10, "table.list": 11,
    "table.list.0": 12, "table.list.1": 13, "table.list.1.0": 13, "table.list.1.1": 13,
    "table.list.2": 14, "table.list.2.x": 14, "table.list.2.y z": 14, "table.day": 16,
    "table.inline": 17, "table.inline.p": 17, "table.inline.p.q": 17, "table.inline.r": 17,
    "items": 18, "items.0": 18, "items.0.name": 19, "items.0.more": 20, "items.0.more.deep": 21,
    "items.1": 22, "items.1.inner": 23, "items.1.inner.0": 23, "items.1.inner.0.k": 24,
    "items.1.inner.1": 25, "items.1.inner.1.k": 26, "last": 27,
}  # fmt: skip


def test_every_toml_key_has_its_line() -> None:
    assert toml_lines(TOML) == TOML_LINES


def test_toml_lines_know_every_key_that_tomllib_reads() -> None:
    assert set(toml_lines(TOML)) == leaves(tomllib.loads(TOML))


def test_every_json_key_has_its_line() -> None:
    text = '{\n"a": {"b": [1,\n {"c:d": "}"}]},\n\n"e": [], "f": {}\n}'
    lines, faults = json_lines(text)
    assert lines == {"a": 2, "a.b": 2, "a.b.0": 2, "a.b.1": 3, "a.b.1.c:d": 3, "e": 5, "f": 5}
    assert faults == []
    assert set(lines) == leaves(json.loads(text))


def test_every_yaml_key_has_its_line(tmp_path: Path) -> None:
    source = read(write(tmp_path, "run.yaml", "# first\na:\n  b: [1, 2]\nc:\n  - d: 1\n  -\n    e: 2\n"))
    lines = {"a": 2, "a.b": 3, "a.b.0": 3, "a.b.1": 3, "c": 4, "c.0": 5, "c.0.d": 5, "c.1": 7, "c.1.e": 7}
    assert source.lines == lines
    assert source.data == {"a": {"b": [1, 2]}, "c": [{"d": 1}, {"e": 2}]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-2.5e-3", -2.5e-3),
        ("3", 3),
        ("0.1", 0.1),
        ("2024-01-01", "2024-01-01"),
    ],
)
def test_yaml_numbers_are_numbers_and_dates_are_text(tmp_path: Path, text: str, value: object) -> None:
    found = read(write(tmp_path, "run.yml", f"a: {text}")).data["a"]
    assert found == value
    assert type(found) is type(value)


SYNTAX_ERRORS = {
    "duplicate toml key": (".toml", "a = 1\nb = 2\na = 3\n", 3, "given twice: a = 3"),
    "duplicate toml table": (".toml", "[a]\nx = 1\n[a]\n", 3, "given twice: [a]"),
    "broken toml": (".toml", "a = 1\nb = \n", 2, "not TOML: invalid value"),
    "unfinished toml": (".toml", "a = 1\nb = [1,", 2, "not TOML"),
    "duplicate json key": (".json", '{"a": {\n"b": 1,\n"c": 2,\n"b": 3}}', 4, "a.b is given twice"),
    "broken json": (".json", '{"a": 1,\n"b": }', 2, "not JSON: expecting value"),
    "json NaN": (".json", '{"a": 1,\n"b": NaN}', 2, "NaN is not a JSON number"),
    "json infinity": (".json", '{"a": 1,\n\n"b": -Infinity}', 3, "-Infinity is not a JSON number"),
    "json list": (".json", "[1]", 1, "expected settings by name"),
    "duplicate yaml key": (".yaml", "a:\n  b: 1\n  b: 2\n", 3, "a.b is given twice"),
    "broken yaml": (".yaml", "a: 1\nb: [1, 2\n", 3, "not YAML"),
    "yaml tab": (".yaml", "a:\n\tb: 1\n", 2, "indent with spaces"),
    "yaml alias": (".yaml", "a: &x [1]\nb: *x\n", 2, "aliases are not read"),
    "yaml object": (".yaml", "a: 1\nb: !!python/object:os.system {}\n", 2, "is not read"),
    "yaml code": (".yaml", "a: 1\nb: !!python/name:os.system\n", 2, "could not determine a constructor"),
    "yaml two documents": (".yaml", "a: 1\n---\nb: 1\n", 2, "not YAML"),
    "yaml number as key": (".yaml", "a: 1\n2: 1\n", 2, "the key 2 is not text"),
    "yaml control character": (".yaml", "a: 1\nb: \x07\n", 2, "not YAML"),
    "yaml lone value": (".yaml", "abc", 1, "expected settings by name"),
    "python": (".py", "def get_config():\n  return {\n", 2, "not Python"),
}  # fmt: skip


@pytest.mark.parametrize(("suffix", "text", "line", "message"), SYNTAX_ERRORS.values(), ids=SYNTAX_ERRORS)
def test_a_syntax_error_names_its_line(
    tmp_path: Path, suffix: str, text: str, line: int, message: str
) -> None:
    path = write(tmp_path, f"run{suffix}", text)
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert caught.value.where == f"{path}:{line}"
    assert message in str(caught.value)


@pytest.mark.parametrize("suffix", [".toml", ".yaml", ".json"])
@pytest.mark.parametrize("text", ["", "\n \n", "# only a comment\n"])
def test_an_empty_file_is_said_to_be_empty(tmp_path: Path, suffix: str, text: str) -> None:
    if suffix == ".json" and "#" in text:
        text = "{}"
    with pytest.raises(ConfigError, match="the file is empty"):
        read(write(tmp_path, f"run{suffix}", text))


@pytest.mark.parametrize(("suffix", "text"), [(".toml", "a = 1"), (".yaml", "a: 1"), (".json", '{"a": 1}')])
def test_a_byte_order_mark_and_windows_line_ends_are_passed_over(
    tmp_path: Path, suffix: str, text: str
) -> None:
    source = read(write(tmp_path, f"run{suffix}", b"\xef\xbb\xbf\r\n" + text.encode() + b"\r\n"))
    assert source == Source(source.path, {"a": 1}, {"a": 2})


def test_text_that_is_not_utf8_names_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "run.toml", b'a = "ok"\nb = "\xff"\n')
    with pytest.raises(ConfigError, match="not UTF-8") as caught:
        read(path)
    assert caught.value.where == f"{path}:2"


@pytest.mark.parametrize(("suffix", "item"), [(".toml", "["), (".json", "["), (".yaml", "[")])
def test_bottomless_nesting_is_refused(tmp_path: Path, suffix: str, item: str) -> None:
    start = {".toml": "a = ", ".json": '{"a": ', ".yaml": "a: "}[suffix]
    end = "}" if suffix == ".json" else ""
    with pytest.raises(ConfigError, match="nested too deep"):
        read(write(tmp_path, f"run{suffix}", start + "[" * 5000 + "]" * 5000 + end))


def test_a_missing_file_is_missing_input_and_lists_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, "sft.toml", "a = 1")
    with pytest.raises(
        InputMissing, match=r"there is no config file .*stf\.toml(.|\n)*has sft\.toml"
    ) as caught:
        read(tmp_path / "stf.toml")
    assert caught.value.exit_code == 66


def test_a_folder_is_no_config_file(tmp_path: Path) -> None:
    with pytest.raises(InputMissing):
        read(tmp_path)


def test_an_unknown_suffix_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"end in \.toml, \.yaml, \.yml, \.json or \.py, not '\.ini'"
    ) as caught:
        read(write(tmp_path, "run.ini", "a=1"))
    assert caught.value.exit_code == 78


@pytest.mark.parametrize(
    "text",
    [
        "def get_config():\n  return {'a': {'b': (1, 2)}}",
        "from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({'a': {'b': (1, 2)}})",
    ],
    ids=["dict", "ConfigDict"],
)
def test_a_python_config_returns_a_dict_or_a_config_dict(tmp_path: Path, text: str) -> None:
    assert read(write(tmp_path, "run.py", text)).data == {"a": {"b": (1, 2)}}


@pytest.mark.parametrize(
    ("text", "message"),
    [("x = 1", "there is no function get_config"), ("def get_config():\n  return [1]", "returned list")],
)
def test_a_python_config_without_a_dict_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(write(tmp_path, "run.py", text))


@pytest.mark.parametrize("text", ["def get_config():\n  return 1 / 0", "x = 1\ny = x / 0"])
def test_what_a_python_config_raises_is_the_users_and_names_its_line(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, "run.py", text)
    with pytest.raises(UserCodeError, match="raised ZeroDivisionError: division by zero") as caught:
        read(path)
    assert caught.value.where == f"{path}:2"
