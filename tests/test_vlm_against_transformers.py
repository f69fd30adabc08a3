"""From files of rows and photos to logits, what our vision-language models make is what transformers makes of them.

And back: what a stage leaves is what transformers and PEFT load.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import peft
import pytest
import torch

from ntjax.config import load_config
from ntjax.data.loader import Plan
from ntjax.feed import Planned, encoded_rows
from ntjax.hf.files import read_config
from ntjax.hf.folder import load_params, open_weights
from ntjax.mesh import place_batch
from ntjax.models import Model, build
from ntjax.models.vision.pictures import Pictures
from ntjax.ops.attention import Tokens
from ntjax.params import Params
from ntjax.prepare import Job, prepare, words_of
from ntjax.weights import einsum
from tests import vlm, vlm_reference
from tests.cases import some
from tests.peft_reference import WARNINGS
from tests.trl_reference import here, write_config

CLOSE = 1e-4
ALONE = 1e-5  # of what is ours either way
ROWS = range(len(vlm_reference.TALKS))
MESHES: dict[str, dict[str, Any]] = {
    "data 4, zero 3 over 2": {"data": 4, "fsdp": 2},
    "data 4, sequence 2": {"data": 4, "sequence": 2},
}

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNINGS]


class Made(NamedTuple):
    """A folder, the photos beside it, and a config whose rows are `vlm_reference.TALKS`."""

    folder: Path
    photos: list[Path]
    out: Path

    def config(self, name: str, **settings: Any) -> Path:
        model_settings = {"model_type": "vlm", **settings.pop("model_settings", {})}
        out, rows = self.out / name, [vlm_reference.row(talk, self.photos) for talk in ROWS]
        for row in rows:
            row["images"] = [f"../{photo}" for photo in row["images"]]
        options = {"max_length": 512, **settings}
        return write_config(self.folder, rows, out, model_settings=model_settings, **options)


def made(out: Path, family: vlm.Family, tower: vlm.Tower) -> Made:
    return Made(vlm.tiny_vlm(out / "model", family, tower), vlm_reference.photos(out), out)


EVERY = pytest.mark.parametrize("place", vlm.FAMILIES, indirect=True, ids=" ".join)
FAST = [("llava", "clip"), ("qwen2_5_vl", "clip")]


def fast(*families: tuple[str, str]) -> Any:
    """Every family, those that aren't named left to CI."""
    named = [pytest.param(one, marks=() if one in families else pytest.mark.more) for one in vlm.FAMILIES]
    return pytest.mark.parametrize("place", named, indirect=True, ids=" ".join)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """A tiny model is slower on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(tmp_path_factory.mktemp("vlm"), *request.param)


def planned(config_path: Path) -> Planned:
    """All rows in one batch that one group sees."""
    config = load_config(config_path)
    stage, folder = config.stages[0], Path(config.model.model_name_or_path)
    hf = read_config(folder)
    words, vision = words_of(config, folder, hf)
    assert vision is not None
    examples, _ = encoded_rows(config, stage, words, build(hf).config.vocab, vision)
    assert examples is not None
    plan = Plan(examples.lengths, stage.row_length, 1, shuffle=False, packing=stage.packs)
    whole = Plan(examples.lengths, stage.row_length, len(plan.packs), shuffle=False, packing=stage.packs)
    return Planned(whole, examples, 0, vision=vision)


def first(feed: Any) -> dict[str, np.ndarray]:
    """The batch [microbatches, ...] of the first step."""
    with feed.open() as steps:
        return next(steps).batch


def logits(model: Model, params: Params, batch: Mapping[str, Any]) -> np.ndarray:
    """[B, T, V] of the first microbatch."""

    @jax.jit
    def forward(params: Params, batch: Mapping[str, jax.Array]) -> jax.Array:
        one = {name: array[0] for name, array in batch.items()}
        at = Tokens(one["positions"], one["segments"])
        hidden = model.hidden(params, one["tokens"], at, Pictures.of(one))
        return einsum("BTD,VD->BTV", hidden, model.head(params))

    return np.asarray(forward(params, dict(batch)))


def loaded(folder: Path) -> tuple[Model, Params]:
    model = build(read_config(folder))
    return model, load_params(folder, model.specs, dtype="float32")


def our_logits(folder: Path, config: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The batch of all rows, and its logits."""
    batch = first(planned(config))
    return {name: array[0] for name, array in batch.items()}, logits(*loaded(folder), batch)


def their_logits(model: Any, given: Mapping[str, torch.Tensor]) -> np.ndarray:
    with torch.no_grad():
        return model(**given).logits.numpy()


@EVERY
def test_rows_with_photos_have_the_logits_of_transformers(place: Made) -> None:
    given = vlm_reference.called(place.folder, [vlm_reference.talk(talk, place.photos) for talk in ROWS])
    wanted = their_logits(vlm_reference.model(place.folder), given)
    batch, found = our_logits(place.folder, place.config("alone"))
    real = given["attention_mask"].numpy() > 0
    time = real.shape[1]
    np.testing.assert_array_equal(batch["segments"][:, :time] > 0, real)
    np.testing.assert_array_equal(batch["tokens"][:, :time][real], given["input_ids"].numpy()[real])
    assert not batch["segments"][:, time:].any()
    check_pixels(place, batch, given)
    assert np.abs(wanted[real]).max() > 1
    worst = np.abs(found[:, :time] - wanted)[real].max()
    print(f"logits: {worst:.1e}")
    assert worst <= CLOSE


def check_pixels(place: Made, batch: dict[str, np.ndarray], given: Mapping[str, torch.Tensor]) -> None:
    """What the tower is given is bit for bit transformers'."""
    pixels = given["pixel_values"].numpy()
    if "image_grid_thw" in given:
        counts = given["image_grid_thw"].prod(dim=1).tolist()
        (pool,) = batch["pictures.patches"]
        ours = np.concatenate([unit[:count] for unit, count in zip(pool, counts, strict=False)])
        np.testing.assert_array_equal(ours, pixels)
        return
    if "image_sizes" in given:  # each picture's tiles are padded to the most
        pixels = np.concatenate(
            [tiles[: np.flatnonzero(tiles.any(axis=(1, 2, 3)))[-1] + 1] for tiles in pixels]
        )
    (pool,) = batch["pictures.pixels"]
    height, width = pool.shape[-2:]  # without what is behind the last whole patch
    np.testing.assert_array_equal(pool[: len(pixels)], pixels[..., :height, :width])
    assert not pool[len(pixels) :].any()


@EVERY
def test_packed_rows_are_as_alone(place: Made) -> None:
    batch, alone = our_logits(place.folder, place.config("alone"))
    feed = planned(place.config("packed", packing=True))
    packed = logits(*loaded(place.folder), first(feed))
    assert feed.plan.documents > 1
    for slot, row in zip(feed.plan.packs, packed, strict=True):
        start = 0
        for talk in slot:
            end = start + int((batch["segments"][talk] > 0).sum())
            np.testing.assert_allclose(row[start:end], alone[talk, : end - start], rtol=0, atol=ALONE)
            start = end


@fast(*FAST)
@pytest.mark.parametrize("name", some(MESHES, [*MESHES][:1]))
def test_a_mesh_has_the_logits_of_one_device(place: Made, name: str) -> None:
    """Eight rows, in groups that each have a pool of their own."""
    _, alone = our_logits(place.folder, place.config("alone"))
    groups = 8 // MESHES[name].get("sequence", 1)
    settings = {"per_device_train_batch_size": 8 // groups, "gradient_accumulation_steps": 1}
    config = load_config(place.config(name, mesh=MESHES[name], **settings))
    setup = prepare(Job(config, config.stages[0], place.folder, place.out / "stage"))
    batch = first(setup.train)
    units = next(array for key, array in batch.items() if key.startswith("pictures."))
    assert units.shape[:2] == (1, groups)
    params = setup.layout.put(loaded(place.folder)[1], setup.model.specs)
    found = logits(setup.model, params, place_batch(batch, setup.layout.mesh))
    real = batch["segments"][0] > 0
    assert np.abs(found - alone[:, : found.shape[1]])[real].max() <= ALONE


def trained(place: Made, name: str, **settings: Any) -> Path:
    """The folder that one step leaves."""
    options: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    options |= {"max_steps": 1, "warmup_steps": 0, "learning_rate": 1e-2}
    return here(place.config(name, **{**options, **settings}))


def moved(folder: Path, base: Path) -> set[str]:
    """The modules' names of the tensors that are not what they were."""
    now, before = (open_weights(each) for each in (folder, base))
    assert now.names() == before.names()
    return {name for name in now.names() if not np.array_equal(now.read(name), before.read(name))}


@pytest.fixture(scope="module")
def exported(place: Made) -> Path:
    return trained(place, "exported")


@fast(*FAST)
def test_what_is_exported_has_our_logits_in_transformers(place: Made, exported: Path) -> None:
    """And is read whole: `vlm_reference.model` sees to that."""
    assert moved(exported, place.folder)
    given = vlm_reference.called(exported, [vlm_reference.talk(talk, place.photos) for talk in ROWS])
    wanted = their_logits(vlm_reference.model(exported), given)
    found = our_logits(exported, place.config("alone"))[1][:, : wanted.shape[1]]
    real = given["attention_mask"].numpy() > 0
    assert np.abs(found - wanted)[real].max() <= CLOSE


@fast(*FAST)
def test_the_exported_processor_is_the_same(place: Made, exported: Path) -> None:
    talk = vlm_reference.talk(4, place.photos)
    before, after = (vlm_reference.processor(folder) for folder in (place.folder, exported))
    assert after.apply_chat_template(talk) == before.apply_chat_template(talk)
    before, after = (vlm_reference.called(folder, [talk]) for folder in (place.folder, exported))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@fast(FAST[0])
@pytest.mark.parametrize(
    "freeze",
    some([["vision_tower"], []], [["vision_tower"]]),
    ids=["language model", "tower too"],
)
def test_an_adapter_does_in_peft_what_the_merged_folder_does(place: Made, freeze: list[str]) -> None:
    settings = {"use_lora": True, "lora_config": {"r": 2, "lora_alpha": 8, "target_modules": "all-linear"}}
    folder = trained(place, f"lora {len(freeze)}", freeze=freeze, model_settings=settings)
    towers = {name for name in moved(folder, place.folder) if re.search(r"vision_tower|visual\.blocks", name)}
    assert bool(towers) != bool(freeze)
    given = vlm_reference.called(folder, [vlm_reference.talk(talk, place.photos) for talk in ROWS])
    adapted = peft.PeftModel.from_pretrained(vlm_reference.model(place.folder), folder / "adapter")
    real = given["attention_mask"].numpy() > 0
    found, wanted = (their_logits(model, given) for model in (adapted.eval(), vlm_reference.model(folder)))
    base = their_logits(vlm_reference.model(place.folder), given)
    assert np.abs(base - wanted)[real].max() > 1e-2
    assert np.abs(found - wanted)[real].max() <= CLOSE
