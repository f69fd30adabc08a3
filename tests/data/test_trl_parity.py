"""Token ids and masks are TRL 1.16's, computed here by TRL itself from the same rows."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, disable_progress_bars
from trl import SFTTrainer

from ntjax.data.chat import canonical
from ntjax.data.encode import encode_sft
from tests.tiny import tiny_tokenizer

FIELDS = SimpleNamespace(text_field=None, messages_field=None, prompt_field=None, response_field=None)
disable_progress_bars()


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def by_trl(row, tokenizer, max_length=1000, completion_only=True, assistant_only=False):
    """(ids, which of them are learned), or None where TRL drops the row."""
    trainer = SimpleNamespace(
        _tokenizer=tokenizer, chat_template=tokenizer.chat_template, completion_only_loss=completion_only
    )
    args = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        max_length=max_length,
        truncation_mode="keep_start",
        assistant_only_loss=assistant_only,
        shuffle_dataset=False,
    )
    made = SFTTrainer._prepare_dataset(
        trainer,
        Dataset.from_list([row]),
        tokenizer,
        args,
        packing=False,
        formatting_func=None,
        dataset_name="t",
    )
    if not len(made):
        return None
    return made[0]["input_ids"], [label != -100 for label in made[0]["labels"]]


def by_us(row, tokenizer, max_length=1000, **options):
    shaped = canonical(row, FIELDS, "t:1", chat=tokenizer.chat_template is not None)
    return encode_sft(shaped, tokenizer, max_length=max_length, **options)


def assert_same(ours, theirs):
    ids, learned = theirs
    assert ours.tokens.tolist() == ids
    assert not ours.mask[0]  # TRL's shift drops this label
    assert ours.mask[1:].tolist() == learned[1:]


PLAIN = [
    ("The capital of", " France is Paris."),
    ("ends in a space ", "and goes on"),
    ("line\n", "\n\nline"),  # newlines merge across the border
    ("日本の首都は", "東京です 🙂"),
    ("", "no prompt at all"),
    ("done already", " yes<|im_end|>"),
]


@pytest.mark.parametrize(("prompt", "completion"), PLAIN)
@pytest.mark.parametrize("template", [None, "chatml", "llama2"])
def test_plain_prompt_and_completion(template, prompt, completion):
    tokenizer = tiny_tokenizer(template)
    row = {"prompt": prompt, "completion": completion}
    assert_same(by_us(row, tokenizer), by_trl(row, tokenizer))


CHATS = [
    ([user("What is the capital of France?")], [assistant("Paris.")]),
    ([user("hi")], [assistant("\n\n two newlines first")]),
    ([{"role": "system", "content": "Be brief."}, user("hi 🙂")], [assistant("你好，世界 👩‍👩‍👧")]),
    ([user("1"), assistant("2"), user("3")], [assistant("4")]),
    ([user("1")], [assistant("2"), user("3"), assistant("4")]),
    ([user("hi")], [assistant("")]),
]


@pytest.mark.parametrize(("prompt", "completion"), CHATS)
@pytest.mark.parametrize("template", ["chatml", "llama2", "generation", "thinking"])
def test_conversational_prompt_and_completion(template, prompt, completion):
    tokenizer = tiny_tokenizer(template)
    row = {"prompt": prompt, "completion": completion}
    assert_same(by_us(row, tokenizer), by_trl(row, tokenizer))


@pytest.mark.parametrize(("prompt", "completion"), [chat for chat in CHATS if len(chat[1]) == 1][:3])
@pytest.mark.parametrize("template", ["chatml", "llama2", "thinking"])
def test_messages_with_one_answer_are_its_prompt_and_completion(template, prompt, completion):
    tokenizer = tiny_tokenizer(template)
    ours = by_us({"messages": prompt + completion}, tokenizer)
    assert_same(ours, by_trl({"prompt": prompt, "completion": completion}, tokenizer))


def test_train_on_prompt_learns_what_trl_learns_without_completion_only_loss():
    tokenizer = tiny_tokenizer("chatml")
    prompt, completion = CHATS[0]
    row = {"prompt": prompt, "completion": completion}
    ours = by_us(row, tokenizer, train_on_prompt=True)
    assert_same(ours, by_trl(row, tokenizer, completion_only=False))
    assert ours.mask.sum() == len(ours.tokens) - 1


@pytest.mark.parametrize("text", ["The sea is wide.", "ends itself<|im_end|>", "🙂", "a\r\n\tb"])
def test_text_ends_with_one_end_of_sequence(text):
    tokenizer = tiny_tokenizer("chatml")
    ours = by_us({"text": text}, tokenizer)
    assert_same(ours, by_trl({"text": text}, tokenizer))
    assert ours.tokens.tolist().count(tokenizer.eos_token_id) == 1


def test_generation_marks_are_those_of_assistant_only_loss():
    tokenizer = tiny_tokenizer("generation")
    row = {"messages": [user("hi"), assistant("yo 🙂"), user("and?"), assistant("日本")]}
    assert_same(by_us(row, tokenizer), by_trl(row, tokenizer, assistant_only=True))


def test_truncation_keeps_the_start():
    """At the prompt's length TRL drops the row and we have nothing to learn; one token more, and one is."""
    tokenizer = tiny_tokenizer("chatml")
    row = {"prompt": [user("What is 1?")], "completion": [assistant("A number.")]}
    whole = by_us(row, tokenizer)
    prompt = int(whole.mask.argmax())
    for max_length in (1, prompt, prompt + 1, len(whole.tokens) - 1, len(whole.tokens)):
        ours, theirs = by_us(row, tokenizer, max_length), by_trl(row, tokenizer, max_length)
        assert ours.truncated == (max_length < len(whole.tokens))
        assert int(ours.mask.sum()) == max(0, max_length - prompt)
        assert (theirs is None) == (max_length <= prompt)
        if theirs is not None:
            assert_same(ours, theirs)


def test_tools_and_template_options_reach_the_template():
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = "{{ tools | tojson if tools else '' }}{{ flavour }}" + tokenizer.chat_template
    tools = '[{"type": "function", "function": {"name": "add"}}]'
    prompt, completion = CHATS[0]
    row = {
        "prompt": prompt,
        "completion": completion,
        "tools": tools,
        "chat_template_kwargs": {"flavour": "x"},
    }
    ours = by_us(row, tokenizer)
    assert_same(ours, by_trl(row, tokenizer))
    assert tokenizer.decode(ours.tokens).startswith('[{"type": "function"')


def test_random_strings_agree():
    """The longest common prefix of tokens, on strings made to merge across borders."""
    tokenizer = tiny_tokenizer("chatml")
    rng = np.random.default_rng(0)
    pieces = ["\n", "\n\n", " ", "  ", "the", " the", "capital", "🙂", "é", "\t", "in", "g", "<|im_end|>"]
    for _ in range(20):
        left, right = ("".join(rng.choice(pieces, 6)) for _ in range(2))
        for row in (
            {"prompt": left, "completion": right},
            {"prompt": [user(left)], "completion": [assistant(right)]},
        ):
            assert_same(by_us(row, tokenizer), by_trl(row, tokenizer))
