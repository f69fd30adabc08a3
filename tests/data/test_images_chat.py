"""Rows with images to examples: which image stands where, what is learned, what is cut, what is refused."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ntjax.config import DatasetConfig
from ntjax.data.encode import SftEncoder, encode_sft_rows
from ntjax.data.encoded import Encoded
from ntjax.data.pairs import EncodedPairs, PairEncoder, encode_dpo, encode_pairs, encode_reward
from ntjax.data.placeholders import Placing, takes_lists
from ntjax.data.prompts import PromptEncoder, Prompts, encode_prompts
from ntjax.data.rows import check_image_field, held_out, open_rows, shown_rows
from ntjax.errors import BadData, ConfigError, InputMissing
from ntjax.stages import dpo, grpo, pretrain, reward, sft
from tests.cli.process import write_rows
from tests.tiny import CHATML, THINKING, tiny_tokenizer

# As Qwen2.5-VL's: a content is text or parts in their order.
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}{{ '[<image>]' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As LLaVA's: parts alone, images before text.
IMAGES_FIRST = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for part in m['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# As Qwen3's, whose first turns are rendered otherwise alone than followed by more.
THINKING_PARTS = THINKING.replace(
    "m['content'].split", "(m['content'] | map(attribute='text') | join).split"
).replace(
    "{{ '<|im_start|>' +",
    "{% for p in m['content'] if p['type'] == 'image' %}<image>{% endfor %}{{ '<|im_start|>' +",
)
ASK = {"role": "user", "content": "What is it?"}
TELL = {"role": "assistant", "content": "A cat."}


@dataclass(frozen=True)
class Seeing:
    """A vision for which a picture takes a token for every 10 pixels of its width."""

    image_id: int
    image_token: str = "<image>"

    def count(self, size: tuple[int, int]) -> int:
        return size[0] // 10


def tokenizer(template: str | None = PARTS) -> Any:
    made = tiny_tokenizer()
    made.add_tokens(["<image>"], special_tokens=True)
    made.chat_template = template
    return made


IMAGE_ID = tokenizer().convert_tokens_to_ids("<image>")
VISION = Seeing(IMAGE_ID)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of data with images 2, 3 and 5 tokens wide below it."""
    (tmp_path / "img").mkdir()
    for width in (20, 30, 50):
        Image.new("RGB", (width, 10), (width, 0, 0)).save(tmp_path / "img" / f"{width}.png")
    return tmp_path


def rows_of(folder: Path, rows: list[dict[str, Any]], dataset: DatasetConfig, vision: Any = VISION) -> Any:
    return shown_rows(open_rows(dataset, [folder]), dataset, vision)


def dataset_of(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> DatasetConfig:
    return DatasetConfig(dataset_path=str(write_rows(folder / "d.jsonl", rows)), **fields)


def encoded(
    folder: Path, *rows: dict[str, Any], template: str | None = PARTS, max_length: int = 200, **fields: Any
) -> Encoded:
    dataset = dataset_of(folder, list(rows), **fields)
    encoder = SftEncoder(tokenizer(template), dataset, max_length, vision=VISION)
    return encode_sft_rows(rows_of(folder, list(rows), dataset), encoder)


def pairs(folder: Path, *rows: dict[str, Any], encode: Any = encode_dpo, **options: Any) -> EncodedPairs:
    dataset = dataset_of(folder, list(rows))
    encoder = PairEncoder(
        partial(encode, **{"max_length": 200, **options}), tokenizer(), dataset, vision=VISION
    )
    return encode_pairs(rows_of(folder, list(rows), dataset), encoder)


def prompts(folder: Path, *rows: dict[str, Any], max_length: int = 200) -> Prompts:
    dataset = dataset_of(folder, list(rows))
    encoder = PromptEncoder(tokenizer(), dataset, max_length, vision=VISION)
    return encode_prompts(rows_of(folder, list(rows), dataset), encoder)


def shown(example: Any) -> tuple[str, list[int]]:
    """The text, each picture as often as it has tokens, and the widths of the pictures."""
    return tokenizer().decode(example.tokens), [picture.size[0] for picture in example.pictures]


def refused(folder: Path, row: dict[str, Any], make: Any = encoded, **options: Any) -> str:
    with pytest.raises(BadData) as caught:
        make(folder, row, **options)
    assert str(caught.value.where).startswith("d.jsonl:1")
    return str(caught.value)


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


HOLE = {"type": "image"}
TALK = {"messages": [ASK, TELL]}
ASKED = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user(HOLE, text("What is it?")), TELL], "images": ["img/20.png"]},
        {"messages": [user(HOLE, text("What is it?")), TELL], "image": "img/20.png"},
        {"messages": [user({"type": "image", "image": "img/20.png"}, text("What is it?")), TELL]},
        {
            "messages": [
                user({"type": "image", "path": "img/20.png", "text": None}, text("What is it?")),
                TELL,
            ]
        },
        {
            "messages": [
                user({"type": "image_url", "image_url": {"url": "img/20.png"}}, text("What is it?")),
                TELL,
            ]
        },
        {"messages": [user({"type": "image_url", "image_url": "img/20.png"}, text("What is it?")), TELL]},
        {"messages": [{**ASK, "content": "<image>\nWhat is it?"}, TELL], "images": ["img/20.png"]},
        {"messages": [ASK, TELL], "images": ["img/20.png"]},
        {"prompt": [ASK], "completion": [TELL], "images": ["img/20.png"]},
        {"instruction": "What is it?", "output": "A cat.", "image": "img/20.png"},
        {
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "A cat."},
            ],
            "image": "img/20.png",
        },
    ],
)
def test_all_ways_to_show_an_image_are_one(folder: Path, row: dict[str, Any]) -> None:
    found = encoded(folder, row).example(0)
    assert shown(found) == (ASKED.format("[<image><image>]What is it?"), [20])


def test_a_picture_is_never_learned_and_its_answer_is(folder: Path) -> None:
    row = {"messages": [ASK, TELL], "images": [str(folder / "img/20.png")]}
    encoder = SftEncoder(tokenizer(), DatasetConfig(dataset_path="x"), 200, vision=VISION)
    [found] = encoder(row, "d")
    assert tokenizer().decode(found.tokens[found.mask]) == "A cat.<|im_end|>\n"
    [whole] = replace(encoder, whole_messages=True)(row, "d")
    assert np.flatnonzero(~whole.mask).tolist() == [0, *np.flatnonzero(whole.tokens == IMAGE_ID)]


def test_a_report_counts_images(folder: Path) -> None:
    rows = [{**TALK, "images": ["img/20.png"]}, TALK, {**TALK, "images": ["img/20.png", "img/30.png"]}]
    assert encoded(folder, *rows).report().splitlines()[1] == "3 images, 7 image tokens"
    assert pairs(folder, PAIR).report().splitlines()[1] == "1 image, 10 image tokens"  # in both documents


@pytest.mark.parametrize("template", [PARTS, IMAGES_FIRST])
def test_tokens_are_those_of_the_text_that_processors_expand(folder: Path, template: str) -> None:
    turns = [user(HOLE, text("a"), HOLE, text("b")), TELL, user(text("c"), HOLE), TELL]
    made = tokenizer(template)
    whole = made.apply_chat_template(
        [
            {
                **turn,
                "content": turn["content"] if isinstance(turn["content"], list) else [text(turn["content"])],
            }
            for turn in turns
        ],
        tokenize=False,
    )
    for width in (2, 3, 5):
        whole = whole.replace("<image>", "<>" * width, 1)
    wanted = made(whole.replace("<>", "<image>"), add_special_tokens=False)["input_ids"]
    row = {"messages": turns, "images": ["img/20.png", "img/30.png", "img/50.png"]}
    assert encoded(folder, row, template=template).tokens.tolist() == wanted


@pytest.mark.parametrize("template", [PARTS, IMAGES_FIRST, THINKING_PARTS])
def test_every_answer_of_a_conversation_about_images_is_learned(folder: Path, template: str) -> None:
    turns = [ASK, TELL, {**ASK, "content": "And <image>?"}, {**TELL, "content": "A dog."}]
    turns[0] = {**ASK, "content": "<image>Tell."}
    found = encoded(
        folder, {"messages": turns, "images": ["img/20.png", "img/30.png"]}, template=template
    ).example(0)
    learned = tokenizer().decode(found.tokens[found.mask])
    assert "A cat." in learned
    assert "A dog." in learned
    assert "Tell" not in learned
    assert [picture.size[0] for picture in found.pictures] == [20, 30]


def test_templates_are_told_apart_by_what_they_take() -> None:
    assert [takes_lists(tokenizer(each)) for each in (PARTS, IMAGES_FIRST, THINKING_PARTS)] == [True] * 3
    strict = "{% for m in messages %}{{ m['content'].strip() }}{% endfor %}"
    printed = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert [takes_lists(tokenizer(each)) for each in (CHATML, strict, printed, None)] == [False] * 4


def test_a_template_of_strings_is_given_the_image_token_where_the_word_stands(folder: Path) -> None:
    def said(content: Any) -> str:
        row = {"messages": [{**ASK, "content": content}, TELL], "images": ["img/20.png"]}
        return shown(encoded(folder, row, template=CHATML).example(0))[0]

    assert "<|im_start|>user\n<image><image>\nWhat?<|im_end|>" in said("<image>\nWhat?")
    assert "<|im_start|>user\n<image><image>\nWhat?<|im_end|>" in said("What?")
    assert "<|im_start|>user\nIs <image><image> it?<|im_end|>" in said([text("Is "), HOLE, text(" it?")])


def test_the_word_is_the_same_for_every_model_and_its_own_token_is_too(folder: Path) -> None:
    made = tiny_tokenizer()
    made.add_tokens(["<|image_pad|>"], special_tokens=True)
    made.chat_template = PARTS.replace("<image>", "<|image_pad|>")
    vision = Seeing(made.convert_tokens_to_ids("<|image_pad|>"), "<|image_pad|>")
    encoder = SftEncoder(made, DatasetConfig(dataset_path="x"), 200, vision=vision)
    image = str(folder / "img/20.png")
    words = ["<image>\nWhat?", "<|image_pad|>What?"]
    first, second = (
        encoder({"messages": [{**ASK, "content": word}, TELL], "image": image}, "d")[0] for word in words
    )
    assert first.tokens.tolist() == second.tokens.tolist()
    assert (first.tokens == vision.image_id).sum() == 2


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [("Is <image> it?", "Is <image><image> it?"), ("What?", "<image><image>\nWhat?")],
)
def test_plain_text_has_the_image_token_itself(folder: Path, prompt: str, wanted: str) -> None:
    row = {"prompt": prompt, "completion": " A cat.", "images": ["img/20.png"]}
    assert shown(encoded(folder, row).example(0)) == (wanted + " A cat.<|im_end|>", [20])
    found = encoded(folder, {"text": prompt, "images": ["img/20.png"]}).example(0)
    assert shown(found) == (wanted + "<|im_end|>", [20])
    assert not found.mask[found.tokens == IMAGE_ID].any()


def test_rows_without_images_are_learned_beside_others(folder: Path) -> None:
    alone = {"messages": [ASK, TELL], "images": []}
    found = encoded(folder, alone, {"messages": [ASK, TELL], "images": ["img/20.png"]}, template=IMAGES_FIRST)
    assert [len(found.example(i).pictures) for i in (0, 1)] == [0, 1]
    assert shown(found.example(0))[0] == "USER: What is it? ASSISTANT: A cat. "


def test_a_named_column_is_the_one_that_is_read(folder: Path) -> None:
    row = {"messages": [ASK, TELL], "file_name": "img/20.png", "image": "none.png"}
    assert shown(encoded(folder, row, image_field="file_name").example(0))[1] == [20]
    rows = [{"messages": [ASK, TELL]}, row]  # a row without an image may do without its column
    assert [len(found) for found in encoded(folder, *rows, image_field="file_name").pictures] == [0, 1]
    dataset = dataset_of(folder, rows, image_field="file")
    with pytest.raises(InputMissing, match="no column 'file'. There is 'messages'\n  fix: correct image_f"):
        check_image_field(open_rows(dataset, [folder]), dataset, VISION, "a.toml:1")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({**TALK, "images": ["img/2O.png"]}, "images[0]: there is no '2O.png' in"),
        (
            {"messages": [user(HOLE, text("x")), TELL], "images": ["img/20.png"] * 2},
            "2 images, but 1 placeholder\n",
        ),
        ({"messages": [user(HOLE, text("x")), TELL]}, "0 images, but 1 placeholder\n"),
        (
            {"messages": [user({**HOLE, "image": "img/20.png"}), TELL], "images": ["img/20.png"]},
            "1 image, but 0 placeholders\n",
        ),
        (
            {"prompt": "<image> <image>", "completion": "x", "image": "img/20.png"},
            "1 image, but 2 placeholders\n",
        ),
        ({"prompt": "x", "completion": "<image>", "image": "img/20.png"}, "<image> in an answer"),
        (
            {"messages": [ASK, {**TELL, "content": "<image>"}], "image": "img/20.png"},
            "in the assistant's turn",
        ),
        (
            {"messages": [{"role": "system", "content": [HOLE]}, ASK, TELL], "image": "img/20.png"},
            "in the system's turn",
        ),
        ({"messages": [user({"type": "video"}), TELL]}, "'video' isn't a type of part; allowed: text, image"),
        ({"messages": [user("x"), TELL]}, "'x' isn't text or a part of a content"),
        ({**TALK, "images": [None]}, "null isn't an image"),
    ],
)
def test_rows_that_dont_add_up_are_refused(folder: Path, row: dict[str, Any], says: str) -> None:
    assert says in refused(folder, row)


def test_a_template_that_shows_no_images_is_not_one_for_them(folder: Path) -> None:
    blind = PARTS.replace("{{ '[<image>]' }}", "")
    said = refused(folder, {**TALK, "images": ["img/20.png"]}, template=blind)
    assert "1 image, but <image> is there 0 times among the tokens" in said


LONG = {"messages": [{**ASK, "content": "<image>a<image>"}, TELL], "images": ["img/30.png", "img/50.png"]}


def test_an_example_is_cut_before_a_picture_and_never_in_one(folder: Path) -> None:
    row = {**LONG, "images": [str(folder / name) for name in LONG["images"]]}
    encoder = SftEncoder(tokenizer(), DatasetConfig(dataset_path="x"), 200, vision=VISION)
    [whole] = encoder(row, "d")
    at = np.flatnonzero(whole.tokens == IMAGE_ID).tolist()
    first, second = (at[0], at[2] + 1), (at[3], at[7] + 1)
    for room in range(1, len(whole.tokens)):
        [found] = replace(encoder, max_length=room)(row, "d")
        cut = next((begin for begin, end in (first, second) if begin < room < end), room)
        np.testing.assert_array_equal(found.tokens, whole.tokens[:cut])
        widths = [30 for _ in range(cut >= first[1])] + [50 for _ in range(cut >= second[1])]
        assert [picture.size[0] for picture in found.pictures] == widths
        assert found.truncated


PAIR = {
    "prompt": [ASK],
    "chosen": [TELL],
    "rejected": [{**TELL, "content": "A dog or so."}],
    "images": ["img/50.png"],
}


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {**PAIR, "prompt": [user(HOLE, text("What is it?"))]},
        {**PAIR, "prompt": [user({**HOLE, "image": "img/50.png"}, text("What is it?"))], "images": None},
        {"chosen": [ASK, TELL], "rejected": [ASK, PAIR["rejected"][0]], "images": ["img/50.png"]},
        {**PAIR, "prompt": "<image>What is it?", "images": "img/50.png"},
    ],
)
def test_both_answers_of_a_pair_see_the_images(folder: Path, row: dict[str, Any]) -> None:
    pair = pairs(folder, row).example(0)
    assert shown(pair.chosen) == (ASKED.format("[" + "<image>" * 5 + "]What is it?"), [50])
    assert shown(pair.rejected)[1] == [50]
    assert tokenizer().decode(pair.rejected.tokens[pair.rejected.mask]) == "A dog or so.<|im_end|>\n"
    scored = pairs(folder, row, encode=encode_reward, pad_id=0).example(0)
    assert [side.tokens.tolist() for side in scored.documents] == [
        side.tokens.tolist() for side in pair.documents
    ]
    assert np.flatnonzero(scored.chosen.mask).tolist() == [len(scored.chosen.tokens) - 1]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "<image>Is it", "chosen": " a cat", "rejected": " a dog", "image": "img/20.png"},
        {"chosen": "<image>Is it a cat", "rejected": "<image>Is it a dog", "image": "img/20.png"},
    ],
)
def test_both_plain_texts_of_a_pair_do_too(folder: Path, row: dict[str, Any]) -> None:
    pair = pairs(folder, row).example(0)
    assert shown(pair.chosen) == ("<image><image>Is it a cat<|im_end|>", [20])
    assert shown(pair.rejected) == ("<image><image>Is it a dog<|im_end|>", [20])


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ([TELL, user(text("And "), {**HOLE, "image": "img/20.png"}), TELL], "show different images"),
        ([{**TELL, "content": "<image>"}], "in the assistant's turn"),
    ],
)
def test_an_image_in_one_answer_alone_is_refused(folder: Path, chosen: Any, says: str) -> None:
    assert says in refused(folder, {**PAIR, "images": None, "chosen": chosen}, make=pairs)


def test_a_pair_of_which_one_lost_the_picture_teaches_nothing(folder: Path) -> None:
    """Of the two, the longer answer left no room for it."""
    chosen = pairs(folder, PAIR).example(0).chosen.tokens
    room = len(chosen) - int(np.flatnonzero(chosen == IMAGE_ID)[0])  # the picture is the first that is kept
    with pytest.raises(BadData, match="1 of 1 rows have nothing to learn"):
        pairs(folder, PAIR, keep_end=True, max_length=room)
    both = pairs(folder, PAIR, keep_end=True, max_length=room - 1).example(0)
    assert both.chosen.pictures == both.rejected.pictures == ()
    assert len(both.chosen.tokens) == room - 5
    assert not any((side.tokens == IMAGE_ID).any() for side in both.documents)


def test_a_reward_pair_is_too_long_with_its_pictures(folder: Path) -> None:
    long = max(len(side.tokens) for side in pairs(folder, PAIR).example(0).documents)
    assert len(pairs(folder, PAIR, encode=encode_reward, pad_id=0, max_length=long)) == 1
    with pytest.raises(BadData, match="nothing to learn"):
        pairs(folder, PAIR, encode=encode_reward, pad_id=0, max_length=long - 1)


def test_prompts_show_their_images_and_keep_their_columns(folder: Path) -> None:
    found = prompts(folder, {"prompt": [ASK], "images": ["img/30.png"], "answer": "cat"})
    [one] = found.kept
    assert tokenizer().decode(one.tokens) == (
        "<|im_start|>user\n[<image><image><image>]What is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert one.said == [user(HOLE, text("What is it?"))]
    assert [picture.size for picture in found.example(0).pictures] == [(30, 10)]
    assert found.columns([0])["answer"] == ["cat"]
    assert "1 image, 3 image tokens" in found.report()
    with pytest.raises(BadData, match="longer than max_length"):
        prompts(folder, {"prompt": [ASK], "images": ["img/30.png"]}, max_length=len(one.tokens) - 1)


def test_a_digest_of_prompts_is_the_same_for_the_same_images() -> None:
    """A Pillow image is written with its address."""
    encoder = PromptEncoder(tokenizer(), DatasetConfig(dataset_path="x"), 200, vision=VISION)

    def digest(colour: str) -> str:
        [prompt] = encoder({"prompt": [ASK], "image": Image.new("RGB", (20, 10), colour)}, "d")
        return Prompts([prompt], 1).digest()

    assert digest("red") == digest("red") != digest("blue")


@pytest.mark.parametrize("make", [encoded, pairs, prompts])
def test_a_digest_changes_with_an_image(folder: Path, make: Any) -> None:
    row = {encoded: {**TALK, "image": "img/20.png"}}.get(make, {**PAIR, "images": ["img/20.png"]})
    before = make(folder, row).digest()
    assert make(folder, row).digest() == before
    Image.new("RGB", (20, 10), "blue").save(folder / "img" / "20.png")
    assert make(folder, row).digest() != before


def test_processes_encode_images_as_one_does(folder: Path) -> None:
    rows = [{**TALK, "images": [f"img/{width}.png"]} for width in (20, 30, 50)]
    dataset = dataset_of(folder, rows)
    encoder = SftEncoder(tokenizer(), dataset, 200, vision=VISION)
    found = encode_sft_rows(rows_of(folder, rows, dataset), encoder, workers=2)
    assert found.digest() == encoded(folder, *rows).digest()
    assert [picture.size[0] for pictures in found.pictures for picture in pictures] == [20, 30, 50]


def test_paths_start_from_the_file_in_every_kind_of_file_and_split(folder: Path) -> None:
    (folder / "more").mkdir()
    row = {"prompt": "What?", "completion": "x", "image": "../img/20.png"}
    for name, written in [
        ("a.jsonl", json.dumps(row)),
        ("b.json", json.dumps([row])),
        ("c.csv", ",".join(row) + "\n" + ",".join(row.values())),
    ]:
        (folder / "more" / name).write_text(written + "\n")
    dataset = DatasetConfig(dataset_path=str(folder / "more"))
    train, evaluation = held_out(open_rows(dataset, [folder]), 0.3, 0)
    for rows in (train, evaluation):
        found = encode_sft_rows(
            shown_rows(rows, dataset, VISION), SftEncoder(tokenizer(), dataset, 99, vision=VISION)
        )
        assert {picture.size for pictures in found.pictures for picture in pictures} == {(20, 10)}


def test_a_formatting_func_sees_paths_that_are_absolute(folder: Path) -> None:
    seen = []

    def function(row: dict[str, Any]) -> dict[str, Any]:
        seen.append(row["photo"])
        return {"messages": [user({**HOLE, "image": row["photo"]}, text("?")), TELL]}

    dataset = dataset_of(folder, [{"photo": "img/20.png"}], image_field="photo")
    encoder = SftEncoder(
        tokenizer(), DatasetConfig(dataset_path="x"), 99, formatting_func=function, vision=VISION
    )
    found = encode_sft_rows(rows_of(folder, [], dataset), encoder)
    assert seen == [str(folder / "img/20.png")]
    assert [picture.size[0] for picture in found.pictures[0]] == [20]


def test_tables_keep_images_as_they_are_stored(folder: Path) -> None:
    """Decoded and encoded again they would take ten times the memory, and be other images."""
    import datasets

    data = (folder / "img/20.png").read_bytes()
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "images": datasets.List(datasets.Image())}
    )
    table = datasets.Dataset.from_list([{"prompt": "x", "images": [{"bytes": data, "path": None}]}], features)
    table.to_parquet(folder / "d.parquet")
    rows = open_rows(DatasetConfig(dataset_path=str(folder / "d.parquet")), [folder])
    assert rows[0] == {"prompt": "x", "images": [{"bytes": data, "path": None}]}
    assert rows[-1] == rows[0]


def test_an_image_in_the_row_itself_is_base64(folder: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (30, 10)).save(file, "PNG")
    words = base64.b64encode(file.getvalue()).decode()
    for part in ({"base64": words}, {"url": f"data:image/png;base64,{words}"}):
        found = encoded(folder, {"messages": [user({**HOLE, **part}, text("?")), TELL]})
        assert shown(found.example(0))[1] == [30]


@pytest.mark.parametrize("stage", [sft, dpo, reward, grpo])
def test_a_model_of_text_refuses_images(folder: Path, stage: Any) -> None:
    row = {
        "prompt": [user(HOLE)],
        "completion": [TELL],
        "chosen": [TELL],
        "rejected": [{**TELL, "content": "No."}],
    }
    options = stage.Options(stage_type="x")
    dataset = dataset_of(folder, [{**row, "image": "img/20.png"}])
    with pytest.raises(BadData, match="model reads text alone\n  fix: name a model that sees"):
        options.encode(open_rows(dataset, [folder]), tokenizer(), dataset, None, 1000)
    dataset = dataset_of(folder, [row], image_field="image")
    with pytest.raises(ConfigError, match="a.toml:1: image_field .*\n  fix: name a model that sees"):
        check_image_field(open_rows(dataset, [folder]), dataset, None, "a.toml:1")


def test_a_model_of_text_reads_parts_that_are_text_and_no_column_of_images(folder: Path) -> None:
    rows = [{"messages": [user(text("What "), text("is it?")), TELL], "images": ["none.png"]}]
    dataset = dataset_of(folder, rows)
    found = sft.Options(stage_type="sft").encode(
        open_rows(dataset, [folder]), tokenizer(CHATML), dataset, None, 1000
    )
    assert "user\nWhat is it?<|im_end|>" in shown(found.example(0))[0]
    assert found.pictures == ()


def test_pretraining_learns_no_images(folder: Path) -> None:
    options = pretrain.Options(stage_type="pretrain")
    dataset = dataset_of(folder, [{"text": "An <image>"}])
    with pytest.raises(BadData, match="0 images, but <image> is there 1 time"):
        options.encode(open_rows(dataset, [folder]), tokenizer(), dataset, None, 1000, VISION)
    dataset = dataset_of(folder, [{"text": "x"}], image_field="image")
    with pytest.raises(ConfigError, match="pretrain stage learns text alone"):
        options.encode(open_rows(dataset, [folder]), tokenizer(), dataset, None, 1000, VISION)


def test_stages_pass_their_vision_on(folder: Path) -> None:
    row = {"prompt": [ASK], "completion": [TELL], **PAIR}
    for stage in (sft, dpo, reward, grpo):
        dataset = dataset_of(folder, [row])
        found = stage.Options(stage_type="x").encode(
            open_rows(dataset, [folder]), tokenizer(), dataset, None, 1000, VISION
        )
        assert [picture.size[0] for picture in found.example(0).documents[0].pictures] == [50]


def test_without_vision_nothing_of_a_row_is_touched() -> None:
    turns = [{**ASK, "content": "<image>"}]
    assert Placing().turns(turns, {"images": ["none.png"]}, "d") == (turns, {})
    assert Placing().text("<image>", {"images": ["none.png"]}, "d") == ("<image>", {})
