"""inspect: what is shown of each stage, in colours and without, and what must not be trained on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.process import Result, devices, write_rows
from tests.tiny import CHATML, GENERATION, THINKING, tiny_model, tiny_tokenizer

CHATS = [
    [("user", "What is the sea?"), ("assistant", "It is blue.")],
    [("user", "And?"), ("assistant", "It is wide."), ("user", "And the sky?"), ("assistant", "It is blue.")],
]
COLOUR = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "200"}

Config = Callable[..., Path]
Ntjax = Callable[..., Result]


def talk(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture(scope="module")
def data(place: Path) -> Path:
    """The working folder, with data of every kind and a config of every stage."""
    write_rows(place / "talks.jsonl", [{"messages": talk(*turns)} for turns in CHATS])
    write_rows(
        place / "asks.jsonl",
        [{"prompt": talk(("user", f"{i} + 2?")), "answer": str(i + 2)} for i in range(4)],
    )
    answers = {"chosen": talk(("assistant", "It is blue.")), "rejected": talk(("assistant", "No."))}
    write_rows(place / "sides.jsonl", [{"prompt": talk(("user", "The sea?")), **answers}] * 3)
    write_rows(place / "texts.jsonl", [{"text": "The sea is wide and the sky is blue. " * 3}] * 4)
    stages = [
        ("pretrain", {}),
        ("sft", {}),
        ("reward", {}),
        ("dpo", {}),
        ("ppo", {"reward_function": ["numeric"]}),
        ("grpo", {"reward_function": ["numeric"], "num_generations": 2}),
    ]
    files = {
        "pretrain": "texts",
        "sft": "talks",
        "reward": "sides",
        "dpo": "sides",
        "ppo": "asks",
        "grpo": "asks",
    }
    lines = ["[model]", 'model_name_or_path = "model"']
    for kind, file in files.items():
        lines += [f"[datasets.{kind}]", f'dataset_path = "{file}.jsonl"', "max_length = 64"]
    for kind, given in stages:
        lines += [
            "[[stages]]",
            f'stage_type = "{kind}"',
            *(f"{k} = {json.dumps(v)}" for k, v in given.items()),
        ]
    (place / "chain_of_all.toml").write_text("\n".join(lines) + "\n")
    return place


def looked(ntjax: Ntjax, *args: object, env: dict[str, str] | None = None) -> Result:
    return ntjax("inspect", "--config", *args, env={**devices(1), **(env or {})})


@pytest.fixture(scope="module")
def modelled(place: Path) -> Callable[..., str]:
    """modelled("name", template="...", eos_token="..."): a copy of the model with these settings of its tokenizer."""

    def modelled(name: str, template: str | None = None, **settings: Any) -> str:
        folder = place / name
        if not folder.exists():
            shutil.copytree(place / "model", folder)
            if template is not None:
                (folder / "chat_template.jinja").write_text(template)
            path = folder / "tokenizer_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return name

    return modelled


def test_every_stage_is_shown_in_turn(ntjax: Ntjax, data: Path) -> None:
    ended = looked(ntjax, "chain_of_all.toml", "--stage", "all", "--rows", "1")
    assert ended.code == 0, ended.err
    names = [f"{kind}_stage:" for kind in ("pretrain", "sft", "reward", "dpo", "ppo", "grpo")]
    assert [line for line in ended.out.splitlines() if line in names] == names
    assert ended.out.count('rewards get: answer = "2"') == 2
    assert ended.out.count("chosen:\n") == ended.out.count("rejected:\n") == 2
    assert "the first step on one device: " in ended.out
    assert re.search(r"  row 1: docs \d, \d+ of 64 tokens, \d+ of padding", ended.out)
    assert re.search(r"  row 1: pairs \d, \d+ of 64 tokens", ended.out)


def test_lines_of_several_stages_say_which(ntjax: Ntjax, data: Path) -> None:
    ended = looked(ntjax, "chain_of_all.toml", "--stage", "all", "--rows", "1", "--json")
    assert ended.code == 0, ended.err
    rows = [json.loads(line) for line in ended.out.splitlines()]
    assert [row["stage"] for row in rows].count("dpo_stage") == 2
    alone = looked(ntjax, "chain_of_all.toml", "--stage", "sft", "--rows", "1", "--json")
    assert list(json.loads(alone.out)) == ["tokens", "text", "mask", "truncated"]


def test_prompts_are_shown_with_what_rewards_get(ntjax: Ntjax, data: Path) -> None:
    ended = looked(ntjax, "chain_of_all.toml", "--stage", "grpo", "--rows", "1")
    assert ended.code == 0, ended.err
    assert "<|im_start|>user\n0 + 2?<|im_end|>\n<|im_start|>assistant\n" in ended.out
    assert "0 learned (asks.jsonl:1)" in ended.out
    assert 'rewards get: answer = "2"' in ended.out


def test_what_was_cut_off_is_shown(ntjax: Ntjax, data: Path) -> None:
    ended = looked(ntjax, "chain_of_all.toml", "--stage", "sft", "datasets.sft.max_length=50", "--rows", "2")
    assert ended.code == 0, ended.err
    (cut,) = re.findall(r"~~(.*?) \.\.\.~~", ended.out, re.S)
    tokenizer = tiny_tokenizer()
    text = tokenizer.apply_chat_template(talk(*CHATS[1]), tokenize=False)
    assert cut == tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][50:62])


def test_colours_are_for_terminals(ntjax: Ntjax, data: Path) -> None:
    args = "chain_of_all.toml", "--stage", "sft", "datasets.sft.max_length=50"
    coloured = looked(ntjax, *args, env=COLOUR)
    assert coloured.code == 0, coloured.err
    assert "\x1b[1;32mIt is blue.<|im_end|>" in coloured.out  # bold green
    assert "\x1b[2m<|im_start|>" in coloured.out  # dim
    assert "\x1b[9;31m" in coloured.out  # red, struck out
    assert "[[" not in coloured.out
    for env in ({}, {**COLOUR, "NO_COLOR": "1"}):
        plain = looked(ntjax, *args, env=env)
        assert "\x1b" not in plain.out
        assert "[[It is blue.<|im_end|>" in plain.out
        assert "legend: [[learned]] | read, not learned | <image tokens> | ~~cut off~~" in plain.out


@pytest.fixture(scope="module")
def refused(ntjax: Ntjax, data: Path, config: Config) -> Callable[..., str]:
    """refused(rows, ...): why inspect ends with 65 after it has shown the rows."""

    def refused(rows: list[dict[str, Any]], model: str = "model", kind: str = "sft", **dataset: Any) -> str:
        write_rows(data / "spoilt_rows.jsonl", rows)
        found = {"dataset_path": "spoilt_rows.jsonl", "max_length": 256, **dataset}
        path = config("spoilt_rows", {"stage_type": kind}, dataset=found)
        ended = looked(ntjax, path, f"model.model_name_or_path={model}")
        assert ended.code == 65, ended.out + ended.err
        assert "legend: " in ended.out  # after the rows
        assert "Traceback" not in ended.err
        assert "spoilt_rows.jsonl:1" in ended.err
        assert ended.err.count("fix: ") == 1
        assert looked(ntjax, path, "--json", f"model.model_name_or_path={model}").code == 65
        return ended.err

    return refused


ROWS = [{"messages": talk(*turns)} for turns in CHATS]


def test_an_end_that_is_never_learned(refused: Callable[..., str], modelled: Callable[..., str]) -> None:
    outside = GENERATION.replace(
        "m['content'] + '<|im_end|>' }}{% endgen", "m['content'] }}{% endgen"
    ).replace("{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>' }}")
    said = refused(ROWS, modelled("outside", outside))
    assert "no end token is learned in any of 2 whole rows" in said
    assert "inside {% generation %}" in said
    open_ended = CHATML.replace("m['content'] + '<|im_end|>\n'", "m['content'] + '\n'")
    assert "end the assistant's turn with <|im_end|>" in refused(ROWS, modelled("open_ended", open_ended))


def test_answers_that_are_all_cut_off(refused: Callable[..., str]) -> None:
    rows = [{"messages": talk(("user", "The sea?"), ("assistant", "It is blue. " * 20))}] * 2
    assert "all 2 answers are cut off" in refused(rows, max_length=64)


def test_answers_that_are_all_empty(refused: Callable[..., str]) -> None:
    rows = [{"messages": talk(("user", "The sea?"), ("assistant", ""))}] * 2
    assert "all answers are empty" in refused(rows)


def test_pairs_of_the_same_answer(refused: Callable[..., str]) -> None:
    rows = [{"prompt": "The sea?", "chosen": " Blue.", "rejected": " Blue."}] * 2
    for kind in ("dpo", "reward"):
        assert "the same tokens in all 2 pairs" in refused(rows, kind=kind)


def test_a_template_of_another_model(refused: Callable[..., str], modelled: Callable[..., str]) -> None:
    other = CHATML.replace("<|im_start|>", "<|start|>").replace("<|im_end|>", "<|end|>")
    said = refused(ROWS, modelled("other", other))
    assert "the chat template is of another model" in said
    assert re.search(r"<\|start\|> \(\d+ tokens\), <\|end\|> \(\d+ tokens\)", said)


def test_a_template_that_shows_prompts_otherwise(
    refused: Callable[..., str], modelled: Callable[..., str]
) -> None:
    counting = "{{ '(' + messages | length | string + ' turns)\n' }}" + CHATML
    said = refused(ROWS[:1], modelled("counting", counting))
    assert "the prompt is learned too: '(1 turns)" in said
    assert "becomes '(2 turns)" in said


def test_a_text_that_begins_twice(refused: Callable[..., str], place: Path) -> None:
    tokenizer = json.loads((place / "model" / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}},
    }
    folder = shutil.copytree(place / "model", place / "begins")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "<s>"}))
    assert "begins with <s> twice" in refused([{"text": "<s>The sea is wide."}] * 2, "begins")


def test_conversations_without_a_template(ntjax: Ntjax, data: Path, place: Path) -> None:
    tiny_model(place / "untaught", template=None)
    ended = looked(ntjax, "chain_of_all.toml", "--stage", "sft", "model.model_name_or_path=untaught")
    assert ended.code == 78
    assert "has no chat template" in ended.err


def test_what_does_no_harm_is_a_note(ntjax: Ntjax, data: Path, modelled: Callable[..., str]) -> None:
    """Padding with the end token, which is learned all the same; marks in pieces before an end that is a token."""
    padded = modelled("padded", pad_token="<|im_end|>")
    ended = looked(ntjax, "chain_of_all.toml", "--stage", "sft", f"model.model_name_or_path={padded}")
    assert ended.code == 0, ended.err
    assert "note: '<|im_end|>' ends and pads" in ended.out
    assert "[[It is blue.<|im_end|>" in ended.out
    zephyr = CHATML.replace("<|im_start|>", "<|turn|>")
    ended = looked(
        ntjax, "chain_of_all.toml", "--stage", "sft", f"model.model_name_or_path={modelled('zephyr', zephyr)}"
    )
    assert ended.code == 0, ended.err
    assert re.search(
        r"note: marks of the chat template that are no tokens: <\|turn\|> \(\d+ tokens\)", ended.out
    )
    elsewhere = modelled("elsewhere", eos_token="</s>")
    (data / "elsewhere" / "generation_config.json").unlink(missing_ok=True)
    ended = looked(ntjax, "chain_of_all.toml", "--stage", "grpo", f"model.model_name_or_path={elsewhere}")
    assert ended.code == 0, ended.err
    assert "note: turns end with '<|im_end|>', but completions only at '</s>'" in ended.out


@pytest.mark.parametrize("template", [CHATML, GENERATION, THINKING])
def test_templates_that_are_sound_pass(
    template: str, ntjax: Ntjax, data: Path, modelled: Callable[..., str]
) -> None:
    names = {CHATML: "chatml", GENERATION: "generation", THINKING: "thinking"}
    model = modelled(names[template], template)
    ended = looked(ntjax, "chain_of_all.toml", "--stage", "sft", f"model.model_name_or_path={model}")
    assert ended.code == 0, ended.err
    assert "note: " not in ended.out
