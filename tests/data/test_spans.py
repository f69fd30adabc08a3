"""What is learned of conversations of several turns."""

from __future__ import annotations

import pytest

from ntjax.data.encode import encode_sft
from ntjax.errors import BadData, ConfigError
from tests.tiny import tiny_tokenizer


def talk(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *turns]}


def learned(tokenizer, row, **options):
    """The stretches that are learned, as text."""
    example = encode_sft(row, tokenizer, max_length=1000, **options)
    stretches, before = [], False
    for token, mask in zip(example.tokens.tolist(), example.mask.tolist(), strict=True):
        if mask:
            stretches = [*stretches[:-1], [*stretches[-1], token]] if before else [*stretches, [token]]
        before = mask
    return [tokenizer.decode(stretch) for stretch in stretches]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("chatml", ["two<|im_end|>\n", "four<|im_end|>\n"]),
        ("llama2", [" two </s>", " four </s>"]),
        ("generation", ["two<|im_end|>", "four<|im_end|>"]),
        ("thinking", ["two<|im_end|>\n", "<think>\n\n</think>\n\nfour<|im_end|>\n"]),
    ],
)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_every_answer_with_its_stop_token_and_nothing_else(template, expected, system):
    assert learned(tiny_tokenizer(template), talk("one", "two", "three", "four", system=system)) == expected


@pytest.mark.parametrize("template", ["chatml", "llama2", "generation", "thinking"])
def test_tokens_of_one_character_are_all_learned(template):
    """An emoji is four byte tokens, a CJK character three, all of the same character of the text."""
    tokenizer = tiny_tokenizer(template)
    row = talk("🙂", "🙂", "日本 é", "日本 👩‍👩‍👧", "🙂", "ok 🙂")
    texts = learned(tokenizer, row)
    assert len(texts) == 3
    for text, answer in zip(texts, ["🙂", "日本 👩‍👩‍👧", "ok 🙂"], strict=True):
        assert answer in text
        assert "\ufffd" not in text


def test_a_last_question_is_not_learned():
    assert learned(tiny_tokenizer("chatml"), talk("one", "two", "three")) == ["two<|im_end|>\n"]


def test_answers_that_repeat_the_questions_are_told_apart():
    row = talk("no", "no", "no", "no")
    assert learned(tiny_tokenizer("llama2"), row) == [" no </s>", " no </s>"]
    assert len(learned(tiny_tokenizer("thinking"), row)) == 2


def test_a_thought_the_template_drops_is_not_looked_for():
    row = talk("one", "<think>\nhm\n</think>\n\ntwo", "three", "four")
    assert learned(tiny_tokenizer("thinking"), row)[0] == "two<|im_end|>\n"


def test_a_token_across_the_header_is_learned():
    """The header ends in a newline, the answer starts with two, and two newlines are a token."""
    texts = learned(tiny_tokenizer("chatml"), talk("one", "\n\ntwo", "three", "four"))
    assert texts[0] == "\n\n\ntwo<|im_end|>\n"


def test_several_turns_are_their_single_turns():
    """The mask of turn k is that of the conversation which ends there."""
    tokenizer = tiny_tokenizer("chatml")
    row = talk("one", "two", "three", "four")
    whole = encode_sft(row, tokenizer, max_length=1000)
    first = encode_sft({"messages": row["messages"][:2]}, tokenizer, max_length=1000)
    prompt, completion = row["messages"][:3], row["messages"][3:]
    last = encode_sft({"prompt": prompt, "completion": completion}, tokenizer, max_length=1000)
    n = len(first.tokens)
    assert whole.tokens.tolist() == last.tokens.tolist()
    assert (whole.mask[:n] == first.mask).all()
    assert (whole.mask[n:] == last.mask[n:]).all()


def test_train_on_prompt_learns_all_but_the_first():
    example = encode_sft(
        talk("one", "two", "three", "four"), tiny_tokenizer(), max_length=1000, train_on_prompt=True
    )
    assert example.mask.tolist() == [False] + [True] * (len(example.tokens) - 1)


def test_conversations_need_a_template():
    tokenizer = tiny_tokenizer(None)
    tokenizer.name_or_path = "tiny/base"
    with pytest.raises(ConfigError, match="tiny/base has no chat template"):
        encode_sft(talk("one", "two"), tokenizer, max_length=10)


def test_what_the_template_refuses_is_bad_data():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(BadData, match="d:3: the chat template refuses this conversation: no system turns"):
        encode_sft(talk("one", "two", system="s"), tokenizer, max_length=10, where="d:3")


def test_a_turn_that_cannot_be_found_is_refused_rather_than_guessed():
    tokenizer = tiny_tokenizer("thinking")
    tokenizer.chat_template += "{{ messages[1]['content'] }}"
    with pytest.raises(ConfigError, match="shows turn 1 2 times"):
        encode_sft(talk("one", "two", "three", "four"), tokenizer, max_length=10)
