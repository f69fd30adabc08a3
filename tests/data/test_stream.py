"""Streamed rows: what is in them, what is read for them, and where a resumed run goes on."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from ntjax.data.batch import Example
from ntjax.data.lazy import open_lazily
from ntjax.data.loader import Plan, batches
from ntjax.data.pack import wrapped
from ntjax.data.rows import open_rows
from ntjax.data.stream import Stream, ahead
from ntjax.data.text import TextEncoder, encode_text_rows
from ntjax.errors import BadData, ConfigError, InputMissing
from tests.data.test_rows import lines, source, written
from tests.tiny import tiny_tokenizer

LENGTHS = [3, 6, 2, 9, 4, 5, 1, 17, 2]


class Numbered:
    """Row i is a document of `lengths[i]` tokens 100 i, 100 i + 1, ...; None is a bad row."""

    def __init__(self, lengths=LENGTHS):
        self.lengths, self.opened, self.read, self.encoded = lengths, [], [], []

    def __call__(self, start):
        self.opened.append(start)
        for number in range(start, len(self.lengths)):
            self.read.append(number)
            yield (lambda number=number: {"n": number}), f"d:{number + 1}"

    def encode(self, row, where):
        length = self.lengths[row["n"]]
        if length is None:
            raise BadData("null isn't text", where=where)
        self.encoded.append(row["n"])
        return [Example(100 * row["n"] + np.arange(length, dtype=np.int32), np.arange(length) > 0)]


def stream(numbered, length=4, rows=2, accumulation=1, position=None, **options):
    return Stream(numbered, numbered.encode, length, rows, accumulation, 9, position, **options)


def steps(one, count):
    return list(itertools.islice(one, count))


def same(a, b):
    return a[1:] == b[1:] and all(np.array_equal(a[0][name], b[0][name]) for name in a[0])


def test_rows_by_hand():
    # Documents 0 1 2, 100..105, 200 201, and then from the start again.
    (batch, position, tokens), (following, end, _) = steps(stream(Numbered([3, 6, 2])), 2)
    assert batch["tokens"].tolist() == [[[0, 1, 2, 100], [101, 102, 103, 104]]]
    assert batch["segments"].tolist() == [[[1, 1, 1, 2], [1, 1, 1, 1]]]
    assert batch["positions"].tolist() == [[[0, 1, 2, 0], [0, 1, 2, 3]]]
    assert batch["mask"].astype(int).tolist() == [[[0, 1, 1, 0], [0, 1, 1, 1]]]
    assert (position, tokens) == ({"epoch": 0, "row": 1, "token": 5, "bad": 0}, 8)
    assert following["tokens"].tolist() == [[[105, 200, 201, 0], [1, 2, 100, 101]]]
    assert following["segments"].tolist() == [[[1, 2, 2, 3], [1, 1, 2, 2]]]
    assert end == {"epoch": 1, "row": 1, "token": 2, "bad": 0}


@pytest.mark.parametrize("done", range(1, 9))
def test_a_resumed_stream_gives_the_very_same_batches(done):
    whole = steps(stream(Numbered(), accumulation=2), 12)
    saved = json.loads(json.dumps(whole[done - 1][1]))
    rest = steps(stream(Numbered(), accumulation=2, position=saved), 12 - done)
    assert all(same(a, b) for a, b in zip(rest, whole[done:], strict=True))


def test_resuming_reads_no_row_before_the_position():
    numbered = Numbered([5] * 100)
    next(stream(numbered, position={"epoch": 0, "row": 60, "token": 2, "bad": 0}))
    assert numbered.opened == [60]
    assert numbered.encoded == [60, 61]  # three tokens are left of row 60, and eight are wanted


def test_rows_are_read_when_they_are_needed():
    numbered = Numbered([4] * 1_000_000)
    next(stream(numbered))
    assert numbered.read == [0, 1]


def test_the_thread_ahead_reads_a_few_batches_and_no_more():
    numbered = Numbered([4] * 1_000_000)
    iterator = ahead(stream(numbered))
    ours = steps(iterator, 5)
    iterator.close()
    assert all(same(a, b) for a, b in zip(ours, steps(stream(Numbered([4] * 100)), 5), strict=True))
    assert len(numbered.read) <= 2 * (5 + 4)


def test_an_error_in_the_thread_is_raised_where_the_batch_would_have_come():
    iterator = ahead(stream(Numbered([8, None])))
    next(iterator)
    with pytest.raises(BadData, match="d:2: null isn't text"):
        next(iterator)
    iterator.close()


def test_processes_share_the_rows_of_every_microbatch():
    whole = steps(stream(Numbered(), rows=4, accumulation=2), 3)
    parts = [
        steps(stream(Numbered(), rows=4, accumulation=2, process_index=i, process_count=2), 3) for i in (0, 1)
    ]
    for step, (batch, position, tokens) in enumerate(whole):
        first, second = (part[step] for part in parts)
        assert np.array_equal(np.concatenate([first[0]["tokens"], second[0]["tokens"]], 1), batch["tokens"])
        assert first[1:] == second[1:] == (position, tokens)


def test_bad_rows_are_passed_over_up_to_a_number_that_a_resume_remembers():
    lengths = [8, None, 8, None, 8]
    made = steps(stream(Numbered(lengths), max_bad_rows=2), 3)
    assert [position["bad"] for _, position, _ in made] == [0, 1, 2]
    with pytest.raises(BadData, match="d:4"):
        steps(stream(Numbered(lengths), max_bad_rows=1, position=made[1][1]), 1)


def test_a_source_without_text():
    with pytest.raises(BadData, match="no text"):
        next(stream(Numbered([1, 1])))
    with pytest.raises(BadData, match="no text"):
        next(stream(Numbered([])))


def test_a_row_may_be_several_documents():
    def encode(row, where):
        return [Example(np.asarray(t, np.int32), np.arange(len(t)) > 0) for t in ([1, 2, 3], [4, 5])]

    def rows(start):
        return iter([(dict, "d")])

    whole = steps(Stream(rows, encode, 4, 1, 1, 9), 6)
    assert whole[0][0]["tokens"].tolist() == [[[1, 2, 3, 4]]]
    assert whole[0][1] == {"epoch": 0, "row": 0, "token": 4, "bad": 0}
    rest = steps(Stream(rows, encode, 4, 1, 1, 9, whole[0][1]), 5)
    assert all(same(a, b) for a, b in zip(rest, whole[1:], strict=True))


def test_the_first_pass_is_the_plan_of_wrapped_rows(tmp_path):
    texts = [{"text": "The sea is wide. " * n} for n in (1, 7, 2, 4, 3, 9)]
    path = written(tmp_path, "d.jsonl", lines(texts))
    encoder = TextEncoder(tiny_tokenizer(None), source(path))
    encoded = wrapped(encode_text_rows(open_rows(source(path), []), encoder), 16)
    plan = Plan(encoded.lengths, 16, 1, shuffle=False, packing=True)
    full = len(encoded.tokens) // 16
    streamed = Stream(open_lazily(source(path), []), encoder, 16, 1, 1, 0)
    for ours, (theirs, _, _) in zip(batches(plan, encoded, 0), steps(streamed, full), strict=False):
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def opened(path, start=0, **options):
    return [(read(), where) for read, where in open_lazily(source(path, **options), [])(start)]


CONTENTS = {
    "d.jsonl": '\ufeff{"text": "a\\n"}\n\n{"text": "日本"}\n{"text": "c", "n": 1}',
    "d.csv": '\ufefftext,n\n"a, b\nc",1\n\n日本,2\n',
    "d.tsv": "text\tn\na\t1\n日本\t2\n",
    "d.txt": "one\n\n日本\nthree",
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("start", [0, 1])
def test_rows_and_places_are_those_of_files_read_whole(tmp_path, name, start):
    path = written(tmp_path, name, CONTENTS[name])
    whole = open_rows(source(path), [])
    assert opened(path, start) == [(whole[i], whole.where(i)) for i in range(start, len(whole))]


def test_parquet_is_read_in_pieces(tmp_path):
    rows = [{"text": str(i)} for i in range(1000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet", row_group_size=300)
    made = opened(tmp_path / "d.parquet", 600)
    assert made == [(row, f"d.parquet row {i + 1}") for i, row in enumerate(rows)][600:]


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_documents_of_text_between_delimiters(tmp_path, chunk, monkeypatch):
    monkeypatch.setattr("ntjax.data.lazy.CHUNK", chunk)
    path = written(tmp_path, "d.txt", "one\nmore\n===\ntwo\r\n===\n\n===\nthree\n")
    whole = open_rows(source(path, txt_delimiter="\n===\n"), [])
    assert [row for row, _ in opened(path, txt_delimiter="\n===\n")] == list(whole)


def test_files_of_a_split_one_after_another(tmp_path):
    for name in ("train/b.jsonl", "train/a.jsonl", "test/c.jsonl"):
        written(tmp_path, name, lines([{"text": name}]))
    assert [row["text"] for row, _ in opened(tmp_path)] == ["train/a.jsonl", "train/b.jsonl"]
    assert [row["text"] for row, _ in opened(tmp_path, 1)] == ["train/b.jsonl"]
    assert [row["text"] for row, _ in opened(tmp_path, dataset_split="test")] == ["test/c.jsonl"]
    with pytest.raises(InputMissing, match="no split 'dev'; there is test, train"):
        opened(tmp_path, dataset_split="dev")


def test_a_malformed_line_is_an_error_only_when_it_is_parsed(tmp_path):
    path = written(tmp_path, "d.jsonl", '{"text": "a"}\n{"text": \n')
    first, (read, where) = open_lazily(source(path), [])(0)
    assert first[0]() == {"text": "a"}
    with pytest.raises(BadData, match=f"{where}: not JSON"):
        read()


@pytest.mark.parametrize("name", ["d.txt", "d.csv"])
def test_a_file_that_is_not_utf8(tmp_path, name):
    with pytest.raises(BadData, match=f"{name}: not UTF-8"):
        opened(written(tmp_path, name, b"text\n\xff\n"))


def test_what_can_not_be_streamed(tmp_path):
    array = written(tmp_path, "d.json", "[]")
    with pytest.raises(InputMissing, match="d.json can't be read row by row"):
        opened(array)
    with pytest.raises(ConfigError, match="dataset_kwargs"):
        opened(written(tmp_path, "d.jsonl", "{}"), dataset_kwargs={"name": "a"})
    text = written(tmp_path, "d.txt", "a|b")
    with pytest.raises(ConfigError, match="no fields"):
        opened(text, txt_delimiter="|")
    with pytest.raises(ConfigError, match="isn't counted"):
        opened(text, dataset_split="train[:10%]")


def test_hub_data_sets_are_streamed(tmp_path):
    path = written(tmp_path, "d.jsonl", lines([{"text": "a"}, {"text": "b"}]))
    hub = source(dataset_name="json", dataset_kwargs={"data_files": str(path)}, streaming=True)
    made = [(read(), where) for read, where in open_lazily(hub, [])(1)]
    assert made == [({"text": "b"}, "json row 2")]


def test_the_digest_of_files_changes_with_their_size(tmp_path):
    path = written(tmp_path, "d.jsonl", lines([{"text": "a"}]))
    before = open_lazily(source(path), []).digest()
    written(tmp_path, "d.jsonl", lines([{"text": "ab"}]))
    assert (before, open_lazily(source(path), []).digest()) == ("d.jsonl:14", "d.jsonl:15")
