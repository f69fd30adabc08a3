"""Ready-made rewards, those that TRL has too beside TRL's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trl.rewards import accuracy_reward, get_soft_overlong_punishment, think_format_reward

from ntjax.errors import ConfigError
from ntjax.rewards.ready import find


def ask(name: str, *texts: str, folder: Path = Path(), **columns: list[Any]) -> list[float | None]:
    return find(name, folder)(
        completions=list(texts), completion_ids=[[1] * len(text) for text in texts], **columns
    )


def turns(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_exact_match() -> None:
    assert ask("exact_match", " Paris\n", "paris", answer=["Paris", "Paris"]) == [1, 0]
    assert ask('exact_match("right")', "a", right=["a"]) == [1]


def test_numeric_takes_the_last_number_of_both() -> None:
    found = ask("numeric", "6 - 1 is 5.", "1,234.50", "none", "7", answer=["#### 5", 1234.5, "5", "none"])
    assert found == [1, 1, 0, None]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7-5", 5),
        ("= -5", -5),
        ("$-5$", -5),
        ("1,234,567", 1234567),
        ("1,2", 2),
        (".5", 0.5),
        ("2e-3.", 0.002),
    ],
)
def test_what_a_number_is(text: str, value: float) -> None:
    assert ask("numeric", text, answer=[value]) == [1]


MATHS = [
    (r"So it is \boxed{\frac{1}{2}}.", r"$0.5$"),
    (r"So it is \boxed{3}.", r"$\frac{1}{2}$"),
    (r"\boxed{x^2 + 2x + 1}", r"$(x+1)^2$"),
    ("It is 4.", r"$4$"),
    (r"\boxed{4}", ""),
]


def test_boxed_maths_as_trl() -> None:
    texts, solutions = [list(column) for column in zip(*MATHS, strict=True)]
    wanted = accuracy_reward(turns(*texts), solutions)
    assert ask("boxed_math", *texts, solution=solutions) == wanted
    assert set(wanted) == {1.0, 0.0, None}


def test_the_format_of_thoughts_as_trl() -> None:
    texts = ["<think>a\nb</think>\nc", "<think>a", "<think>a<think>b</think>c", "no", "<think></think>"]
    assert ask("think_format_reward", *texts) == think_format_reward(turns(*texts))


def test_format_is_of_the_whole_completion() -> None:
    assert ask(r"format('a+b')", "aab", "aabc", "b") == [1, 0, 0]


def test_length_and_overlong_count_tokens() -> None:
    texts = ["a" * n for n in (3, 80, 85, 100, 120)]
    assert ask("length(3, 80)", *texts) == [1, 1, 0, 0, 0]
    theirs = get_soft_overlong_punishment(100, 20)([[1] * len(text) for text in texts])
    assert ask("get_soft_overlong_punishment(100, 20)", *texts) == pytest.approx(theirs)


def test_json_schema(tmp_path: Path) -> None:
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    (tmp_path / "s.json").write_text(json.dumps(schema))
    texts = ['{"a": 1}', 'Here:\n```json\n{"a": 2}\n```', '{"a": "x"}', "{a: 1}"]
    assert ask("json_schema('s.json')", *texts, folder=tmp_path) == [1, 1, 0, 0]


@pytest.mark.parametrize("name", ["length(1)", "format('(')", "length(open('x'), 2)", "exact"])
def test_mistakes(name: str) -> None:
    with pytest.raises(ConfigError):
        find(name, Path())
