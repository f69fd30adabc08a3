"""Prompts: what is asked, and what rewards see of a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ntjax.config import DatasetConfig
from ntjax.data.prompts import PromptEncoder, Prompts, encode_prompts
from ntjax.data.rows import open_rows
from ntjax.errors import BadData, InputMissing
from tests.cli.process import write_rows
from tests.tiny import tiny_tokenizer


def prompts(folder: Path, rows: list[dict[str, Any]], *, max_length: int = 64, **fields: Any) -> Prompts:
    path = write_rows(folder / "rows.jsonl", rows)
    bad = fields.pop("max_bad_rows", 0)
    dataset = DatasetConfig(dataset_path=str(path), **fields)
    encoder = PromptEncoder(tiny_tokenizer(), dataset, max_length)
    return encode_prompts(open_rows(dataset, [folder]), encoder, max_bad_rows=bad)


def test_a_conversation_is_rendered_up_to_where_the_answer_begins(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}]
    found = prompts(tmp_path, [{"prompt": turns, "answer": "5"}])
    tokenizer = tiny_tokenizer()
    wanted = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert list(found.kept[0].tokens) == wanted
    assert found.kept[0].said == turns


def test_text_is_taken_as_it_is(tmp_path: Path) -> None:
    found = prompts(tmp_path, [{"question": "1 + 1 ="}], prompt_field="question")
    assert list(found.kept[0].tokens) == tiny_tokenizer()("1 + 1 =")["input_ids"]
    assert found.kept[0].said == "1 + 1 ="


def test_rewards_see_every_column_but_those_they_are_given_otherwise(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "answer": 1}, {"prompt": "c", "level": [2]}]
    found = prompts(tmp_path, rows)
    assert found.columns([1, 0, 1]) == {"answer": [None, 1, None], "level": [[2], None, [2]]}


def test_a_prompt_that_is_too_long_is_dropped_and_counted(tmp_path: Path) -> None:
    found = prompts(tmp_path, [{"prompt": "a"}, {"prompt": "b c d e f g"}, {"prompt": "h"}], max_length=4)
    assert [prompt.said for prompt in found.kept] == ["a", "h"]
    assert "1 longer than max_length dropped" in found.report()
    with pytest.raises(BadData, match="longer than max_length"):
        prompts(tmp_path, [{"prompt": "b c d e f g"}], max_length=4)


def test_a_row_that_is_answered_already_or_empty_is_refused_by_its_place(tmp_path: Path) -> None:
    answered = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    with pytest.raises(BadData, match=r"last turn is the assistant's") as error:
        prompts(tmp_path, [{"prompt": answered}])
    assert "rows.jsonl:1 prompt" in str(error.value)
    with pytest.raises(BadData, match="empty prompt"):
        prompts(tmp_path, [{"prompt": ""}])
    with pytest.raises(InputMissing, match="prompt_field"):
        prompts(tmp_path, [{"question": "?"}])


def test_the_digest_changes_with_tokens_and_with_columns(tmp_path: Path) -> None:
    digests = {
        prompts(tmp_path, [row]).digest()
        for row in ({"prompt": "a", "x": 1}, {"prompt": "b", "x": 1}, {"prompt": "a", "x": 2})
    }
    assert len(digests) == 3
