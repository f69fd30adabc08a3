"""Hugging Face folders in and out: what transformers saved, and what it loads, to the last bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from ntjax.errors import BadData
from ntjax.hf.folder import load_params, save_params

from .conftest import llama, tensors
from .declared import llama_specs, random_params


def test_a_stacked_weight_is_the_layers_tensors_reshaped(folder, model, specs):
    params = load_params(folder, specs, dtype="float32")
    torch_tensors = tensors(model)
    assert params["q"].shape == (3, 4, 4, 16)  # layers, heads, head_dim, embed
    for layer in range(3):
        q = torch_tensors[f"model.layers.{layer}.self_attn.q_proj.weight"]
        np.testing.assert_array_equal(params["q"][layer].reshape(16, 16), q)
    np.testing.assert_array_equal(params["head"], torch_tensors["lm_head.weight"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("largest", [5 * 10**9, 4000])
def test_what_is_saved_is_what_is_loaded_bitwise(tmp_path, specs, config, dtype, largest):
    params = random_params(specs, dtype)
    save_params(tmp_path, params, specs, dtype=dtype, config=config, max_shard_bytes=largest)
    again = load_params(tmp_path, specs, dtype=dtype)
    for path, value in params.items():
        assert again[path].dtype == value.dtype
        assert np.asarray(again[path]).tobytes() == np.asarray(value).tobytes(), path


@pytest.mark.parametrize("largest", [5 * 10**9, 4000])
def test_transformers_loads_every_key_and_computes_the_same(tmp_path, folder, model, specs, config, largest):
    save_params(
        tmp_path, load_params(folder, specs, dtype="float32"), specs,
        dtype="float32", config=config, max_shard_bytes=largest,
    )  # fmt: skip
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(
        info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    )
    ids = torch.arange(24).reshape(2, 12)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_tied_model_is_saved_without_its_head(tmp_path):
    model, specs = llama(tied=True), llama_specs(tied=True)
    model.save_pretrained(tmp_path / "in")
    params = load_params(tmp_path / "in", specs, dtype="float32")
    save_params(tmp_path / "out", params, specs, dtype="float32", config=model.config.to_dict())
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(again(torch.arange(9)[None]).logits, model(torch.arange(9)[None]).logits)


def test_shards_stay_below_the_limit_and_the_index_names_them(tmp_path, specs, config):
    params = random_params(specs)
    save_params(tmp_path, params, specs, dtype="float32", config=config, max_shard_bytes=4000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    sizes = [
        sum(t.nbytes for t in load_file(path).values()) for path in sorted(tmp_path.glob("*.safetensors"))
    ]
    assert len(sizes) > 2
    assert max(sizes) <= 4000
    assert index["metadata"]["total_size"] == sum(sizes)
    assert set(index["weight_map"].values()) == {path.name for path in tmp_path.glob("*.safetensors")}


def test_config_json_keeps_the_architecture_and_says_the_dtype(tmp_path, specs, config):
    old = config | {"torch_dtype": "float16"}
    save_params(tmp_path, random_params(specs), specs, dtype="bfloat16", config=old)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["dtype"] == "bfloat16"
    assert "torch_dtype" not in written


def test_a_smaller_export_takes_the_place_of_a_sharded_one(tmp_path, specs, config):
    params = random_params(specs)
    save_params(tmp_path, params, specs, dtype="float32", config=config, max_shard_bytes=4000)
    save_params(tmp_path, params, specs, dtype="float32", config=config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_weight_is_loaded_and_saved_where_it_is_sharded(tmp_path, folder, model, specs, config):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    split = {"q": PartitionSpec(None, "tensor", None, "fsdp"), "embed": PartitionSpec("tensor", "fsdp")}
    params = load_params(
        folder,
        specs,
        dtype="float32",
        sharding=lambda path, shapes: NamedSharding(mesh, split.get(path, PartitionSpec())),
    )
    assert params["q"].sharding.spec == split["q"]
    assert {shard.data.shape for shard in params["q"].addressable_shards} == {(3, 2, 4, 4)}
    save_params(tmp_path / "out", params, specs, dtype="float32", config=config)
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, tensors(model)[name])


def resaved(folder: Path, **changes: np.ndarray | None) -> None:
    """Rewrites model.safetensors with tensors changed (`__` stands for a dot) or, for None, left out."""
    named = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        named[name.replace("__", ".")] = value
    save_file(
        {name: value for name, value in named.items() if value is not None}, folder / "model.safetensors"
    )


def test_a_missing_an_extra_and_a_misshapen_tensor_are_all_named(folder, specs):
    resaved(
        folder,
        model__norm__weight=None,
        model__layers__3__mlp__up_proj__weight=np.zeros((24, 16), np.float32),
        lm_head__weight=np.zeros((50, 16), np.float32),
    )
    with pytest.raises(BadData) as error:
        load_params(folder, specs, dtype="float32")
    message = str(error.value)
    assert error.value.exit_code == 65
    assert str(folder) in message
    assert "model.norm.weight is missing" in message
    assert "model.layers.3.mlp.up_proj.weight in model.safetensors is no weight of the model" in message
    assert "lm_head.weight in model.safetensors is (50, 16), the model's is (48, 16)" in message


def test_long_lists_of_faults_are_cut(folder):
    with pytest.raises(BadData, match="and 10 more"):
        load_params(folder, llama_specs(layers=5), dtype="float32")


def test_inverse_frequencies_of_old_checkpoints_are_no_weights(folder, specs):
    resaved(folder, model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(2, np.float32))
    assert load_params(folder, specs, dtype="float32").keys() == specs.keys()


def test_a_tied_head_may_be_saved_twice_but_not_differ(folder):
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    resaved(folder, lm_head__weight=embedding)
    load_params(folder, llama_specs(tied=True), dtype="float32")
    resaved(folder, lm_head__weight=embedding + 1)
    with pytest.raises(BadData, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_params(folder, llama_specs(tied=True), dtype="float32")


MEMORY = """
import re, sys, threading, time
from pathlib import Path
import jax, jax.numpy as jnp
from ntjax.hf.folder import load_params, save_params
from tests.hf.declared import llama_specs

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.001)

folder = Path(sys.argv[1])
specs = llama_specs(vocab=8000, embed=512, mlp=2048, layers=8, heads=8, kv_heads=8, head_dim=64)
zeros = {path: jnp.zeros(spec.shape, jnp.bfloat16) for path, spec in specs.items()}
save_params(folder, zeros, specs, dtype="bfloat16", config={})
del zeros
load_params(folder, specs, dtype="float32")  # what the compiler needs is not counted
before = peak = anonymous()
threading.Thread(target=watch, daemon=True).start()
params = load_params(folder, specs, dtype="float32")
print(peak - before, sum(x.nbytes for x in params.values()), 4 * 8000 * 512)
"""


def test_host_memory_stays_below_the_model_in_float32_and_one_tensor(tmp_path):
    out = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # so that freed memory is given back
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    peak, model, tensor = map(int, out.split())
    assert model > 10 * tensor  # or the bound would say little
    assert model < peak < model + tensor
