"""Processors give the tokens, the pixels and the places that transformers' give, and say so from sizes alone."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoProcessor, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from ntjax.data.pictures import Picture
from ntjax.data.placeholders import expanded
from ntjax.errors import BadData, ConfigError, InputMissing
from ntjax.hf.processor import load_processor
from ntjax.hf.vision import NEWLINE
from tests import vlm

NAMES = [f"{family}, {tower}" for family, tower in vlm.FAMILIES]
EVERY = pytest.mark.parametrize(("family", "tower"), vlm.FAMILIES, ids=NAMES)
NEXT = ("llava_next", "clip")
QWEN = ("qwen2_5_vl", "clip")


@pytest.fixture
def folder(tmp_path, family, tower):
    """The folder of a model without weights."""
    return vlm.tiny_processor(tmp_path / "model", family, tower)


def hf_of(folder):
    return json.loads((folder / "config.json").read_text())


def loaded(folder, **options):
    return load_processor(folder, hf_of(folder), **options)


def changed(folder, name, **changes):
    """Rewrites a JSON file; a change to None takes the setting out."""
    found = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def pictures(sizes=vlm.SIZES):
    return [Picture.of(vlm.photo(size), f"image {number}") for number, size in enumerate(sizes)]


def theirs(folder, family, monkeypatch):
    """transformers' processor of the same folder; that of Qwen2.5-VL without videos, which want torchvision."""
    if family != "qwen2_5_vl":
        return AutoProcessor.from_pretrained(folder, backend="pil")
    ours = loaded(folder)
    monkeypatch.setattr(Qwen2_5_VLProcessor, "check_argument_for_proper_class", lambda *_: None)
    return Qwen2_5_VLProcessor(ours.images, ours.tokenizer, None, chat_template=ours.tokenizer.chat_template)


def test_sizes_are_odd_enough(tmp_path):
    ours = loaded(vlm.tiny_processor(tmp_path / "model", *NEXT))
    assert {ours.shape(size)[0] for size in vlm.SIZES} == {3, 5}
    assert len({ours.count(size) for size in vlm.SIZES}) == len(vlm.SIZES)


@EVERY
def test_tokens_and_pixels_are_transformers(folder, family, monkeypatch):
    ours, reference, shown = loaded(folder), theirs(folder, family, monkeypatch), pictures()
    parts = [{"type": "image"}, {"type": "text", "text": "What is this? 1 + 1 = 2"}]
    for picture in shown:
        text = ours.tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
        plain = ours.tokenizer(text)["input_ids"]
        tokens, _ = expanded(plain, np.zeros(len(plain), np.bool_), [picture], ours, "row")
        wanted = reference(text=text, images=picture.image(), return_tensors="np")
        np.testing.assert_array_equal(tokens, wanted["input_ids"][0])
        units = ours.units(picture)
        if family == "qwen2_5_vl":
            assert units["patches"].dtype == np.float32
            np.testing.assert_array_equal(units["patches"][0], wanted["pixel_values"])
        else:
            assert units["pixels"].dtype == np.float32
            height, width = units["pixels"].shape[-2:]  # without what is behind the last whole patch
            pixels = wanted["pixel_values"].reshape(-1, 3, vlm.SIDE, vlm.SIDE)[..., :height, :width]
            np.testing.assert_array_equal(units["pixels"], pixels)
            assert len(units["pixels"]) == ours.shape(picture.size)[0]


@EVERY
def test_the_template_is_rendered_as_by_transformers_processor(folder, family, monkeypatch):
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hello"}]}]
    reference = theirs(folder, family, monkeypatch)
    ours = loaded(folder).tokenizer.apply_chat_template(turns, tokenize=False)
    assert ours == reference.apply_chat_template(turns, tokenize=False)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_lines_of_tiles_come_in_transformers_order(tmp_path, tower):
    folder = vlm.tiny_processor(tmp_path / "model", "llava_next", tower)
    ours, config = loaded(folder), AutoConfig.from_pretrained(folder)
    sizes = [*vlm.SIZES, *((w, h) for w in range(5, 90, 7) for h in range(6, 95, 11)), (1, 150), (150, 1)]
    for size in sizes:
        units, features = ours.shape(size)
        numbered = torch.arange(units * features).reshape(units, features, 1).float()
        packed, _ = LlavaNextModel.pack_image_features(
            SimpleNamespace(config=config),
            [numbered],
            torch.tensor([size[::-1]]),
            config.vision_feature_select_strategy,
            torch.tensor([float(NEWLINE)]),
        )
        unit, feature = ours.index(size)
        found = np.where(unit == NEWLINE, NEWLINE, unit * features + feature)
        np.testing.assert_array_equal(found, packed[0][:, 0].numpy(), str(size))


def test_the_class_token_is_kept_where_the_model_keeps_it(tmp_path, monkeypatch):
    folder = vlm.tiny_processor(tmp_path / "model", "llava")
    changed(folder, "config.json", vision_feature_select_strategy="full")
    changed(folder, "processor_config.json", vision_feature_select_strategy="full")
    ours, size = loaded(folder), (33, 71)
    assert ours.shape(size) == (1, 17)
    np.testing.assert_array_equal(ours.index(size)[1], np.arange(17))
    wanted = theirs(folder, "llava", monkeypatch)(text="<image>", images=vlm.photo(size))
    assert ours.count(size) == len(wanted["input_ids"][0])


def test_windows_and_places_of_patches_are_transformers(tmp_path):
    ours = loaded(vlm.tiny_processor(tmp_path / "model", *QWEN))
    uneven = (41, 36)  # 4 rows of 5 features
    for picture in pictures([*vlm.SIZES, uneven]):
        made = ours.units(picture)
        grid = torch.tensor(ours.images(images=picture.image())["image_grid_thw"])
        np.testing.assert_array_equal(made["at"][0], get_vision_position_ids(grid, 2).numpy())
        index, ends = get_vision_window_index(grid, 2, window_size=16, patch_size=4)
        wanted = np.zeros(len(index), np.int32)
        wanted[index.numpy()] = np.searchsorted(ends.numpy(), np.arange(len(index)) * 4, side="right")
        wanted, found = np.repeat(wanted, 4), made["window"][0]
        np.testing.assert_array_equal(wanted[:, None] == wanted, found[:, None] == found)
        assert found.min() == 1
        assert found.dtype == made["at"].dtype == np.int32
        assert len(found) == ours.count(picture.size) * 4 <= ours.shape(picture.size)[1] * 4


def test_places_of_tokens_are_transformers(tmp_path):
    folder = vlm.tiny_processor(tmp_path / "model", *QWEN)
    ours, config = loaded(folder), AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config).model
    for sizes in ([(33, 71)], [(100, 37), (29, 28), (200, 12)], []):
        shown, draw = pictures(sizes), np.random.default_rng(len(sizes)).integers
        pieces = [draw(5, 300, 7)]
        for picture in shown:
            pieces += [np.full(ours.count(picture.size), ours.image_id), draw(5, 300, 3)]
        tokens = np.concatenate(pieces).astype(np.int32)
        found = ours.places(tokens, shown)
        assert found.dtype == np.int32
        grids = [ours.images(images=picture.image())["image_grid_thw"][0] for picture in shown]
        ids = torch.tensor(tokens)[None].long()
        if not shown:
            np.testing.assert_array_equal(found, np.repeat(np.arange(7)[:, None], 3, axis=1))
            continue
        given = torch.tensor(np.array(grids))
        wanted = model.get_rope_index(ids, (ids == ours.image_id).int(), given)[0]
        np.testing.assert_array_equal(found, wanted[:, 0].T.numpy())


def test_pictures_side_by_side_have_places_one_after_another(tmp_path):
    ours, shown = loaded(vlm.tiny_processor(tmp_path / "model", *QWEN)), pictures([(64, 64), (7, 5)])
    counts = [ours.count(picture.size) for picture in shown]
    found = ours.places(np.full(sum(counts) + 1, ours.image_id, np.int32), shown)
    rows, columns = ours._grid((7, 5))
    np.testing.assert_array_equal(found[counts[0]], 6)  # of 6 x 6 features
    np.testing.assert_array_equal(found[-1], 6 + max(rows, columns))  # drawn by a model: a word as any other


@EVERY
def test_the_other_families_have_one_position_a_token(folder, family):
    assert (loaded(folder).places(np.zeros(3, np.int32), ()) is None) == (family != "qwen2_5_vl")


@EVERY
def test_blank_units_are_as_the_others(folder):
    ours, picture = loaded(folder), pictures()[0]
    units, blank = ours.units(picture), ours.blank(ours.count(picture.size))
    assert units.keys() == blank.keys()
    for name, array in units.items():
        assert (array.shape[1:], array.dtype) == (blank[name].shape[1:], blank[name].dtype)
        assert not blank[name].any()


@EVERY
def test_a_processor_goes_to_other_processes(folder):
    ours, picture = loaded(folder), pictures()[0]
    again = pickle.loads(pickle.dumps(ours))
    for name, array in ours.units(picture).items():
        np.testing.assert_array_equal(array, again.units(picture)[name])


def _same(ours, again):
    assert (ours.image_id, ours.image_token, ours.settings) == (
        again.image_id,
        again.image_token,
        again.settings,
    )
    assert ours.tokenizer.chat_template == again.tokenizer.chat_template
    for picture in pictures():
        assert ours.count(picture.size) == again.count(picture.size)
        for name, array in ours.units(picture).items():
            np.testing.assert_array_equal(array, again.units(picture)[name])


@EVERY
def test_what_is_saved_is_the_same_processor(folder, family, tmp_path, monkeypatch):
    ours, out = loaded(folder), tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text((folder / "config.json").read_text())
    ours.save(out)
    _same(ours, loaded(out))
    made = theirs(out, family, monkeypatch)(text=ours.image_token, images=vlm.photo((33, 71)))
    assert len(made["input_ids"][0]) == ours.count((33, 71))


@pytest.mark.parametrize(("family", "tower"), vlm.FAMILIES[:4], ids=NAMES[:4])
def test_one_file_as_transformers_5_writes_it(folder, family, tmp_path, monkeypatch):
    out = tmp_path / "out"
    theirs(folder, family, monkeypatch).save_pretrained(out)
    (out / "config.json").write_text((folder / "config.json").read_text())
    assert not (out / "preprocessor_config.json").exists()
    ours, again = loaded(folder), loaded(out)
    for picture in pictures():
        np.testing.assert_array_equal(ours.units(picture)["pixels"], again.units(picture)["pixels"])
    again.save(tmp_path / "again")
    _same(again, load_processor(tmp_path / "again", hf_of(folder)))


def test_old_files_lack_settings_which_are_the_models(tmp_path, monkeypatch):
    folder = vlm.tiny_processor(tmp_path / "model", "llava")
    (folder / "processor_config.json").unlink()
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    changed(folder, "preprocessor_config.json", image_processor_type="CLIPImageProcessor", crop_size=vlm.SIDE)
    ours, out = loaded(folder), tmp_path / "out"
    assert ours.count((33, 71)) == 16
    assert ours.tokenizer.chat_template == template
    out.mkdir()
    (out / "config.json").write_text((folder / "config.json").read_text())
    ours.save(out)
    reference = theirs(out, "llava", monkeypatch)
    assert reference.chat_template == template
    assert len(reference(text="<image>", images=vlm.photo((33, 71)))["input_ids"][0]) == 16


def test_the_processors_template_comes_first(tmp_path):
    folder = vlm.tiny_processor(tmp_path / "model", *QWEN)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert loaded(folder).tokenizer.chat_template == "{{ messages }}"


def test_areas_can_be_bounded(tmp_path):
    folder = vlm.tiny_processor(tmp_path / "model", *QWEN)
    ours, bounded = loaded(folder), loaded(folder, min_pixels=9 * 64, max_pixels=12 * 64)
    assert [ours.count(size) for size in [(64, 64), (7, 5)]] == [36, 6]
    assert [bounded.count(size) for size in [(64, 64), (7, 5)]] == [9, 12]
    for picture in pictures():
        assert bounded.units(picture)["patches"].shape[1] == 4 * bounded.count(picture.size)
    bounded.save(tmp_path / "out")
    _same(bounded, load_processor(tmp_path / "out", hf_of(folder)))
    assert loaded(folder, max_pixels=12 * 64).count((7, 5)) == 6


def test_areas_that_cannot_be_bounded(tmp_path):
    with pytest.raises(ConfigError, match="768 are more than 256"):
        loaded(vlm.tiny_processor(tmp_path / "qwen", *QWEN), min_pixels=768, max_pixels=256)
    for options in ({"min_pixels": 9}, {"max_pixels": 9}):
        with pytest.raises(ConfigError, match="llava_next scales every image to one size"):
            load_processor(tmp_path / "qwen", vlm.config(*NEXT, vlm.vlm_tokenizer("llava_next")), **options)


@EVERY
def test_without_files_there_is_no_processor(folder):
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(InputMissing, match="no preprocessor_config.json"):
        loaded(folder)


@EVERY
def test_files_that_cannot_be_read(folder):
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(BadData, match="not JSON"):
        loaded(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Nothing", "size": {"n": 1}}')
    with pytest.raises(BadData, match=r"the image processor (can't be read|fails)"):
        loaded(folder)


@EVERY
def test_the_placeholder_is_the_same_token_to_model_and_tokenizer(folder, family):
    hf = hf_of(folder) | {"image_token_id" if family == "qwen2_5_vl" else "image_token_index": 7}
    with pytest.raises(BadData, match=r"is token 40\d of the tokenizer, and config.json says that 7 stands"):
        load_processor(folder, hf)
    vlm.tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(BadData, match="is no token of the tokenizer"):
        loaded(folder)


@pytest.mark.parametrize(
    ("family", "tower", "file", "changes", "message"),
    [
        ("llava", "clip", "processor_config.json", {"patch_size": 14}, "4 tokens for an image.* 16 features"),
        ("llava", "clip", "processor_config.json", {"num_additional_image_tokens": 0}, "15 tokens"),
        ("llava", "clip", "preprocessor_config.json", {"crop_size": 14}, "images become .*14"),
        ("llava", "clip", "preprocessor_config.json", {"do_center_crop": False}, "images become"),
        ("llava_next", "clip", "preprocessor_config.json", {"image_grid_pinpoints": [[28, 28]]}, "pinpoints"),
        (
            "qwen2_5_vl",
            "clip",
            "preprocessor_config.json",
            {"patch_size": 8},
            "patch_size is 8, and patch_size",
        ),
        ("qwen2_5_vl", "clip", "preprocessor_config.json", {"merge_size": 1}, "spatial_merge_size in config"),
    ],
)
def test_a_processor_of_another_model(tmp_path, family, tower, file, changes, message):
    folder = vlm.tiny_processor(tmp_path / "model", family, tower)
    changed(folder, file, **changes)
    with pytest.raises(BadData, match=message):
        loaded(folder)


@pytest.mark.parametrize(
    ("family", "tower", "strategy"), [("llava", "siglip", "default"), ("llava_next", "clip", "full")]
)
def test_features_that_cannot_be_taken(tmp_path, family, tower, strategy):
    folder = vlm.tiny_processor(tmp_path / "model", family, tower)
    changed(folder, "config.json", vision_feature_select_strategy=strategy)
    changed(folder, "processor_config.json", vision_feature_select_strategy=strategy)
    with pytest.raises(ConfigError, match="vision_feature_select_strategy"):
        loaded(folder)


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["torchvision"] = None
import json, pathlib
import numpy as np
from ntjax.data.pictures import Picture
from ntjax.hf.processor import load_processor
for folder in map(pathlib.Path, sys.argv[1:]):
    processor = load_processor(folder, json.loads((folder / "config.json").read_text()))
    units = processor.units(Picture.of(str(folder / "image.png"), "image"))
    np.savez(folder / "units.npz", **units)
"""


def test_neither_torch_nor_torchvision_is_needed(tmp_path):
    folders = [
        vlm.tiny_processor(tmp_path / family, family) for family in ("llava", "llava_next", "qwen2_5_vl")
    ]
    for folder in folders:
        vlm.photo((100, 37)).save(folder / "image.png")
    subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT_TORCH, *folders], check=True)
    for folder in folders:
        units = loaded(folder).units(Picture.of(str(folder / "image.png"), "image"))
        with np.load(folder / "units.npz") as found:
            assert set(found) == set(units)
            for name, array in units.items():
                np.testing.assert_array_equal(found[name], array)
