"""Rows of text as tokens, and what becomes of long ones."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, disable_progress_bars
from trl.data_utils import pack_dataset

from ntjax.data.batch import Example, collate
from ntjax.data.encoded import Encoded, encode_rows
from ntjax.data.files import Table
from ntjax.data.loader import Plan
from ntjax.data.pack import first_fit, split, wrapped
from ntjax.data.text import TextEncoder, encode_text_rows
from ntjax.errors import BadData, InputMissing
from tests.data.test_trl_parity import by_trl
from tests.tiny import tiny_tokenizer

FIELDS = SimpleNamespace(text_field=None)
TEXT = "The capital of France is Paris."
disable_progress_bars()


def encoder(**options):
    return TextEncoder(**{"tokenizer": tiny_tokenizer(None), "fields": FIELDS, **options})


def documents(*lengths):
    """Documents of these lengths; the tokens of the first are 0, 1, ..., of the second 100, 101, ..."""

    def encode(row, where):
        tokens = np.arange(row["n"], dtype=np.int32) + 100 * row["i"]
        return [Example(tokens, np.arange(row["n"]) > 0)]

    return encode_rows(Table("d", [{"n": n, "i": i} for i, n in enumerate(lengths)]), encode)


def pieces(encoded: Encoded):
    return [
        (one.tokens.tolist(), one.mask.astype(int).tolist())
        for one in map(encoded.example, range(len(encoded)))
    ]


@pytest.mark.parametrize("template", [None, "chatml", "llama2"])
def test_a_document_is_what_trl_makes_of_it(template):
    tokenizer = tiny_tokenizer(template)
    [ours] = encoder(tokenizer=tokenizer)({"text": TEXT}, "t:1")
    ids, _ = by_trl({"text": TEXT}, tokenizer)
    assert ours.tokens.tolist() == ids
    assert ours.tokens[-1] == tokenizer.eos_token_id
    assert ours.mask.tolist() == [False] + [True] * (len(ids) - 1)


def test_an_end_that_is_there_is_not_added_again():
    [once], [again] = (encoder()({"text": text}, "t:1") for text in (TEXT, TEXT + "<|endoftext|>"))
    assert once.tokens.tolist() == again.tokens.tolist()


def test_the_column_of_the_text_has_a_name():
    one = encoder(fields=SimpleNamespace(text_field="body"))
    assert len(encode_text_rows(Table("d.jsonl", [{"body": TEXT, "text": 1}]), one)) == 1


def test_a_column_that_is_not_there():
    rows = Table("d.jsonl", [{"txt": TEXT, "id": 1}], [1])
    with pytest.raises(InputMissing) as error:
        encode_text_rows(rows, encoder())
    assert str(error.value) == (
        "d.jsonl:1: no column 'text'; did you mean 'txt'? There is 'txt', 'id'\n"
        "  fix: name the column of the text with text_field"
    )


def test_conversations_are_not_text():
    with pytest.raises(InputMissing, match="There is 'messages'"):
        encode_text_rows(Table("d", [{"messages": [{"role": "user", "content": "a"}]}]), encoder())


def test_a_later_row_without_text_is_a_bad_row():
    rows = Table("d.jsonl", [{"text": TEXT}, {"text": None}, {"other": 1}], [1, 2, 3])
    with pytest.raises(BadData, match=r"d.jsonl:2 text: null isn't text"):
        encode_text_rows(rows, encoder())
    assert encode_text_rows(rows, encoder(), max_bad_rows=2).bad == 2


def test_formatting_func_makes_texts_of_rows():
    def both(row):
        return [row["title"], {"text": row["body"]}]

    titled = Table("d", [{"title": "The sea", "body": TEXT}])
    encoded = encode_text_rows(titled, encoder(formatting_func=both))
    alone = [encoder()({"text": text}, "")[0].tokens.tolist() for text in ("The sea", TEXT)]
    assert [encoded.example(i).tokens.tolist() for i in range(2)] == alone


def test_max_length_cuts_the_end_off():
    [whole], [cut] = (encoder(max_length=n)({"text": TEXT}, "t:1") for n in (None, 4))
    assert cut.tokens.tolist() == whole.tokens[:4].tolist()
    assert (whole.truncated, cut.truncated) == (False, True)


def test_pieces_of_a_long_document():
    # The first token of a piece has nothing before it in its row, so it isn't learned.
    assert pieces(split(documents(2, 7, 6), 3)) == [
        ([0, 1], [0, 1]),
        ([100, 101, 102], [0, 1, 1]),
        ([103, 104, 105], [0, 1, 1]),
        ([106], [0]),
        ([200, 201, 202], [0, 1, 1]),
        ([203, 204, 205], [0, 1, 1]),
    ]


def test_pieces_know_the_row_they_come_from_and_nothing_is_cut_off():
    encoded = split(documents(2, 7, 3), 3)
    assert encoded.sources.tolist() == [0, 1, 1, 1, 2]
    assert not encoded.truncated.any()
    assert encoded.read == 3


def test_wrapped_rows_by_hand():
    assert pieces(wrapped(documents(2, 7, 3), 4)) == [
        ([0, 1], [0, 1]),
        ([100, 101], [0, 1]),
        ([102, 103, 104, 105], [0, 1, 1, 1]),
        ([106], [0]),
        ([200, 201, 202], [0, 1, 1]),
    ]


def test_first_fit_of_wrapped_pieces_is_the_stream_cut_into_rows():
    rng = np.random.default_rng(0)
    encoded = documents(*rng.integers(2, 90, 40))
    made = wrapped(encoded, 32)
    packs = first_fit(made.lengths.tolist(), 32)
    assert sum(packs, []) == list(range(len(made)))
    assert [int(made.lengths[pack].sum()) for pack in packs[:-1]] == [32] * (len(packs) - 1)
    assert made.tokens.tolist() == encoded.tokens.tolist()


def test_documents_of_a_wrapped_row_are_segments_of_their_own():
    made = wrapped(documents(2, 7, 3), 4)
    batch = collate([[made.example(i) for i in pack] for pack in first_fit(made.lengths.tolist(), 4)], 4, 9)
    assert batch["tokens"].tolist() == [[0, 1, 100, 101], [102, 103, 104, 105], [106, 200, 201, 202]]
    assert batch["segments"].tolist() == [[1, 1, 2, 2], [1, 1, 1, 1], [1, 2, 2, 2]]
    assert batch["positions"].tolist() == [[0, 1, 0, 1], [0, 1, 2, 3], [0, 0, 1, 2]]
    assert batch["mask"].astype(int).tolist() == [[0, 1, 0, 1], [0, 1, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize(("strategy", "cut"), [("wrapped", wrapped), ("bfd_split", split)])
def test_rows_hold_what_trls_hold(strategy, cut):
    encoded = documents(*np.random.default_rng(1).integers(2, 90, 30))
    made = cut(encoded, 32)
    plan = Plan(made.lengths, 32, 1, shuffle=False, packing=True)
    ours = [np.concatenate([made.example(i).tokens for i in pack]).tolist() for pack in plan.packs]
    whole = [encoded.example(i).tokens.tolist() for i in range(len(encoded))]
    theirs = pack_dataset(Dataset.from_dict({"input_ids": whole}), 32, strategy)["input_ids"]
    if strategy == "wrapped":
        assert ours == theirs
    else:  # best fit finds other neighbours than first fit, for the same pieces
        assert sorted(sum(ours, [])) == sorted(sum(theirs, []))
