"""`python -m ntjax.import --vision`: a LLaVA of a language model and a tower, as transformers loads it."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from ntjax.data.pictures import Picture
from ntjax.errors import BadData, ConfigError
from ntjax.hf.files import read_config
from ntjax.hf.folder import load_params
from ntjax.hf.processor import load_processor
from ntjax.models import build
from tests import vlm_reference
from tests.tiny import tiny_model
from tests.vlm import PATCH, SIDE, TOWER, image_processor, photo, tiny_vlm

main = importlib.import_module("ntjax.import").main


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("language") / "model")


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip: both of its towers; siglip: the one; llava: another model's; bare: a config alone."""
    folder = tmp_path_factory.mktemp("towers")
    text = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 1, "projection_dim": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=TOWER, projection_dim=8)).save_pretrained(
        folder / "clip"
    )
    SiglipVisionModel(SiglipVisionConfig(**TOWER)).save_pretrained(folder / "siglip")
    image_processor("llava", "siglip").save_pretrained(folder / "siglip")
    tiny_vlm(folder / "llava", "llava")
    (folder / "bare.json").write_text(json.dumps({**TOWER, "model_type": "clip_vision_model"}))
    return folder


def grafted(language: Path, vision: Path, out: Path, *options: str) -> Path:
    main(["--model", str(language), "--vision", str(vision), "--out", str(out), *options])
    return out


def ends(folder: Path) -> dict[str, np.ndarray]:
    """The weights of a tower, by the ends of their names."""
    others = "text_", "language_", "multi_"
    return {
        name.removeprefix("vision_tower.").removeprefix("vision_model."): x
        for name, x in load_file(folder / "model.safetensors").items()
        if not name.startswith(others)
    }


@pytest.mark.parametrize("kind", ["clip", "siglip", "llava", "bare.json"])
def test_transformers_loads_what_is_made(kind: str, language: Path, towers: Path, tmp_path: Path) -> None:
    out = grafted(language, towers / kind, tmp_path / "out")
    theirs = vlm_reference.model(out)  # no tensor missing, none left over
    before = AutoModelForCausalLM.from_pretrained(language)
    rows = before.config.vocab_size
    embedded = theirs.get_input_embeddings().weight.detach().numpy()
    old = before.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(embedded[:rows], old)
    np.testing.assert_allclose(
        embedded[rows:], np.broadcast_to(old.mean(0), embedded[rows:].shape), atol=1e-6
    )
    assert len(embedded) % 64 == 0
    if kind != "bare.json":
        was, now = ends(towers / kind), ends(out)
        assert now.keys() <= was.keys()
        assert all(np.array_equal(now[name], was[name]) for name in now)
    hf = read_config(out)
    vision, model = load_processor(out, hf), build(hf)
    load_params(out, model.specs, dtype="float32")
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<image>") == vision.image_id == rows
    assert vision.count((50, 40)) == (SIDE // PATCH) ** 2


@pytest.mark.parametrize("kind", ["siglip", "llava"])
def test_images_are_what_the_tower_was_trained_on(
    kind: str, language: Path, towers: Path, tmp_path: Path
) -> None:
    out = grafted(language, towers / kind, tmp_path / "out")
    image: Image.Image = photo((50, 40))
    ours = load_processor(out, read_config(out)).units(Picture.of(image, "row"))["pixels"]
    tower: Any = "siglip" if kind == "siglip" else "clip"
    theirs = image_processor("llava", tower)(images=[image], return_tensors="np")["pixel_values"]
    seen = SIDE // PATCH * PATCH
    np.testing.assert_array_equal(ours, theirs[..., :seen, :seen])


def test_a_conversation_in_parts_shows_its_images(language: Path, towers: Path, tmp_path: Path) -> None:
    out = grafted(language, towers / "clip", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Blue."}]
    before = AutoTokenizer.from_pretrained(language)
    flat = [{"role": "user", "content": "<image>\nWhat?"}, turns[1]]
    for one, other in ((turns, flat), (flat, flat), (turns[1:], turns[1:])):
        shown = tokenizer.apply_chat_template(one, tokenize=False)
        assert shown == before.apply_chat_template(other, tokenize=False)


def test_a_seed_draws_the_same_again_and_a_dtype_is_kept(
    language: Path, towers: Path, tmp_path: Path
) -> None:
    made = [
        load_file(
            grafted(language, towers / "bare.json", tmp_path / name, "--seed", seed) / "model.safetensors"
        )
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))
    ]
    assert all(np.array_equal(made[0][name], made[1][name]) for name in made[0])
    moved = {name.split(".")[0] for name in made[0] if not np.array_equal(made[0][name], made[2][name])}
    assert moved == {"vision_tower", "multi_modal_projector"}
    half = grafted(language, towers / "clip", tmp_path / "half", "--dtype", "bfloat16")
    assert {x.dtype.name for x in load_file(half / "model.safetensors").values()} == {"bfloat16"}


def test_what_a_published_config_leaves_out_is_usual(language: Path, tmp_path: Path) -> None:
    (tmp_path / "tower.json").write_text(
        json.dumps(
            {**{k: v for k, v in TOWER.items() if k != "patch_size"}, "model_type": "siglip_vision_model"}
        )
    )
    config = json.loads((tmp_path / "tower.json").read_text())
    (tmp_path / "tower.json").write_text(json.dumps({**config, "image_size": 32}))
    out = grafted(language, tmp_path / "tower.json", tmp_path / "out")
    assert read_config(out)["vision_config"]["patch_size"] == 16
    assert load_processor(out, read_config(out)).count((50, 40)) == 4


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["language", "--vision", "language"], "has no tower that is known: 'llama'"),
        (["language", "--vision", "language/config.json"], "has no tower that is known: 'llama'"),
        (["towers/llava", "--vision", "towers/clip"], "sees already"),
        (["language/config.json", "--vision", "towers/clip", "--tokenizer", "language"], "has no weights"),
        (["language/config.json"], "a config.json has no tokenizer"),
        (["towers/llava/config.json", "--tokenizer", "towers/llava"], "of a model that sees images"),
        (["language", "--tokenizer", "language"], "has a tokenizer of its own"),
    ],
)
def test_what_makes_no_model_is_refused(
    args: list[str], said: str, language: Path, towers: Path, tmp_path: Path
) -> None:
    places = {"language": str(language), "towers": str(towers)}
    for name, folder in places.items():
        args = [folder + arg.removeprefix(name) if arg.startswith(name) else arg for arg in args]
    with pytest.raises(ConfigError, match=said):
        main(["--model", *args, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_those_of_the_config_are_refused(
    language: Path, towers: Path, tmp_path: Path
) -> None:
    for folder, name in (
        (towers / "siglip", "vision_model.post_layernorm.bias"),
        (language, "model.norm.weight"),
    ):
        torn = Path(shutil.copytree(folder, tmp_path / folder.name))
        named = load_file(torn / "model.safetensors")
        save_file(
            {key: x for key, x in named.items() if not key.endswith(name[-15:])}, torn / "model.safetensors"
        )
    with pytest.raises(BadData, match="of the tower in config.json aren't there"):
        grafted(language, tmp_path / "siglip", tmp_path / "out")
    with pytest.raises(BadData, match="model.norm.weight is missing"):
        grafted(tmp_path / "model", towers / "clip", tmp_path / "out")


def test_a_language_model_of_random_weights(language: Path, tmp_path: Path) -> None:
    options = ["--tokenizer", str(language), "--out", str(tmp_path / "out")]
    main(["--model", str(language / "config.json"), *options])
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
