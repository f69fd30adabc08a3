"""Rows of every layout people use, as messages, prompt and completion, or text."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ntjax.data.chat import canonical, check_layout, formatted
from ntjax.errors import BadData, InputMissing, UserCodeError

NAMES = ("text_field", "messages_field", "prompt_field", "response_field")


def fields(**names):
    return SimpleNamespace(**(dict.fromkeys(NAMES) | names))


def shaped(row, chat=True, **names):
    return canonical(row, fields(**names), "d.jsonl:17", chat=chat)


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


TALK = turns(("system", "s"), ("user", "u"), ("assistant", "a"))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"conversations": TALK},
        {
            "conversations": [
                {"from": f, "value": v} for f, v in [("system", "s"), ("human", "u"), ("gpt", "a")]
            ]
        },
        {
            "conversations": [{"from": f, "value": v} for f, v in [("human", "u"), ("gpt", "a")]],
            "system": "s",
        },
        {"messages": [{**turn, "tool_calls": None, "name": None} for turn in TALK]},  # as parquet fills them
    ],
)
def test_conversations(row):
    assert shaped(row) == {"messages": TALK}


@pytest.mark.parametrize("answer", ["completion", "response"])
def test_prompt_and_completion(answer):
    assert shaped({"prompt": "p", answer: "c"}) == {"prompt": "p", "completion": "c"}
    assert shaped({"prompt": TALK[:2], answer: TALK[2:]}) == {"prompt": TALK[:2], "completion": TALK[2:]}


def test_text():
    assert shaped({"text": "t", "id": 3}) == {"text": "t"}


@pytest.mark.parametrize(("more", "question"), [("", "i"), ("x", "i\nx"), (None, "i")])
def test_an_instruction_is_a_user_turn_where_there_is_a_template(more, question):
    assert shaped({"instruction": "i", "input": more, "output": "o"}) == {
        "prompt": turns(("user", question)),
        "completion": turns(("assistant", "o")),
    }


def test_an_instruction_is_text_under_headings_where_there_is_none():
    row = {"instruction": "i", "input": "x", "output": "o"}
    prompt = "### Instruction:\ni\n\n### Input:\nx\n\n### Response:\n"
    assert shaped(row, chat=False) == {"prompt": prompt, "completion": "o"}
    prompt = "### Instruction:\ni\n\n### Response:\n"
    assert shaped({"instruction": "i", "output": "o"}, chat=False) == {"prompt": prompt, "completion": "o"}


def test_named_columns_come_before_usual_ones():
    row = {"messages": TALK, "question": "q", "answer": "a", "body": "b"}
    assert shaped(row, prompt_field="question", response_field="answer") == {"prompt": "q", "completion": "a"}
    assert shaped(row, text_field="body") == {"text": "b"}
    assert shaped({"text": "t", "dialog": TALK}, messages_field="dialog") == {"messages": TALK}
    usual = {"text_field": "text", "prompt_field": "prompt", "response_field": "response"}
    assert shaped(row, **usual) == {"messages": TALK}


def test_an_instruction_named_by_the_config_is_still_one():
    """The columns are the same, and `input` must not get lost."""
    row = {"instruction": "i", "input": "x", "output": "o"}
    assert shaped(row, prompt_field="instruction", response_field="output") == shaped(row)


def test_tools_and_template_options_are_carried():
    extra = {"tools": [{"name": "f"}], "chat_template_kwargs": {"enable_thinking": False}}
    assert shaped({"messages": TALK, **extra}) == {"messages": TALK, **extra}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    tool = [*turns(("user", "u")), {**call, "content": None}, *turns(("tool", "4"), ("assistant", "a"))]
    assert shaped({"messages": tool})["messages"][1] == call


@pytest.mark.parametrize(
    ("row", "where", "says"),
    [
        (
            {"messages": [*TALK, *turns(("bot", "x"))]},
            "messages[3].role",
            "'bot' isn't a role; allowed: human",
        ),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "null isn't a role"),
        ({"messages": turns(("user", None))}, "messages[0].content", "null isn't text"),
        ({"messages": turns(("user", [{"type": "text"}]))}, "messages[0].content", "isn't text"),
        ({"messages": turns(("user", "a"), ("user", "b"))}, "messages[1].role", "'user' follows 'user'"),
        ({"messages": turns(("assistant", "a"))}, "messages[0].role", "'assistant' comes first"),
        ({"messages": turns(("user", "a"), ("system", "b"))}, "messages[1].role", "'system' follows 'user'"),
        ({"messages": [], "system": "s"}, "messages", "[] isn't a list of messages"),
        (
            {"messages": turns(("gpt", "a")), "system": "s"},
            "messages[0].role",
            "'assistant' follows 'system'",
        ),
        ({"messages": None}, "messages", "null isn't a list of messages"),
        ({"messages": ["hi"]}, "messages[0]", "'hi' isn't a message"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "conversations[0].from", "'bot' isn't a role"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "conversations[0].value", "null isn't text"),
        ({"prompt": "p", "completion": None}, "completion", "null isn't text"),
        ({"prompt": "p", "completion": "so \ud83d"}, "completion", "'\\ud83d' at character 3 is half of one"),
        ({"prompt": TALK[:2], "completion": "c"}, "prompt", "isn't text"),
        (
            {"prompt": TALK, "completion": TALK[2:]},
            "completion[0].role",
            "'assistant' follows 'assistant'",
        ),
        ({"instruction": "i", "output": 3}, "output", "3 isn't text"),
        ({"text": 3}, "text", "3 isn't text"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role", "['user'] isn't a role"),
        ({"messages": TALK, "tools": "[{"}, "tools", "not JSON"),
        ({"messages": TALK, "chat_template_kwargs": [1]}, "chat_template_kwargs", "[1] isn't a dict"),
    ],
)
def test_bad_rows_say_where(row, where, says):
    with pytest.raises(BadData) as caught:
        shaped(row)
    assert caught.value.where == f"d.jsonl:17 {where}"
    assert says in str(caught.value)


def test_a_row_without_known_columns_lists_its_columns():
    with pytest.raises(BadData, match="columns: 'a', 'b'"):
        shaped({"a": 1, "b": 2})


def test_columns_that_are_not_there_are_missing_input():
    with pytest.raises(InputMissing) as caught:
        check_layout(
            {"question": "q", "answers": "a"}, fields(prompt_field="question", response_field="answer"), "d:1"
        )
    assert "no column 'answer'; did you mean 'answers'? There is 'question', 'answers'" in str(caught.value)
    with pytest.raises(InputMissing, match="no known columns. There is 'a'"):
        check_layout({"a": 1}, fields(), "d:1")
    check_layout({"text": "t"}, fields(), "d:1")


def test_formatting_func_gives_a_text_a_row_or_several():
    def rows(made):
        return formatted({"a": "x"}, lambda row: made, "d:1", None)

    assert rows("t") == [{"text": "t"}]
    assert rows({"prompt": "p"}) == [{"prompt": "p"}]
    assert rows(["t", {"prompt": "p"}]) == [{"text": "t"}, {"prompt": "p"}]


def test_a_formatting_func_that_fails_is_user_code():
    with pytest.raises(
        UserCodeError, match=r"d:9: formatting_func raised KeyError at .*test_chat\.py:\d+: 'b'"
    ):
        formatted({"a": 1}, lambda row: row["b"], "d:9", None)
    with pytest.raises(UserCodeError, match="returned null; allowed: a string, a dict, or a list"):
        formatted({"a": 1}, lambda row: None, "d:9", None)
