"""inspect and generate: text in, text out.

A turn is learned with all that the chat template puts after it: the end of turn, and ChatML's newline.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.process import Result, cold, devices, write_rows
from tests.tiny import tiny_tokenizer

TURNS = [
    ("system", "You are small.", False),
    ("user", "What is the sea?", False),
    ("assistant", "It is blue.", True),
    ("user", "And the sky?", False),
    ("assistant", "It is wide.", True),
]


@pytest.fixture(scope="module")
def chats(place: Path, config: Callable[..., Path]) -> Path:
    """The config of a data set of conversations: one of five turns, one of two."""
    rows = [[{"role": role, "content": text} for role, text, _ in turns] for turns in (TURNS, TURNS[:3])]
    write_rows(place / "chats.jsonl", [{"messages": row} for row in rows])
    return config("chats", dataset={"dataset_path": "chats.jsonl", "max_length": 256})


def test_inspect_shows_the_tokens_that_are_learned(ntjax: Callable[..., Result], chats: Path) -> None:
    ended = ntjax("inspect", "--config", chats, "--json")
    assert ended.code == 0, ended.err
    rows = [json.loads(line) for line in ended.out.splitlines()]
    assert len(rows) == 2
    text = "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said, _ in TURNS)
    tokenizer = tiny_tokenizer()
    encoding = tokenizer(text, return_offsets_mapping=True)
    spans = [
        (text.index(said), text.index(said) + len(said + "<|im_end|>\n")) for _, said, ours in TURNS if ours
    ]
    expected = [
        any(first <= start and end <= last for first, last in spans)
        for start, end in encoding["offset_mapping"]
    ]
    row = rows[0]
    assert row["tokens"] == encoding["input_ids"]
    assert row["mask"] == expected
    assert "".join(row["text"]) == text
    assert row["truncated"] is False
    learned = "".join(piece for piece, mine in zip(rows[1]["text"], rows[1]["mask"], strict=True) if mine)
    assert (
        learned == "It is blue.<|im_end|>\n"
    )  # a lone answer is learned with what the template puts after it


def test_inspect_marks_what_is_learned_where_there_are_no_colours(
    ntjax: Callable[..., Result], chats: Path
) -> None:
    ended = ntjax("inspect", "--config", chats, "--rows", "1", "datasets.sft.max_length=44")
    assert ended.code == 0, ended.err
    assert "[[It is blue.<|im_end|>\n]]<|im_start|>user" in ended.out
    assert "-- 44 tokens, " in ended.out
    assert ", truncated" in ended.out
    assert "\x1b" not in ended.out


def generated(result: Result) -> list[dict[str, Any]]:
    assert result.code == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


def test_generate_takes_the_likeliest_tokens(ntjax: Callable[..., Result], place: Path, whole: Path) -> None:
    """A prompt alone is completed as it is among others, of other lengths, and as it was before."""
    model = "generate", "--model", whole / "sft_stage", "--max-new-tokens", "12"
    write_rows(place / "texts.jsonl", [{"prompt": text} for text in ("What is sea 0?", "One two three", "?")])
    rows = generated(ntjax(*model, "--prompts", "texts.jsonl", "--json"))
    assert [row["prompt"] for row in rows] == ["What is sea 0?", "One two three", "?"]
    for row in rows:
        assert list(row)[:4] == ["prompt", "completion", "tokens", "logprobs"]
        assert 0 < len(row["tokens"]) == len(row["logprobs"]) <= 12
        assert all(value <= 0 for value in row["logprobs"])
    (alone,) = generated(ntjax(*model, "--prompt", "One two three", "--json"))
    assert alone["tokens"] == rows[1]["tokens"]
    assert alone["logprobs"] == pytest.approx(rows[1]["logprobs"], abs=1e-5)
    printed = ntjax(*model, "--prompt", "One two three")
    assert printed.out == alone["completion"] + "\n"


def test_a_seed_draws_the_same_again(ntjax: Callable[..., Result], place: Path, whole: Path) -> None:
    model = (
        "generate",
        "--model",
        whole / "sft_stage",
        "--max-new-tokens",
        "12",
        "--json",
        "--temperature",
        "1",
    )
    write_rows(place / "drawn.jsonl", [{"prompt": "What is sea 0?"}] * 3)
    drawn = generated(ntjax(*model, "--prompts", "drawn.jsonl", "--seed", "3"))
    assert len({tuple(row["tokens"]) for row in drawn}) == 3
    (alone,) = generated(ntjax(*model, "--prompt", "What is sea 0?", "--seed", "3"))
    assert alone["tokens"] == drawn[0]["tokens"]
    (other,) = generated(ntjax(*model, "--prompt", "What is sea 0?", "--seed", "4"))
    assert other["tokens"] != drawn[0]["tokens"]


def test_raw_text_is_completed_without_the_chat_template(ntjax: Callable[..., Result], whole: Path) -> None:
    model = (
        "generate",
        "--model",
        whole / "sft_stage",
        "--max-new-tokens",
        "4",
        "--prompt",
        "What is",
        "--json",
    )
    raw, asked = (generated(ntjax(*model, *flag))[0] for flag in (["--raw"], []))
    assert raw["logprobs"] != asked["logprobs"]


def test_a_command_from_nothing_prints_the_same(
    ntjax: Callable[..., Result], place: Path, chats: Path
) -> None:
    args = "inspect", "--config", str(chats), "--json"
    ended = cold(place, args, devices(1))
    assert ended.code == 0, ended.err
    assert ended.out == ntjax(*args).out


def test_inspect_shows_both_documents_of_a_pair(
    ntjax: Callable[..., Result], place: Path, config: Callable[..., Path]
) -> None:
    row = {"prompt": "What is the sea?", "chosen": " It is blue.", "rejected": " It is 7."}
    write_rows(place / "one_pair.jsonl", [row])
    dataset = {"dataset_path": "one_pair.jsonl", "max_length": 64}
    args = "inspect", "--config", config("pairs", {"stage_type": "dpo"}, dataset=dataset)
    plain, as_json = ntjax(*args), ntjax(*args, "--json")
    assert (plain.code, as_json.code) == (0, 0), plain.err + as_json.err
    chosen, rejected = plain.out.split("rejected:\n")
    assert chosen.startswith("chosen:\nWhat is the sea?[[ It is blue.<|im_end|>]]\n-- ")
    assert rejected.startswith("What is the sea?[[ It is 7.<|im_end|>]]\n-- ")
    shown = [json.loads(line) for line in as_json.out.splitlines()]
    assert [one["part"] for one in shown] == ["chosen", "rejected"]
    assert [list(one) for one in shown] == [["part", "tokens", "text", "mask", "truncated"]] * 2
    assert "".join(shown[1]["text"]) == "What is the sea? It is 7.<|im_end|>"
