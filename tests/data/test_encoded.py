"""A data set as flat arrays: counts, budgets, the digest."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from ntjax.data.batch import Example
from ntjax.data.encode import SftEncoder, check_stop_token, encode_sft_rows, learned_stops
from ntjax.data.encoded import encode_rows
from ntjax.data.files import Table
from ntjax.data.rows import open_rows
from ntjax.errors import BadData, ConfigError, InputMissing, UserCodeError
from tests.tiny import tiny_tokenizer

FIELDS = SimpleNamespace(text_field=None, messages_field=None, prompt_field=None, response_field=None)
GOOD = [{"prompt": f"{i} +", "completion": f" {i}"} for i in range(10)]


def counted(row, where):
    """`n` tokens 0, 1, ..., of which the last `learned` are learned."""
    if row["n"] is None:
        raise BadData("null isn't a number", where=where)
    tokens = np.arange(row["n"], dtype=np.int32)
    return [Example(tokens, (tokens > 0) & (tokens >= row["n"] - row["learned"]), row.get("cut", False))]


def rows(*pairs, **more):
    return Table("d.jsonl", [{"n": n, "learned": learned, **more} for n, learned in pairs], range(1, 1000))


def encoder(**options):
    return SftEncoder(**{"tokenizer": tiny_tokenizer(), "fields": FIELDS, "max_length": 100, **options})


def test_examples_end_to_end():
    encoded = encode_rows(rows((3, 1), (2, 1)), counted)
    assert encoded.tokens.tolist() == [0, 1, 2, 0, 1]
    assert encoded.mask.tolist() == [False, False, True, False, True]
    assert encoded.offsets.tolist() == [0, 3, 5]
    assert encoded.lengths.tolist() == [3, 2]
    assert encoded.example(1).tokens.tolist() == [0, 1]
    assert (encoded.tokens.dtype, encoded.mask.dtype, encoded.offsets.dtype) == (np.int32, np.bool_, np.int64)


def test_a_batch_is_the_examples_of_each_slot():
    encoded = encode_rows(rows((3, 1), (2, 1)), counted)
    batch = encoded.batch([[1, 0], []], length=6, documents=2, pad_id=9)
    assert batch["tokens"].tolist() == [[0, 1, 0, 1, 2, 9], [9] * 6]
    assert batch["segments"].tolist() == [[1, 1, 2, 2, 2, 0], [0] * 6]
    assert encoded.sizes.tolist() == [3, 2]


def test_rows_with_nothing_to_learn_are_dropped_and_counted():
    encoded = encode_rows(rows((3, 1), (3, 0), (2, 1)), counted)
    assert (len(encoded), encoded.read, encoded.nothing_to_learn) == (2, 3, 1)
    assert encoded.sources.tolist() == [0, 2]
    assert (
        encoded.report() == "2 examples of 3 rows, 2 of 5 tokens learned (40%)\n1 dropped: nothing to learn"
    )


@pytest.mark.parametrize("pairs", [[(3, 0)], [(3, 0), (3, 0), (3, 1)]])
def test_more_than_half_with_nothing_to_learn_is_an_error(pairs):
    with pytest.raises(
        BadData, match="have nothing to learn; in [12] of them the prompt alone fills max_length"
    ):
        encode_rows(rows(*pairs, cut=True), counted)


def test_bad_rows_within_the_budget_are_passed_over_and_shown():
    encoded = encode_rows(rows((3, 1), (None, 0), (2, 1)), counted, max_bad_rows=1)
    assert (len(encoded), encoded.bad) == (2, 1)
    assert encoded.report().splitlines()[1:] == ["1 bad rows passed over", "d.jsonl:2: null isn't a number"]


def test_bad_rows_over_the_budget_are_an_error():
    data = rows((None, 0), (3, 1), (None, 0))
    with pytest.raises(BadData, match="d.jsonl:1: null isn't a number"):
        encode_rows(data, counted)
    with pytest.raises(BadData, match=r"2 bad rows, and max_bad_rows is 1:\n  d.jsonl:1: .*\n  d.jsonl:3: "):
        encode_rows(data, counted, max_bad_rows=1)


def test_a_malformed_line_is_a_bad_row(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps(GOOD[0]) + "\n{oops\n" + json.dumps(GOOD[1]) + "\n")
    source = SimpleNamespace(
        **vars(FIELDS),
        dataset_path="d.jsonl",
        dataset_name=None,
        dataset_split=None,
        num_samples=None,
        dataset_kwargs={},
    )
    opened = open_rows(source, [tmp_path])
    assert len(encode_sft_rows(opened, encoder(), max_bad_rows=1)) == 2
    with pytest.raises(BadData, match="d.jsonl:2: not JSON"):
        encode_sft_rows(opened, encoder())


def test_ids_the_model_does_not_have_are_an_error():
    encode_rows(rows((8, 1)), counted, vocab_size=8)
    with pytest.raises(BadData, match="d.jsonl:2: token 8 isn't one of the model's 8"):
        encode_rows(rows((8, 1), (9, 1)), counted, vocab_size=8, max_bad_rows=5)


def test_the_digest_sees_tokens_masks_and_borders():
    digests = [
        encode_rows(rows(*pairs), counted).digest() for pairs in ([(4, 1)], [(4, 2)], [(5, 1)], [(4, 1)])
    ]
    assert digests[0] == digests[3]
    assert len(set(digests)) == 3
    assert len(digests[0]) == 32


def test_unknown_columns_are_missing_input():
    with pytest.raises(InputMissing, match="d.jsonl:1: no known columns"):
        encode_sft_rows(Table("d.jsonl", [{"a": 1}], [1]), encoder(), max_bad_rows=10)


def test_formatting_func_may_make_several_examples_of_a_row():
    data = Table("d", [{"a": "x"}, {"a": "y"}])
    twice = encode_sft_rows(data, encoder(formatting_func=lambda row: [row["a"], row["a"] * 2]))
    assert twice.sources.tolist() == [0, 0, 1, 1]
    with pytest.raises(UserCodeError, match="d row 1: formatting_func raised KeyError"):
        encode_sft_rows(data, encoder(formatting_func=lambda row: row["b"]), max_bad_rows=10)


def test_progress_is_told():
    seen = []
    encode_rows(rows((3, 1), (3, 1)), counted, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_workers_give_the_same():
    data = Table("d.jsonl", GOOD * 60, range(1, 601))
    one, two = (encode_sft_rows(data, encoder(), workers=workers) for workers in (1, 2))
    assert one.digest() == two.digest()
    assert one.sources.tolist() == two.sources.tolist()


def test_workers_need_what_can_be_sent():
    with pytest.raises(ConfigError, match="preprocessing_num_workers = 2"):
        encode_sft_rows(Table("d", GOOD), encoder(formatting_func=lambda row: row), workers=2)


@pytest.mark.parametrize(
    ("eos", "template", "stops", "says"),
    [
        ("<|im_end|>", None, ["<|im_end|>"], None),
        (
            "<|endoftext|>",
            None,
            ["<|im_end|>"],
            "turns end with '<|im_end|>', but the tokenizer's eos_token is '<|endoftext|>'",
        ),
        (
            "<|im_end|>",
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}",
            [],
            "no stop token",
        ),
    ],
)
def test_the_stop_token_is_checked(eos, template, stops, says):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = eos
    tokenizer.chat_template = template or tokenizer.chat_template
    data = Table("d", [{"instruction": "add", "output": "5"}])
    encoded = encode_sft_rows(data, encoder(tokenizer=tokenizer))
    assert tokenizer.convert_ids_to_tokens(learned_stops(encoded, tokenizer)) == stops
    warning = check_stop_token(encoded, tokenizer)
    assert warning is None if says is None else says in warning
