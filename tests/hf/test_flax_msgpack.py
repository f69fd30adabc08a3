"""Hugging Face Flax folders, against flax.serialization, which transformers 4 wrote them with."""

from __future__ import annotations

import json

import flax.serialization
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from ntjax.errors import BadData
from ntjax.hf.flax_msgpack import flax_path, torch_name
from ntjax.hf.folder import load_params, open_weights, save_flax

from .conftest import tensors
from .declared import random_params

ATTENTION = "model/layers/1/self_attn"


@pytest.fixture
def tree(model) -> dict:
    """The untied Llama as transformers 4's FlaxLlamaForCausalLM held it."""
    flat = {}
    for name, tensor in tensors(model).items():
        path = name.removesuffix(".weight").replace(".", "/")
        if tensor.ndim == 1:
            flat[path + "/weight"] = tensor
        elif name == "model.embed_tokens.weight":
            flat[path + "/embedding"] = tensor
        else:
            flat[path + "/kernel"] = np.ascontiguousarray(tensor.T)
    return unflatten_dict(flat, sep="/")


def assert_is_the_model(params, model) -> None:
    named = tensors(model)
    np.testing.assert_array_equal(params["embed"], named["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["head"], named["lm_head.weight"])
    k = named["model.layers.1.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(params["k"][1].reshape(8, 16), k)


def test_a_flax_folder_is_read_as_the_torch_model(tmp_path, tree, model, specs):
    (tmp_path / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(tree))
    assert_is_the_model(load_params(tmp_path, specs, dtype="float32"), model)


def test_a_sharded_flax_folder_is_read_as_the_torch_model(tmp_path, tree, model, specs):
    flat, weight_map = flatten_dict(tree, sep="/"), {}
    for number in range(3):
        file = f"flax_model-{number + 1:05d}-of-00003.msgpack"
        part = {name: flat[name] for name in sorted(flat)[number::3]}
        (tmp_path / file).write_bytes(flax.serialization.to_bytes(unflatten_dict(part, sep="/")))
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "flax_model.msgpack.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_is_the_model(load_params(tmp_path, specs, dtype="float32"), model)


def test_arrays_that_flax_stores_in_pieces_are_put_together(tmp_path, tree, model, specs, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 256)
    (tmp_path / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(tree))
    monkeypatch.undo()
    assert_is_the_model(load_params(tmp_path, specs, dtype="float32"), model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("largest", [5 * 10**9, 4000])
def test_what_is_saved_is_what_is_loaded_bitwise(tmp_path, specs, config, dtype, largest):
    params = random_params(specs, dtype)
    save_flax(tmp_path, params, specs, dtype=dtype, config=config, max_shard_bytes=largest)
    assert (len(list(tmp_path.glob("*.msgpack"))) > 1) == (largest == 4000)
    again = load_params(tmp_path, specs, dtype=dtype)
    for path, value in params.items():
        assert np.asarray(again[path]).tobytes() == np.asarray(value).tobytes(), path


def test_flax_reads_what_is_saved(tmp_path, tree, model, specs, config):
    params = {path: jnp.asarray(value) for path, value in _params(model, specs).items()}
    save_flax(tmp_path, params, specs, dtype="float32", config=config)
    saved = flatten_dict(
        flax.serialization.msgpack_restore((tmp_path / "flax_model.msgpack").read_bytes()), sep="/"
    )
    expected = flatten_dict(tree, sep="/")
    assert saved.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(saved[name], array)


def _params(model, specs) -> dict:
    named = tensors(model)
    return {
        path: np.stack([named[name] for _, name in spec.tensors()]).reshape(spec.shape)
        for path, spec in specs.items()
    }


def test_the_index_names_tensors_by_their_path_in_the_tree(tmp_path, specs, config):
    save_flax(tmp_path, random_params(specs), specs, dtype="float32", config=config, max_shard_bytes=4000)
    names = json.loads((tmp_path / "flax_model.msgpack.index.json").read_text())["weight_map"]
    assert {"model/embed_tokens/embedding", f"{ATTENTION}/q_proj/kernel", "model/norm/weight"} <= names.keys()


def test_names_follow_the_rule():
    assert torch_name(("model", "norm", "scale")) == "model.norm.weight"
    assert torch_name(("h", "0", "mlp", "bias")) == "h.0.mlp.bias"
    assert flax_path("h.0.mlp.weight", "kernel") == ("h", "0", "mlp", "kernel")
    assert flax_path("h.0.mlp.bias", "kernel") == ("h", "0", "mlp", "bias")


def test_a_flax_file_cut_short_is_bad(tmp_path, tree):
    (tmp_path / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(tree)[:-50])
    with pytest.raises(BadData, match="flax_model.msgpack: cut short"):
        open_weights(tmp_path)


def test_a_convolution_is_no_weight_of_a_language_model(tmp_path):
    tree = {"conv": {"kernel": np.zeros((3, 3, 1, 2), np.float32)}}
    (tmp_path / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(tree))
    with pytest.raises(BadData, match="conv/kernel of shape .* is no linear"):
        open_weights(tmp_path)
