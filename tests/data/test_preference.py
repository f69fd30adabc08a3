"""Rows of preferences of every layout people use, as prompt, chosen and rejected."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from trl import extract_prompt

from ntjax.data.preference import check_columns, preference, split_prompt
from ntjax.errors import BadData, InputMissing

NAMES = ("prompt_field", "chosen_field", "rejected_field")


def fields(**names):
    return SimpleNamespace(**(dict.fromkeys(NAMES) | names))


def shaped(row, **names):
    return preference(row, fields(**names), "d.jsonl:17")


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


ASKED, YES, NO = turns(("user", "u")), turns(("assistant", "yes")), turns(("assistant", "no"))
EXPLICIT = {"prompt": ASKED, "chosen": YES, "rejected": NO}


def test_text_stays_as_it_is():
    row = {"prompt": "p", "chosen": " yes", "rejected": " no", "id": 3}
    assert shaped(row) == {"prompt": "p", "chosen": " yes", "rejected": " no"}
    assert shaped({"chosen": "p yes", "rejected": "p no"}) == {"chosen": "p yes", "rejected": "p no"}


@pytest.mark.parametrize(
    "row",
    [
        EXPLICIT,
        {"prompt": "u", "chosen": YES, "rejected": NO},  # text before an answer is the user's turn
        {"prompt": ASKED, "chosen": YES[0], "rejected": NO[0]},
        {
            "prompt": [{"from": "human", "value": "u"}],
            "chosen": {"from": "gpt", "value": "yes"},
            "rejected": {"from": "gpt", "value": "no"},
        },
    ],
)
def test_a_prompt_and_two_answers(row):
    assert shaped(row) == EXPLICIT
    assert split_prompt(shaped(row), "d") == EXPLICIT


@pytest.mark.parametrize("more", [{}, {"prompt": "u"}])
def test_conversations_that_begin_with_the_prompt(more):
    """Text beside them repeats what is in them."""
    row = shaped({"chosen": ASKED + YES, "rejected": ASKED + NO, **more})
    assert row == {"chosen": ASKED + YES, "rejected": ASKED + NO}
    assert split_prompt(row, "d") == EXPLICIT


@pytest.mark.parametrize("row", [EXPLICIT, {"chosen": ASKED + YES, "rejected": ASKED + NO}])
def test_a_system_turn_may_have_a_column(row):
    system = turns(("system", "s"))
    split = split_prompt(shaped({**row, "system": "s"}), "d")
    assert split == {**EXPLICIT, "prompt": system + ASKED}


def test_columns_have_the_names_the_config_gives():
    row = {"question": "q", "good": "a", "bad": "b", "prompt": "p", "chosen": "c"}
    names = {"prompt_field": "question", "chosen_field": "good", "rejected_field": "bad"}
    assert shaped(row, **names) == {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("\n\nHuman: hi\n\nAssistant: yes", "\n\nHuman: hi\n\nAssistant: no", "\n\nHuman: hi\n\nAssistant:"),
        ("the sea", "the sky", "the s"),
        ("a b c", "a b d", "a b"),  # the space is the answers'
        ("a  b", "a  c", "a "),  # one space
        ("same", "same", "sam"),
        ("short", "short and more", "shor"),
        ("ends ", "ends in a space", "ends"),
    ],
)
def test_texts_begin_with_the_prompt(chosen, rejected, prompt):
    row = {"chosen": chosen, "rejected": rejected}
    split = split_prompt(row, "d")
    assert split == extract_prompt(row)
    assert split["prompt"] == prompt


@pytest.mark.parametrize(("chosen", "rejected"), [("yes", "no"), ("yes ", "no"), ("", "no")])
def test_texts_that_differ_at_once_have_an_empty_prompt(chosen, rejected):
    """TRL takes the last character of "yes " for one before the answers."""
    assert split_prompt({"chosen": chosen, "rejected": rejected}, "d")["prompt"] == ""


def test_margins_tools_and_template_options_are_carried():
    extra = {"tools": [{"name": "f"}], "chat_template_kwargs": {"enable_thinking": False}}
    assert shaped({**EXPLICIT, **extra, "margin": "0.5"}) == {**EXPLICIT, **extra, "margin": 0.5}


@pytest.mark.parametrize(
    ("change", "where", "says"),
    [
        ({"prompt": None}, " prompt", "null isn't a list of messages"),
        ({"chosen": "yes"}, " rejected", "isn't text"),
        ({"prompt": "p", "chosen": None, "rejected": "b"}, " chosen", "null isn't text"),
        ({"rejected": []}, " rejected", "[] isn't a list of messages"),
        ({"rejected": turns(("bot", "x"))}, " rejected[0].role", "'bot' isn't a role"),
        ({"rejected": ASKED}, " rejected[0].role", "'user' follows 'user'"),
        ({"prompt": YES}, " prompt[0].role", "'assistant' comes first"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, " prompt", "3 isn't text"),
        ({"margin": "wide"}, " margin", "'wide' isn't a number"),
        ({"margin": None}, " margin", "null isn't a number"),
        ({"margin": float("nan")}, " margin", "nan isn't a number"),
    ],
)
def test_bad_rows_say_where(change, where, says):
    with pytest.raises(BadData) as caught:
        shaped(EXPLICIT | change)
    assert caught.value.where == f"d.jsonl:17{where}"
    assert says in str(caught.value)


def test_conversations_without_a_turn_in_common_have_no_prompt():
    row = {"chosen": turns(("user", "a"), ("assistant", "b")), "rejected": turns(("user", "c"))}
    with pytest.raises(BadData, match="d:1: chosen and rejected differ from their first turn on"):
        split_prompt(row, "d:1")


def test_columns_that_are_not_there_are_missing_input():
    with pytest.raises(InputMissing) as caught:
        check_columns({"choosen": "a", "rejected": "b"}, fields(), "d:1")
    assert "d:1: no column 'chosen'; did you mean 'choosen'? There is 'choosen', 'rejected'" in str(
        caught.value
    )
    with pytest.raises(InputMissing, match="no column 'prompt'. There is 'chosen', 'rejected'"):
        check_columns({"chosen": "a", "rejected": "b"}, fields(prompt_field="prompt"), "d:1")
    with pytest.raises(BadData, match="d.jsonl:17: no column 'rejected'; columns: 'chosen'"):
        shaped({"chosen": "a"})
