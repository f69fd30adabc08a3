"""Files, folders and the hub: what is read, and what is said when it can't be."""

from __future__ import annotations

import json
from types import SimpleNamespace

import datasets
import pytest

from ntjax.data.rows import held_out, open_rows
from ntjax.errors import BadData, ConfigError, InputMissing, Refused

ROWS = [{"prompt": "a", "response": "1"}, {"prompt": "b, 日本", "response": "2"}]


def source(path=None, **options):
    defaults = {
        "dataset_name": None,
        "dataset_path": None if path is None else str(path),
        "dataset_split": None,
        "text_field": None,
        "num_samples": None,
        "streaming": False,
        "dataset_kwargs": None,
        "txt_delimiter": None,
        "txt_field_names": None,
    }
    return SimpleNamespace(**(defaults | options))


def written(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(path, **options):
    return list(open_rows(source(path, **options), []))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl", lines(ROWS)),
        ("d.json", json.dumps(ROWS)),
        ("d.json", lines(ROWS)),
        ("d.csv", 'prompt,response\na,1\n"b, 日本",2\n'),
        ("d.tsv", "prompt\tresponse\na\t1\nb, 日本\t2\n"),
        ("d.txt", "prompt|response\na|1\nb, 日本|2\n"),
    ],
)
@pytest.mark.parametrize(
    "mangle", [lambda b: b, lambda b: b"\xef\xbb\xbf" + b, lambda b: b.replace(b"\n", b"\r\n\r\n")]
)
def test_every_kind_gives_the_same_rows(tmp_path, name, content, mangle):
    """Also with a byte order mark, CRLF, blank lines."""
    path = written(tmp_path, name, mangle(content.encode()))
    assert read(path, txt_delimiter="|") == ROWS


def test_parquet_gives_the_same_rows(tmp_path):
    path = tmp_path / "d.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(path)
    assert read(path) == ROWS
    assert open_rows(source(path), []).where(1) == "d.parquet row 2"


def test_txt_is_lines_or_documents_or_fields(tmp_path):
    path = written(tmp_path, "d.txt", "one\ntwo|2\n\nthree\n")
    assert read(path) == [{"text": "one"}, {"text": "two|2"}, {"text": "three"}]
    assert read(path, text_field="body", txt_delimiter="\n\n") == [{"body": "one\ntwo|2"}, {"body": "three"}]
    path = written(tmp_path, "e.txt", 'a "quoted||1\nb||2\n')
    assert read(path, txt_delimiter="||", txt_field_names=["q", "a"]) == [
        {"q": 'a "quoted', "a": "1"},
        {"q": "b", "a": "2"},
    ]


def test_rows_end_at_newlines_alone(tmp_path):
    """Not at what else Unicode calls the end of a line, which is text."""
    said = "a\u2028b\x0cc\x85d"
    assert read(written(tmp_path, "d.txt", f"{said}\r\ntwo\n")) == [{"text": said}, {"text": "two"}]
    path = written(tmp_path, "d.csv", f"prompt,response\n{said},1\n")
    assert read(path) == [{"prompt": said, "response": "1"}]


def test_a_csv_value_keeps_its_newline_and_rows_their_first_line(tmp_path):
    path = written(tmp_path, "d.csv", 'text,id\n"two\nlines",1\nplain,2\n')
    rows = open_rows(source(path), [])
    assert list(rows) == [{"text": "two\nlines", "id": "1"}, {"text": "plain", "id": "2"}]
    assert [rows.where(i) for i in range(2)] == ["d.csv:2", "d.csv:4"]


def test_numbers_that_are_not_numbers_are_fine(tmp_path):
    (row,) = read(written(tmp_path, "d.jsonl", '{"text": "a", "score": NaN}\n'))
    assert row["score"] != row["score"]


def test_line_numbers_count_blank_lines(tmp_path):
    rows = open_rows(source(written(tmp_path, "d.jsonl", '\n{"a": 1}\n\n\n{"a": 2}')), [])
    assert [rows.where(i) for i in range(2)] == ["d.jsonl:2", "d.jsonl:5"]


def test_a_folder_is_its_files_sorted(tmp_path):
    written(tmp_path, "d/b.jsonl", lines(ROWS[1:]))
    written(tmp_path, "d/a/z.csv", "prompt,response\na,1\n")
    written(tmp_path, "d/README.md", "not data")
    written(tmp_path, "d/.hidden.jsonl", "not data")
    rows = open_rows(source(tmp_path / "d"), [])
    assert list(rows) == ROWS
    assert [rows.where(i) for i in range(2)] == ["a/z.csv:2", "b.jsonl:1"]


def test_splits_of_a_folder_are_told_by_names(tmp_path):
    for name, n in [("train-00000-of-00002", 4), ("train-00001-of-00002", 4), ("dev", 2)]:
        written(tmp_path, f"d/{name}.jsonl", lines({"text": f"{name} {i}"} for i in range(n)))
    assert len(read(tmp_path / "d")) == 8
    assert read(tmp_path / "d", dataset_split="validation") == [{"text": "dev 0"}, {"text": "dev 1"}]
    assert [row["text"][-1] for row in read(tmp_path / "d", dataset_split="train[:75%]")] == list("012301")
    assert len(read(tmp_path / "d", dataset_split="train+validation")) == 10
    assert len(read(tmp_path / "d", dataset_split="train[:2]+validation", num_samples=3)) == 3
    assert len(open_rows(source(tmp_path / "d"), [], split="validation")) == 2


def test_num_samples_are_the_first(tmp_path):
    path = written(tmp_path, "d.jsonl", lines({"text": str(i)} for i in range(9)))
    assert read(path, num_samples=2) == [{"text": "0"}, {"text": "1"}]
    assert read(path, num_samples=2, dataset_split="train[5:]") == [{"text": "5"}, {"text": "6"}]
    assert len(read(path, num_samples=20)) == 9


def test_rows_held_out_are_drawn_and_the_rest_is_trained_on(tmp_path):
    rows = open_rows(source(written(tmp_path, "d.jsonl", lines({"text": i} for i in range(25)))), [])
    train, held = held_out(rows, 0.1, seed=1)
    numbers = [[row["text"] for row in some] for some in (train, held)]
    assert len(numbers[1]) == 3  # ceil(2.5)
    assert sorted(sum(numbers, [])) == list(range(25))
    assert all(some == sorted(some) for some in numbers)
    assert held.where(0) == f"d.jsonl:{numbers[1][0] + 1}"
    assert numbers[1] != [row["text"] for row in held_out(rows, 0.1, seed=2)[1]]


def test_relative_paths_are_looked_for_in_each_folder(tmp_path):
    (tmp_path / "first").mkdir()
    written(tmp_path, "second/d.jsonl", lines(ROWS))
    assert list(open_rows(source("d.jsonl"), [tmp_path / "first", tmp_path / "second"])) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "where", "says"),
    [
        ("d.jsonl", '{"a": 1}\n{"a": \n', "d.jsonl:2", "not JSON: Expecting value, at column 7"),
        ("d.jsonl", '{"a": 1}\n[1]\n', "d.jsonl:2", "a row must be an object, not an array"),
        ("d.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "d.jsonl:2", "not UTF-8"),
        ("d.json", '[{"a": 1},\n nope]', "d.json:2", "not JSON"),
        ("d.json", '[{"a": 1}, null]', "d.json row 2", "a row must be an object, not null"),
        ("d.csv", "a,b\n1,2\n3\n", "d.csv:3", "1 fields, but there are 2 columns: a, b"),
        ("d.csv", "a,a\n1,2\n", "d.csv:1", "named twice"),
        ("d.csv", b"a,b\n1,\xff\n", "d.csv:2", "not UTF-8"),
        ("d.txt", "q|a\n1|2|3\n", "d.txt:2", "3 fields, but there are 2 columns: q, a"),
        ("d.parquet", "nothing of the kind", "d.parquet", "not parquet"),
        ("d.jsonl", "\n\n", "d.jsonl", "no rows"),
        ("d.csv", "a,b\n", "d.csv", "no rows"),
        ("d.json", "[]", "d.json", "no rows"),
    ],
)
def test_bad_files_say_where(tmp_path, name, content, where, says):
    path = written(tmp_path, name, content)
    with pytest.raises(BadData) as caught:
        read(path, txt_delimiter="|")
    assert caught.value.where == where
    assert says in str(caught.value)


def test_a_missing_path_lists_what_is_there(tmp_path):
    written(tmp_path, "train.jsonl", lines(ROWS))
    written(tmp_path, "eval.jsonl", lines(ROWS))
    with pytest.raises(InputMissing) as caught:
        open_rows(source("trian.jsonl"), [tmp_path])
    assert "did you mean 'train.jsonl'?" in str(caught.value)
    assert "eval.jsonl, train.jsonl" in str(caught.value)


def test_a_missing_split_lists_the_splits(tmp_path):
    written(tmp_path, "d/train.jsonl", lines(ROWS))
    written(tmp_path, "d/test.jsonl", lines(ROWS))
    with pytest.raises(InputMissing, match="no split 'validation'; there is test, train"):
        read(tmp_path / "d", dataset_split="validation")
    with pytest.raises(InputMissing, match="no split 'test'; there is train"):
        read(tmp_path / "d/train.jsonl", dataset_split="test")
    with pytest.raises(ConfigError, match="train\\[:"):
        read(tmp_path / "d", dataset_split="train[:")


@pytest.mark.parametrize(
    ("error", "options", "says"),
    [
        (InputMissing, {}, ".md isn't a kind of data file; allowed: .jsonl, .json, .csv"),
        (ConfigError, {"dataset_kwargs": {"name": "x"}}, "dataset_kwargs"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, error, options, says):
    path = written(tmp_path, "d.md", "text")
    with pytest.raises(error, match=says):
        read(path, **options)


def test_a_folder_without_data_is_missing_input(tmp_path):
    with pytest.raises(InputMissing, match="no data file in"):
        read(tmp_path)


def test_names_and_options_go_to_load_dataset(tmp_path):
    """With a builder of `datasets` itself in the place of a hub name, nothing is fetched."""
    path = written(tmp_path, "d.jsonl", lines(ROWS))
    options = {"data_files": str(path), "cache_dir": str(tmp_path / "cache")}
    rows = open_rows(source(dataset_name="json", dataset_kwargs=options, num_samples=1), [])
    assert list(rows) == ROWS[:1]
    assert rows.where(0) == "json row 1"
    with pytest.raises(InputMissing, match="Should be one of \\['train'\\]"):
        open_rows(source(dataset_name="json", dataset_kwargs=options, dataset_split="test"), [])


def test_an_unreachable_hub_says_what_to_do(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputMissing) as caught:
        open_rows(source(dataset_name="owner/name"), [])
    for way_out in ("HF_ENDPOINT", "HF_TOKEN", "HTTPS_PROXY", "dataset_path"):
        assert way_out in str(caught.value)


def test_code_from_the_hub_is_never_run():
    with pytest.raises(Refused, match="trust_remote_code"):
        open_rows(source(dataset_name="owner/name", dataset_kwargs={"trust_remote_code": True}), [])
