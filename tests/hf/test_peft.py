"""Adapters go to PEFT and come from PEFT: the same logits, the same merged weights, whatever the settings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification

from ntjax import lora
from ntjax.errors import BadData, ConfigError, InputMissing, Refused
from ntjax.hf.peft import load_adapter, read_adapter_config, save_adapter
from ntjax.models import Model, build
from ntjax.params import Params, Specs
from ntjax.weights import dense
from tests.peft_reference import QWEN2, WARNINGS, adapted, config, load, logits, trained
from tests.torch_reference import logits as our_logits
from tests.torch_reference import pair, random_ids, stacked, tokens

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNINGS]
TOLERANCE = 1e-4
IDS = random_ids(2, 9)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "target_modules": ATTENTION},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "o_proj", "down_proj"]},
    "all biases": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only", "layers_to_transform": [1]},
    "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head", "input_layernorm", "k_proj"]},
    "modules_to_save, several in one": {"modules_to_save": ["1.mlp"], "use_dora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {r"0\.self_attn\.v_proj": 5, r"layers\.1\..*": 1},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3.0},
    },
    "patterns, dora": {"rank_pattern": {"0.self_attn.v_proj": 5}, "use_dora": True, "use_rslora": True},
    "layers_to_transform": {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1]},
    "expression": {"target_modules": r".*layers\.0\.(self_attn\.[qk]_proj|mlp\.up_proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear, excluding": {"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj", "o_proj"]},
    "excluding an expression": {"target_modules": ATTENTION, "exclude_modules": r".*0\.self_attn\.[qo]_proj"},
    "head": {"target_modules": ["lm_head", "v_proj"]},
}


@pytest.fixture(scope="module")
def models() -> tuple[Any, Model, Params]:
    return pair(QWEN2)


def ours(model: Model, params: Params) -> np.ndarray:
    return np.asarray(our_logits(model, params, IDS, tokens(np.ones_like(IDS))))


def noisy(plan: lora.Plan, start: Params) -> Params:
    """Trained weights some steps after the start; what is padding stays zero."""
    rng = np.random.default_rng(0)
    moved = {}
    for path, array in start.items():
        noise = 0.2 * rng.standard_normal(array.shape)
        moved[path] = array + jnp.asarray(np.where(array == 0, 0, noise), array.dtype)
    return moved


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_pefts(case: str, models: Any, tmp_path: Path) -> None:
    base, model, params = models
    reference = adapted(base, r=2, lora_alpha=4, **CASES[case])
    reference.save_pretrained(tmp_path)
    plan, adapter = load_adapter(tmp_path, model.specs)
    assert trained(reference).keys() == names(plan, model.specs)
    joined = plan.join(params, adapter)
    expected = logits(reference, IDS)
    assert np.abs(expected - logits(base, IDS)).max() > 1
    assert np.abs(ours(model, joined) - expected).max() <= TOLERANCE
    merged = stacked(reference.merge_and_unload().state_dict(), model.specs)
    for path, weight in joined.items():
        np.testing.assert_allclose(dense(weight, jnp.float32), merged[path], atol=TOLERANCE, rtol=0)


def names(plan: lora.Plan, specs: Specs) -> set[str]:
    """Names of all that is trained, in PEFT's form."""
    layers = {f"{path}.{part}": rank > 0 for path, rank in plan.ranks.items() for part in PARTS}
    layers |= plan.whole
    declared = plan.specs(specs)
    found = {name for path, spec in declared.items() for index, name in spec.tensors() if layers[path][index]}
    inside = {name.removesuffix(".lora_A.weight") for name in found if name.endswith(".lora_A.weight")}
    return {
        name.replace(".bias", ".base_layer.bias") if name.removesuffix(".bias") in inside else name
        for name in found
    }


PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_for_peft(case: str, models: Any, tmp_path: Path) -> None:
    base, model, params = models
    settings = config(r=2, lora_alpha=4.0, init_lora_weights=False, **CASES[case])
    plan = lora.plan(settings, model.specs)
    adapter = noisy(plan, plan.initial(params, model.specs, jax.random.key(0), jnp.float32)[1])
    save_adapter(tmp_path, plan, adapter, model.specs, settings, "base")
    expected = ours(model, plan.join(params, adapter))
    assert np.abs(expected - logits(base, IDS)).max() > 1
    assert np.abs(logits(load(base, tmp_path), IDS) - expected).max() <= TOLERANCE
    again, read = load_adapter(tmp_path, model.specs)
    assert again.has(plan)
    assert plan.has(again)
    assert read.keys() == adapter.keys()
    for path, array in adapter.items():
        np.testing.assert_array_equal(read[path], array * kept(plan, path, array))


def kept(plan: lora.Plan, path: str, array: jax.Array) -> np.ndarray:
    """1 in the layers that are trained."""
    there = plan.whole[path] if path in plan.whole else np.array(True)
    return there.reshape(there.shape + (1,) * (array.ndim - there.ndim))


@pytest.mark.parametrize("extra", [{}, {"use_rslora": True}, {"use_dora": True}, {"bias": "all"}])
def test_pissa_is_written_as_a_plain_adapter_of_the_base(extra: Any, models: Any, tmp_path: Path) -> None:
    base, model, params = models
    patterns = {"rank_pattern": {"0.self_attn.q_proj": 3}, "alpha_pattern": {"v_proj": 7.0}}
    settings = config(r=2, lora_alpha=4.0, init_lora_weights="pissa", **patterns, **extra)
    plan = lora.plan(settings, model.specs)
    frozen, start = plan.initial(params, model.specs, jax.random.key(0), jnp.float32)
    adapter = noisy(plan, start)
    save_adapter(tmp_path, plan, adapter, model.specs, settings, "base", start=start)
    expected = ours(model, plan.join(frozen, adapter))
    assert np.abs(expected - logits(base, IDS)).max() > 1
    assert np.abs(logits(load(base, tmp_path), IDS) - expected).max() <= TOLERANCE
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["r"], written["rank_pattern"]) == (4, {"0.self_attn.q_proj": 6})
    assert written["init_lora_weights"] is True


def test_a_tied_embedding_is_trained_together_with_the_head(tmp_path: Path) -> None:
    base, model, params = pair({**QWEN2, "tie_word_embeddings": True})
    settings: dict[str, Any] = {"r": 2, "modules_to_save": ["embed_tokens"]}
    reference = adapted(base, ensure_weight_tying=True, **settings)
    reference.save_pretrained(tmp_path / "theirs")
    plan, adapter = load_adapter(tmp_path / "theirs", model.specs)
    expected = logits(reference, IDS)
    assert np.abs(ours(model, plan.join(params, adapter)) - expected).max() <= TOLERANCE
    save_adapter(tmp_path / "ours", plan, adapter, model.specs, config(**settings), "base")
    assert np.abs(logits(load(base, tmp_path / "ours"), IDS) - expected).max() <= TOLERANCE


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_embedding_that_peft_untied_is_refused(tmp_path: Path) -> None:
    base, model, _ = pair({**QWEN2, "tie_word_embeddings": True})
    adapted(base, modules_to_save=["embed_tokens"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="trained apart from the head it is tied to") as error:
        load_adapter(tmp_path, model.specs)
    assert "ensure_weight_tying = true" in str(error.value)


def classifier(base: Any) -> Any:
    scoring = AutoModelForSequenceClassification.from_config(base.config)
    scoring.model.load_state_dict(base.model.state_dict())
    return scoring


def test_a_classifiers_score_is_trained_whole(models: Any, tmp_path: Path) -> None:
    base = classifier(models[0])
    model = build(QWEN2, labels=2)
    reference = adapted(base, r=2, task_type="SEQ_CLS", target_modules="all-linear")
    reference.save_pretrained(tmp_path / "theirs")
    plan, adapter = load_adapter(tmp_path / "theirs", model.specs)
    score = trained(reference)["score.weight"].detach().numpy()
    np.testing.assert_array_equal(adapter["score"], score)
    settings = config(r=2, target_modules="all-linear")
    assert lora.plan(settings, model.specs).has(plan)
    save_adapter(tmp_path / "ours", plan, adapter, model.specs, settings, "base", task_type="SEQ_CLS")
    again = dict(load(base, tmp_path / "ours").named_parameters())
    for name, parameter in reference.named_parameters():
        np.testing.assert_array_equal(again[name].detach(), parameter.detach(), err_msg=name)


def test_a_language_models_adapter_gives_a_classifier_all_but_its_head(models: Any, tmp_path: Path) -> None:
    adapted(models[0], target_modules=["lm_head", "q_proj"]).save_pretrained(tmp_path)
    plan, adapter = load_adapter(tmp_path, build(QWEN2, labels=1).specs)
    assert adapter.keys() == {"blocks.attn.q.lora_A", "blocks.attn.q.lora_B"}
    assert not plan.whole


def test_bfloat16_is_kept_on_the_way(models: Any, tmp_path: Path) -> None:
    _, model, params = models
    settings = config()
    plan = lora.plan(settings, model.specs)
    _, adapter = plan.initial(params, model.specs, jax.random.key(0), jnp.bfloat16)
    save_adapter(tmp_path, plan, adapter, model.specs, settings, "base", dtype="bfloat16")
    read = load_adapter(tmp_path, model.specs, "bfloat16")[1]
    for path, array in adapter.items():
        assert read[path].dtype == jnp.bfloat16
        np.testing.assert_array_equal(read[path], array)


def test_the_config_names_the_base_model_and_says_what_ours_does(models: Any, tmp_path: Path) -> None:
    _, model, params = models
    settings = config(r=3, lora_alpha=6.0, lora_dropout=0.1, layers_to_transform=[0], bias="all")
    plan = lora.plan(settings, model.specs)
    _, adapter = plan.initial(params, model.specs, jax.random.key(0), jnp.float32)
    save_adapter(tmp_path, plan, adapter, model.specs, settings, "org/model")
    read, base_model = read_adapter_config(tmp_path)
    assert base_model == "org/model"
    assert read == replace(settings, target_modules=("q_proj", "v_proj"), task_type="CAUSAL_LM")


@pytest.fixture
def folder(models: Any, tmp_path: Path) -> Path:
    adapted(models[0], r=2).save_pretrained(tmp_path)
    return tmp_path


def changed(folder: Path, **settings: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"peft_type": "IA3"}, ConfigError, "the adapter is IA3, not LORA"),
        ({"lora_bias": True}, ConfigError, "lora_bias = True isn't there in ntjax"),
        ({"target_parameters": ["a"]}, ConfigError, "target_parameters"),
        ({"trainable_token_indices": [3]}, ConfigError, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, ConfigError, "layer_replication"),
        ({"fan_in_fan_out": True}, ConfigError, "fan_in_fan_out"),
        ({"init_lora_weights": "olora"}, ConfigError, "other weights than the base model's"),
        ({"r": "two"}, BadData, "r = 'two'"),
        ({"r": 3}, BadData, r"q_proj.lora_A.weight is \(2, 32\), the model's is \(3, 32\)"),
        ({"use_dora": True}, BadData, "0.self_attn.q_proj.lora_magnitude_vector is missing"),
        ({"layers_to_transform": [1]}, BadData, "0.self_attn.q_proj.lora_A.weight is not asked for"),
    ],
)
def test_what_cant_be_read(settings: Any, error: type, text: str, models: Any, folder: Path) -> None:
    with pytest.raises(error, match=text):
        load_adapter(changed(folder, **settings), models[1].specs)


def test_names_that_are_nowhere_are_passed_over_as_peft_does(models: Any, folder: Path) -> None:
    plan, _ = load_adapter(changed(folder, target_modules=["q_proj", "v_proj", "c_attn"]), models[1].specs)
    assert plan.ranks.keys() == {"blocks.attn.q", "blocks.attn.v"}


def test_missing_pickled_and_broken_files(models: Any, folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-8])
    with pytest.raises(BadData, match="cut short"):
        load_adapter(folder, models[1].specs)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(Refused, match="adapter_model.bin, a pickle"):
        load_adapter(folder, models[1].specs)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(InputMissing):
        load_adapter(folder, models[1].specs)


def test_a_tensor_too_many_is_named(models: Any, folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.extra.weight": np.zeros((2, 2), np.float32)}, path)
    with pytest.raises(BadData, match="extra.weight is not asked for"):
        load_adapter(folder, models[1].specs)


def test_what_was_in_the_folder_goes(models: Any, folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"old")
    plan, adapter = load_adapter(folder, models[1].specs)
    save_adapter(folder, plan, adapter, models[1].specs, config(r=2), "base")
    assert sorted(path.name for path in folder.glob("adapter*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
