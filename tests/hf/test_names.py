"""Tensors of vision-language checkpoints: every spelling is read, and what is written transformers loads whole."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.trainer import Trainer

from ntjax import lora, parts
from ntjax.config import LoraConfig
from ntjax.errors import BadData, ConfigError
from ntjax.hf.files import read_config
from ntjax.hf.folder import load_params, open_weights, save_flax, save_params
from ntjax.hf.names import in_file, in_modules
from ntjax.hf.peft import load_adapter, save_adapter
from ntjax.models import build
from ntjax.params import Spec, Specs, decays, unused, weight
from ntjax.weights import dense
from tests.torch_reference import stacked

TEXT = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"image_size": 28, "patch_size": 7, "projection_dim": 16}
MODELS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**TOWER, "model_type": "clip_vision_model"},
        "image_token_index": 39,
    },
    "llava_next": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**TOWER, "model_type": "siglip_vision_model"},
        "image_token_index": 39,
        "image_grid_pinpoints": [[28, 56], [56, 28]],
    },
    "qwen2_5_vl": {
        "text_config": {
            **TEXT,
            **{"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}},
            **{"bos_token_id": 1, "eos_token_id": 2},
        },
        "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2}
        | {"out_hidden_size": 16, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [0]},
        "image_token_id": 39,
    },
}
PUBLISHED = {
    "llava": [
        "language_model.lm_head.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "multi_modal_projector.linear_1.bias",
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
    ],
    "llava_next": ["image_newline", "vision_tower.vision_model.head.probe"],
    "qwen2_5_vl": [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "visual.merger.mlp.0.weight",
        "visual.patch_embed.proj.weight",
    ],
}


@pytest.fixture(scope="module", params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder that transformers wrote, and its model."""
    folder, name = tmp_path_factory.mktemp("saved") / "model", request.param
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **MODELS[name]))
    model.save_pretrained(folder)
    return folder, model


def declared(model: PreTrainedModel) -> Specs:
    """A spec a tensor, under the names of transformers' modules; what has more than three axes is a kernel."""
    specs: Specs = {}
    for name, tensor in model.state_dict().items():
        axes = [f"a{number}" for number in range(tensor.ndim)]
        line = " ".join(axes)
        if tensor.ndim > 3:
            line = f"{' '.join(axes[1:])} -> {axes[0]}"
        sizes = dict(zip(axes, tensor.shape, strict=True))
        specs[name] = weight(sizes, line, name, kernel=tensor.ndim > 3).get_metadata()["spec"]
    return specs


def respelled(folder: Path, out: Path, spell: Any) -> Path:
    """The same checkpoint under other names."""
    shutil.copytree(folder, out)
    tensors = load_file(folder / "model.safetensors")
    save_file({spell(name): array for name, array in tensors.items()}, out / "model.safetensors")
    return out


def test_transformers_spelling_and_that_of_its_modules_are_read(saved: Any, tmp_path: Path) -> None:
    folder, model = saved
    family, tensors = model.config.model_type, model.state_dict()
    as_modules = respelled(folder, tmp_path / "modules", lambda name: in_modules(name, family))
    old_tower = respelled(
        folder,
        tmp_path / "tower",
        lambda name: in_modules(name, family).replace(
            "model.vision_tower.", "model.vision_tower.vision_model."
        ),
    )
    assert set(load_file(as_modules / "model.safetensors")) == set(tensors)
    for one in (folder, as_modules, old_tower):
        source = open_weights(one)
        assert source.names() == set(tensors)
        for name, tensor in tensors.items():
            assert source.shape(name) == tensor.shape
            np.testing.assert_array_equal(source.read(name), tensor.numpy())


def test_what_is_written_has_the_published_names_and_loads_whole(saved: Any, tmp_path: Path) -> None:
    folder, model = saved
    family, specs = model.config.model_type, declared(model)
    params = load_params(folder, specs, dtype="float32")
    save_params(tmp_path, params, specs, dtype="float32", config=read_config(folder), max_shard_bytes=20_000)
    names = {name for file in tmp_path.glob("*.safetensors") for name in load_file(file)}
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert names == {in_file(name, family) for name in specs}
    assert names >= set(PUBLISHED[family])
    loaded: Any = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    again, found = loaded
    assert not any(found.values()), found
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert open_weights(tmp_path).names() == set(specs)


def test_names_of_other_families_stay() -> None:
    for name in ("model.layers.0.mlp.up_proj.weight", "lm_head.weight", "visual.x", "vision_tower.x"):
        assert in_file(name, "llama") == in_modules(name, "llama") == name


def test_a_tensor_under_two_names_is_refused(saved: Any, tmp_path: Path) -> None:
    folder, model = saved
    family = model.config.model_type
    shutil.copytree(folder, tmp_path / "twice")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if in_modules(name, family) != name)
    save_file(tensors | {in_modules(name, family): tensors[name]}, tmp_path / "twice" / "model.safetensors")
    with pytest.raises(BadData, match="are one weight"):
        open_weights(tmp_path / "twice")


def test_a_missing_tensor_is_told(saved: Any, tmp_path: Path) -> None:
    folder, model = saved
    shutil.copytree(folder, tmp_path / "less")
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if "up_proj" in name)
    del tensors[gone]
    save_file(tensors, tmp_path / "less" / "model.safetensors")
    with pytest.raises(BadData, match=f"{in_modules(gone, model.config.model_type)} is missing"):
        load_params(tmp_path / "less", declared(model), dtype="float32")


@pytest.mark.parametrize("freeze", [(), ("vision_tower",)], ids=["all", "no tower"])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_has_the_names_of_modules(freeze: tuple[str, ...], saved: Any, tmp_path: Path) -> None:
    """PEFT makes it of what is trained and no more: nothing of what no model reads, no convolution."""
    folder, base = saved
    model = build(read_config(folder))
    params = load_params(folder, model.specs, dtype="float32")
    asked = LoraConfig(r=2, lora_alpha=4.0, target_modules="all-linear", bias="all", init_lora_weights=False)
    plan = lora.plan(asked, model.specs, frozen=parts.frozen(freeze, model.specs))
    adapter = plan.initial(params, model.specs, jax.random.key(0), jnp.float32)[1]
    save_adapter(tmp_path, plan, adapter, model.specs, asked, "base")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    made = {name for name in theirs.state_dict() if "lora_" in name}
    assert len(made) == sum("lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    merged = stacked(theirs.merge_and_unload().state_dict(), model.specs)
    for path, one in plan.join(params, adapter).items():
        np.testing.assert_allclose(dense(one, jnp.float32), merged[path], atol=1e-6, err_msg=path)
    again, read = load_adapter(tmp_path, model.specs)
    assert again.has(plan)
    assert read.keys() == adapter.keys()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_of_pefts_loses_what_nothing_reads(saved: Any, tmp_path: Path) -> None:
    folder, base = saved
    how = peft.LoraConfig(r=2, target_modules=["q_proj", "fc1", "qkv"])
    peft.get_peft_model(copy.deepcopy(base), how).save_pretrained(tmp_path)
    specs = build(read_config(folder)).specs
    plan, _ = load_adapter(tmp_path, specs)
    assert plan.ranks
    assert not plan.ranks.keys() & unused(specs)


def test_weight_decay_is_where_transformers_has_it(saved: Any) -> None:
    folder, model = saved
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    specs = build(read_config(folder)).specs
    assert {name for spec in specs.values() if decays(spec) for _, name in spec.tensors()} == decayed & set(
        model.state_dict()
    )


def test_convolutions_have_no_flax(saved: Any, tmp_path: Path) -> None:
    folder, model = saved
    specs = declared(model)
    params = load_params(folder, specs, dtype="float32")
    with pytest.raises(ConfigError, match="never had"):
        save_flax(tmp_path, params, specs, dtype="float32", config=read_config(folder))


def test_a_kernel_is_stored_as_the_linear_map_it_is() -> None:
    sizes = {"channels": 3, "patch_height": 7, "patch_width": 5, "embed": 16}
    line = "channels patch_height patch_width -> embed"
    spec: Spec = weight(sizes, line, "patch.weight", kernel=True).get_metadata()["spec"]
    assert spec.shape == spec.torch_shape == (16, 3, 7, 5)
    assert spec.matrix == (16, 105)
    assert not spec.linear
