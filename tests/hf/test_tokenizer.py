"""Tokenizers keep what they came with, and exported models know where to stop."""

from __future__ import annotations

import json

import pytest

from ntjax.errors import BadData, ConfigError, InputMissing, Refused
from ntjax.hf.tokenizer import (
    check_vocab,
    generation_config,
    load_tokenizer,
    pad_id,
    save_generation_config,
    save_tokenizer,
)
from tests.tiny import tiny_tokenizer


@pytest.fixture
def padless(tmp_path):
    """A folder with a tokenizer that ends with id 2 and has no padding token."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    save_tokenizer(tokenizer, tmp_path / "padless")
    return tmp_path / "padless"


def test_a_tokenizer_comes_back_as_it_was_saved(tmp_path):
    tokenizer = tiny_tokenizer()
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(tmp_path)
    turns = [{"role": "user", "content": "Hello, how are you?\n\n1 + 1 = 2"}]
    assert again.apply_chat_template(turns, tokenize=False) == tokenizer.apply_chat_template(
        turns, tokenize=False
    )
    assert again("Hello 12\n\n")["input_ids"] == tokenizer("Hello 12\n\n")["input_ids"]
    assert (again.pad_token_id, again.eos_token_id) == (0, 2)


def test_without_a_padding_token_rows_are_filled_with_the_end_token(padless):
    assert pad_id(load_tokenizer(padless)) == 2


def test_the_borrowed_padding_token_is_never_saved(padless, tmp_path):
    tokenizer = load_tokenizer(padless)
    save_tokenizer(tokenizer, tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").pad_token is None
    assert "pad_token_id" not in generation_config(None, tokenizer)


def test_a_tokenizer_without_an_end_is_a_config_error(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    save_tokenizer(tokenizer, tmp_path)
    with pytest.raises(ConfigError, match="no eos_token") as error:
        load_tokenizer(tmp_path)
    assert error.value.exit_code == 78


def test_a_token_without_a_row_in_the_embedding_is_found_before_a_look_up_clamps_it():
    tokenizer = tiny_tokenizer()
    check_vocab(tokenizer, len(tokenizer))
    with pytest.raises(
        BadData, match=f"max id {len(tokenizer) - 1} .* >= embedding rows {len(tokenizer) - 1}"
    ):
        check_vocab(tokenizer, len(tokenizer) - 1)
    tokenizer.add_tokens(["<pad>"])
    with pytest.raises(BadData, match="'<pad>'"):
        check_vocab(tokenizer, len(tokenizer) - 1)


def test_a_tokenizer_that_is_code_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["tokenization.Mine", null]}}'
    )
    with pytest.raises(Refused, match="auto_map"):
        load_tokenizer(tmp_path)


def test_no_tokenizer_and_a_broken_one(tmp_path):
    with pytest.raises(InputMissing, match="no tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadData, match="can't be read"):
        load_tokenizer(tmp_path)


def test_the_trained_end_is_put_first_and_the_sources_settings_are_kept(tmp_path):
    (tmp_path / "generation_config.json").write_text(
        '{"eos_token_id": 0, "temperature": 0.6, "do_sample": true}'
    )
    config = generation_config(tmp_path, tiny_tokenizer(), stops=[4])
    assert config == {
        "eos_token_id": [2, 4, 0], "temperature": 0.6, "do_sample": True, "pad_token_id": 0,
    }  # fmt: skip


def test_one_end_is_written_as_a_number(tmp_path):
    save_generation_config(tmp_path, None, tiny_tokenizer("llama2"))
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written == {"eos_token_id": 4, "bos_token_id": 3, "pad_token_id": 0}
