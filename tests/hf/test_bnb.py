"""A checkpoint that bitsandbytes quantised is read as it is, and is refused where it can't be."""

from __future__ import annotations

import importlib
import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from ntjax.errors import BadData, ConfigError
from ntjax.hf.bnb import Prequantised, Settings, read_settings
from ntjax.hf.folder import load_params
from ntjax.hf.shards import Safetensors
from ntjax.hf.tokenizer import save_tokenizer
from ntjax.models import build
from ntjax.quantised import EightBit, FourBit
from tests.tiny import tiny_tokenizer

import_model = importlib.import_module("ntjax.import").main

Tensors = dict[str, torch.Tensor]
HOW: dict[str, dict[str, Any]] = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "bfloat16",
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
Q, DOWN = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny Llama quantised and saved by transformers, each way."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 48,
        "hidden_size": 64,
        "intermediate_size": 70,
        "num_hidden_layers": 2,
    }
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    out = tmp_path_factory.mktemp("quantised")
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=64)).save_pretrained(out / "plain")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes warns of what isn't there to serve with
        for name, how in HOW.items():
            model = LlamaForCausalLM.from_pretrained(
                out / "plain", quantization_config=BitsAndBytesConfig(**how), device_map="cpu"
            )
            model.save_pretrained(out / name)
    return {name: out / name for name in ("plain", *HOW)}


def file(folder: Path) -> Path:
    return folder / "model.safetensors"


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def dequantised(tensors: Tensors, name: str, kind: str) -> np.ndarray:
    """By bitsandbytes, the numbers in a row."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    parts = {
        key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")
    }
    state = QuantState.from_dict(parts, torch.device("cpu"))
    state.shape = torch.Size((state.shape.numel(),))
    return dequantize_4bit(tensors[name].view(torch.uint8), state).numpy().reshape(-1)


@pytest.mark.parametrize("how", ["nf4", "fp4"])
def test_four_bits_are_read_as_they_are(folders: dict[str, Path], how: str) -> None:
    tensors, source = load_file(file(folders[how])), Prequantised(Safetensors(folders[how]))
    linear = [name for name in source.names() if "_proj" in name]
    assert len(linear) == 14
    for name in linear:
        node = source.node(name, source.shape(name))
        assert isinstance(node, FourBit)
        assert (node.kind, node.nested is not None) == (how, how == "nf4")
        codes = tensors[name].view(torch.uint8).numpy().reshape(-1)
        np.testing.assert_array_equal(node.codes.reshape(-1)[: codes.size], codes)
        np.testing.assert_array_equal(node.absmax, tensors[f"{name}.absmax"].numpy())
        wanted = dequantised(tensors, name, how).reshape(source.shape(name))
        np.testing.assert_array_equal(jax.jit(FourBit.dense, static_argnums=1)(node, jnp.float32), wanted)
        np.testing.assert_array_equal(source.read(name), wanted)
        assert source.dtype(name) == source.read(name).dtype == np.float32


def test_eight_bits_are_read_as_they_are(folders: dict[str, Path]) -> None:
    from bitsandbytes.functional import int8_vectorwise_dequant

    tensors, source = load_file(file(folders["int8"])), Prequantised(Safetensors(folders["int8"]))
    for name in (name for name in source.names() if "_proj" in name):
        node, scale = source.node(name, source.shape(name)), tensors[name.removesuffix("weight") + "SCB"]
        assert isinstance(node, EightBit)
        np.testing.assert_array_equal(node.codes, tensors[name].numpy())
        np.testing.assert_array_equal(node.scale, scale.numpy())
        wanted = int8_vectorwise_dequant(tensors[name], scale).numpy()
        np.testing.assert_array_equal(source.read(name), wanted)


def test_what_is_imported_is_quantised_no_more(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["nf4"], tmp_path / "nf4"))
    save_tokenizer(tiny_tokenizer(), folder)
    import_model(["--model", str(folder), "--out", str(tmp_path / "out")])
    assert "quantization_config" not in config(tmp_path / "out")
    model, report = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    wanted = Prequantised(Safetensors(folder)).read(Q)
    np.testing.assert_array_equal(model.state_dict()[Q].float().numpy(), wanted)


def test_a_stack_of_which_layers_were_left_out_is_plain(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["nf4"], tmp_path / "left_out"))
    tensors, plain = load_file(file(folder)), load_file(file(folders["plain"]))[Q]
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(Q)}
    save_file({**kept, Q: plain}, file(folder), metadata={"format": "pt"})
    source, specs = Prequantised(Safetensors(folder)), build(config(folder)).specs
    params = load_params(source, specs, dtype="float32")
    found = np.asarray(params["blocks.attn.q"]).reshape(2, *plain.shape)
    np.testing.assert_array_equal(found[1], plain.numpy())
    np.testing.assert_array_equal(found[0], source.read(Q.replace("layers.1", "layers.0")))
    assert isinstance(params["blocks.attn.k"], FourBit)


@pytest.mark.parametrize("how", HOW)
def test_it_seems_the_checkpoint_it_stands_for(folders: dict[str, Path], how: str) -> None:
    plain, source = Safetensors(folders["plain"]), Prequantised(Safetensors(folders[how]))
    assert source.names() == plain.names()
    assert {name: source.shape(name) for name in source.names()} == {
        name: plain.shape(name) for name in plain.names()
    }
    assert (source.path, source.file(Q)) == (folders[how], file(folders[how]))
    for name in ("model.norm.weight", "lm_head.weight"):
        assert source.node(name, source.shape(name)) is None
        np.testing.assert_array_equal(source.read(name), plain.read(name))
    for name in (Q, DOWN):
        assert 0 < np.abs(source.read(name) - plain.read(name)).max() < 0.02


@pytest.mark.parametrize("how", HOW)
def test_heads_are_axes_of_their_own(folders: dict[str, Path], how: str) -> None:
    source = Prequantised(Safetensors(folders[how]))
    o = Q.replace("q_proj", "o_proj")
    for name, matrix in ((Q, (4, 16, 64)), (o, (64, 4, 16))):
        node = source.node(name, matrix)
        assert node is not None
        assert node.shape == matrix
        np.testing.assert_array_equal(node.dense(jnp.float32), source.read(name).reshape(matrix))


def test_the_settings_are_what_transformers_writes(folders: dict[str, Path]) -> None:
    assert read_settings(config(folders["plain"])) is None
    assert read_settings(config(folders["nf4"])) == Settings(4, "nf4", True)
    assert read_settings(config(folders["fp4"])) == Settings(4, "fp4", False)
    assert read_settings(config(folders["int8"])) == Settings(8, None, False)


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised with gptq"),
        ({"quant_method": "awq"}, "quantised with awq"),
        ({}, "quantised with unknown"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit = False and load_in_8bit = False"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "af4"}, "'af4'; allowed are nf4, fp4"),
        ("nf4", "not an object"),
    ],
)
def test_other_methods_are_refused(block: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        read_settings({"quantization_config": block}, "model/config.json")
    assert caught.value.where == "model/config.json"


def state(tensors: Tensors, **changes: object) -> None:
    """Changes the JSON of Q's quant_state."""
    name = f"{Q}.quant_state.bitsandbytes__nf4"
    header = json.loads(bytes(tensors[name].tolist())) | changes
    tensors[name] = torch.tensor(list(json.dumps(header).encode()), dtype=torch.uint8)


FAULTS: dict[str, tuple[str, Callable[[Tensors], object]]] = {
    "blocksize is 128; allowed is 64": ("nf4", lambda t: state(t, blocksize=128)),
    "nested_blocksize is 512; allowed is 256": ("nf4", lambda t: state(t, nested_blocksize=512)),
    "quant_type is af4; allowed is nf4 or fp4": ("nf4", lambda t: state(t, quant_type="af4")),
    "dtype is float64; allowed is": ("nf4", lambda t: state(t, dtype="float64")),
    "for its shape and nested_offset": ("nf4", lambda t: state(t, nested_offset="much")),
    "isn't bitsandbytes' JSON": ("nf4", lambda t: t[f"{Q}.quant_state.bitsandbytes__nf4"].zero_()),
    "nf4 .or fp4. is missing": ("nf4", lambda t: t.pop(f"{Q}.quant_state.bitsandbytes__nf4")),
    "nested_absmax is missing": ("nf4", lambda t: t.pop(f"{Q}.nested_absmax")),
    "weight.absmax is missing": ("fp4", lambda t: t.pop(f"{Q}.absmax")),
    "quant_map isn't the table": ("nf4", lambda t: t[f"{Q}.quant_map"].mul_(0.5)),
    "nested_quant_map isn't the table": ("nf4", lambda t: t[f"{Q}.nested_quant_map"].neg_()),
    "holds 2047 numbers where": ("fp4", lambda t: t.update({Q: t[Q][1:]})),
    "absmax holds 63 numbers where": ("fp4", lambda t: t.update({f"{Q}.absmax": t[f"{Q}.absmax"][1:]})),
    "SCB is missing": ("int8", lambda t: t.pop(Q.replace("weight", "SCB"))),
    "weight_format is 1; allowed is 0": ("int8", lambda t: t[f"{Q}_format"].add_(1)),
    "the size of .*SCB is 63": ("int8", lambda t: t.update({Q.replace("weight", "SCB"): torch.ones(63)})),
}


@pytest.mark.parametrize("says", FAULTS)
def test_what_does_not_fit_together_is_said(folders: dict[str, Path], tmp_path: Path, says: str) -> None:
    how, harm = FAULTS[says]
    tensors = {name: tensor.clone() for name, tensor in load_file(file(folders[how])).items()}
    harm(tensors)
    save_file(tensors, file(tmp_path))
    with pytest.raises(BadData, match=says) as caught:
        Prequantised(Safetensors(tmp_path)).read(Q)
    assert Q in caught.value.message
    assert caught.value.where == str(file(tmp_path))
    assert caught.value.fix
