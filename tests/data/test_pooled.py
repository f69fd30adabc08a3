"""Pictures of a batch: every token finds its feature, whatever is packed, paired, shared or split over processes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ntjax.data.batch import Example, Pair
from ntjax.data.encoded import Gathered
from ntjax.data.loader import Plan, batches, lines
from ntjax.data.pairs import EncodedPairs
from ntjax.data.pictures import Picture
from ntjax.data.placeholders import expanded
from ntjax.data.pooled import Room, pooled, room, stepped
from ntjax.data.prompts import Prompt, Prompts
from ntjax.errors import BadData
from ntjax.hf.processor import load_processor
from ntjax.hf.vision import NEWLINE
from ntjax.marks import WORD
from tests import vlm

LENGTH = 256


@pytest.fixture(scope="module", params=["llava", "llava_next", "qwen2_5_vl"])
def vision(request, tmp_path_factory):
    folder = vlm.tiny_processor(tmp_path_factory.mktemp("vision") / "model", request.param)
    return load_processor(folder, json.loads((folder / "config.json").read_text()))


def picture(number, size=None):
    size = vlm.SIZES[number % len(vlm.SIZES)] if size is None else size
    return Picture.of(vlm.photo(size, number), f"image {number}")


def document(vision, *shown, words=3):
    """So many words, then pictures with a word after each; as many kinds of words as there are lengths of documents."""
    tokens = [10 + words] * words + [token for _ in shown for token in (vision.image_id, 7)]
    ids, mask = expanded(tokens, np.arange(len(tokens)) > 0, shown, vision, "row")
    return Example(ids, mask, pictures=tuple(shown))


def encoded(documents, vision):
    """As the rows of a data set."""
    return Gathered(documents, range(len(documents)), len(documents), 0, 0, ()).encoded(vision)


def mixed(vision):
    """Documents with none to three pictures."""
    counts = [1, 0, 2, 0, 0, 3, 1, 1, 0, 0, 0]
    numbers = iter(range(sum(counts)))
    return [
        document(vision, *(picture(next(numbers)) for _ in range(count)), words=3 + at)
        for at, count in enumerate(counts)
    ]


def check(batch, rows, groups, vision):
    """Every token of lines of documents stands for what it should, of its group's pool; `batch` is one microbatch."""
    index = batch["picture_index"]
    assert index.dtype == np.int32
    assert index.shape == batch["tokens"].shape if "tokens" in batch else True
    index = index.reshape(len(rows), -1)
    pools = {name.removeprefix("pictures."): x for name, x in batch.items() if name.startswith("pictures.")}
    some = next(iter(pools.values()))
    features = some.shape[2] // 4 if "window" in pools else 16
    for number, line in enumerate(rows):
        group, start = number * groups // len(rows), 0
        for one in line:
            found = index[number, start : start + len(one.tokens)]
            at = np.flatnonzero(one.tokens == vision.image_id)
            assert (np.delete(found, at) == WORD).all()
            for shown in one.pictures:
                here, at = found[at[: vision.count(shown.size)]], at[vision.count(shown.size) :]
                unit, feature = vision.index(shown.size)
                np.testing.assert_array_equal(here < 0, unit < 0)
                assert (here[here < 0] == NEWLINE).all()
                np.testing.assert_array_equal((here % features)[here >= 0], feature[unit >= 0])
                for name, made in vision.units(shown).items():
                    first = here[0] // features
                    np.testing.assert_array_equal(
                        (here // features)[here >= 0], first + unit[unit >= 0], str(name)
                    )
                    held = pools[name][group, first : first + len(made)]
                    np.testing.assert_array_equal(held[:, : made.shape[1]], made)
                    assert not held[:, made.shape[1] :].any()
            if "places" in batch:
                places = batch["places"].reshape(len(rows), -1, 3)[number, start : start + len(one.tokens)]
                np.testing.assert_array_equal(places, vision.places(one.tokens, one.pictures))
            start += len(one.tokens)
        assert (index[number, start:] == WORD).all()


def used(batch):
    """Units of each group that aren't zeros."""
    pool = batch.get("pictures.pixels", batch.get("pictures.window"))
    return pool.reshape(*pool.shape[:2], -1).any(axis=-1).sum(axis=1).tolist()


def of_microbatch(batch, number):
    return {name: array[number] for name, array in batch.items()}


def test_few_sizes():
    found = list(dict.fromkeys(map(stepped, range(1, 100))))
    assert found == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
    assert all(count <= stepped(count) <= 1.5 * count for count in range(1, 1000))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("groups", "rows"), [(1, 4), (2, 4), (4, 4)])
def test_every_token_finds_its_feature(vision, packing, groups, rows):
    data = encoded(mixed(vision), vision)
    plan = Plan(data.lengths, LENGTH, rows, accumulation=2, packing=packing, shuffle=False)
    for step, batch in enumerate(batches(plan, data, 0, vision=vision, groups=groups)):
        shown = list(lines(data, plan.slots(step)))
        space = room(shown, groups, vision)
        if space is None:
            assert "picture_index" not in batch
            continue
        for number, some in enumerate(shown):
            check(of_microbatch(batch, number), some, groups, vision)
        pools = [array for name, array in batch.items() if name.startswith("pictures.")]
        assert {array.shape[:3] for array in pools} == {(len(shown), groups, space.units)}
        assert ("places" in batch) == ("pictures.patches" in batch)
    assert plan.packing or plan.steps == 2


def test_pairs_show_their_pictures_once(vision):
    sides = [(document(vision, picture(n), words=4), document(vision, picture(n), words=9)) for n in range(3)]
    blind = document(vision, words=6)
    data = EncodedPairs(encoded([*(Pair(*pair) for pair in sides), Pair(blind, blind)], vision))
    plan = Plan(data.lengths, LENGTH, 2, shuffle=False, packing=True, accumulation=2)
    (batch,) = batches(plan, data, 0, vision=vision, groups=2)
    assert batch["picture_index"].shape == batch["tokens"].shape == (2, 2, 2, LENGTH)
    total = 0
    for number, shown in enumerate(lines(data, plan.slots(0))):
        assert len(shown) == 4
        check(of_microbatch(batch, number), shown, 2, vision)
        total += sum(used(of_microbatch(batch, number)))
    assert total == sum(vision.shape(picture(n).size)[0] for n in range(3))


def test_a_group_shows_a_picture_once(vision):
    one, other = picture(0), picture(1)
    rows = [[document(vision, one)], [document(vision, other, one)], [document(vision, one, one)], []]
    for groups, counts in ((1, [[one, other]]), (2, [[one, other], [one]])):
        space = room([rows], groups, vision)
        wanted = [sum(vision.shape(shown.size)[0] for shown in group) for group in counts]
        assert space.units == stepped(max(wanted))
        found = pooled(rows, LENGTH, groups, space, vision)
        check(found, rows, groups, vision)
        assert used(found) == wanted


def test_completions_of_a_prompt_share_its_pictures(vision):
    """And a placeholder that the model drew is a word."""
    prompt = document(vision, picture(1))
    prompts = Prompts([Prompt(prompt.tokens, pictures=prompt.pictures)], 1)
    rows = []
    for drawn in ([5, 6], [vision.image_id, 5, vision.image_id]):
        (asked,) = prompts.example(0).documents
        tokens = np.concatenate([asked.tokens, np.array(drawn, np.int32)])
        rows.append([Example(tokens, np.zeros(len(tokens), np.bool_), pictures=asked.pictures)])
    found = pooled(rows, LENGTH, 1, room([rows], 1, vision), vision)
    assert used(found) == [vision.shape(picture(1).size)[0]]
    same = found["picture_index"][:, : len(prompt.tokens)]
    np.testing.assert_array_equal(same[0], same[1])
    assert (found["picture_index"][:, len(prompt.tokens) :] == WORD).all()


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("packing", [False, True])
def test_processes_have_their_part_of_the_same_batch(vision, packing, count):
    data = encoded(mixed(vision), vision)
    plan = Plan(data.lengths, LENGTH, 4, accumulation=2, packing=packing, seed=3)
    whole = batches(plan, data, 0, vision=vision, groups=4)
    parts = [
        batches(plan, data, 0, vision=vision, groups=4, process_index=index, process_count=count)
        for index in range(count)
    ]
    for batch, *own in zip(whole, *parts, strict=True):
        for one in own:
            assert one.keys() == batch.keys()
        for name, array in batch.items():
            np.testing.assert_array_equal(np.concatenate([one[name] for one in own], axis=1), array)


def test_text_alone_gives_what_it_gave(vision):
    data = encoded([document(vision, words=n) for n in range(3, 12)], vision)
    plan = Plan(data.lengths, LENGTH, 4)
    for blind, batch in zip(
        batches(plan, data, 0), batches(plan, data, 0, vision=vision, groups=2), strict=True
    ):
        assert blind.keys() == batch.keys()
        for name, array in blind.items():
            np.testing.assert_array_equal(array, batch[name])


def test_room_is_made_for_the_largest(vision):
    small, large = document(vision, picture(0, (7, 5))), document(vision, picture(0, (64, 64)))
    rows = [[[small], [small]], [[small], [large]]]
    units, features = vision.shape((64, 64))
    shared = stepped(vision.shape((7, 5))[0])
    assert room(rows, 2, vision) == Room(max(stepped(units), shared), max(features, vision.shape((7, 5))[1]))
    assert room([[[], []]], 1, vision) is None
    assert room([], 1, vision) is None


def test_a_picture_that_cannot_be_decoded_is_named(vision, tmp_path):
    path = tmp_path / "image.png"
    vlm.photo((64, 64)).save(path)
    shown = Picture.of(str(path), "train.jsonl:3 images[0]")
    path.write_bytes(path.read_bytes()[:2000])
    data = encoded([document(vision, picture(1)), document(vision, shown)], vision)
    plan = Plan(data.lengths, LENGTH, 2, shuffle=False)
    with pytest.raises(BadData, match=r"train.jsonl:3 images\[0\]: the image can't be read"):
        next(batches(plan, data, 0, vision=vision))
