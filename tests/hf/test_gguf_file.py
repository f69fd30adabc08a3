"""GGUF files: a tiny Llama written here, and SmolLM2 as people have it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ntjax.errors import BadData, ConfigError
from ntjax.hf.folder import load_params, open_weights
from ntjax.hf.gguf_file import GGUF, LAYER, TOP, in_halves

from .conftest import tensors


def in_pairs(array: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp does to q and k: the halves of each head are interleaved."""
    return array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)


def write(
    path: Path, model: torch.nn.Module, *, architecture: str = "llama", pre: str = "gpt-2", **extra
) -> Path:
    """The tiny Llama as llama.cpp's converter writes it, with a tokenizer of 48 letters."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(3)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["<end>", "ab", *map(chr, range(97, 97 + 46))])
    writer.add_token_types([3] + [1] * 47)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    for key, value in extra.get("fields", {}).items():
        writer.add_string(key, value)
    ours = {hf: name for name, hf in (TOP | LAYER).items()}
    for name, tensor in (tensors(model) | extra.get("tensors", {})).items():
        for hf, part in ours.items():
            if name.endswith(f"{hf}.weight"):
                stem = f"blk.{name.split('.')[2]}.{part}" if part in LAYER else part
                heads = {"attn_q": 4, "attn_k": 2}.get(part)
                writer.add_tensor(f"{stem}.weight", in_pairs(tensor, heads) if heads else tensor)
                break
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_rows_of_a_head_go_from_pairs_to_halves():
    rows = np.arange(8)[:, None]  # two heads of four rows
    assert in_halves(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    np.testing.assert_array_equal(in_halves(in_pairs(rows, 2), 2), rows)


def test_a_gguf_file_is_read_as_the_model_it_was_made_from(tmp_path, model, specs):
    source = open_weights(write(tmp_path / "m.gguf", model))
    named = tensors(model)
    assert source.names() == named.keys()
    for name, tensor in named.items():
        assert source.shape(name) == tensor.shape
        np.testing.assert_array_equal(source.read(name), tensor)
    np.testing.assert_array_equal(
        load_params(source, specs, dtype="float32")["head"], named["lm_head.weight"]
    )


def test_config_json_is_made_of_the_fields(tmp_path, model):
    source = GGUF(write(tmp_path / "m.gguf", model))
    for name, value in source.config.items():
        if name not in ("architectures", "eos_token_id", "tie_word_embeddings"):
            assert getattr(model.config, name) == value, name
    assert source.config["rms_norm_eps"] == 1e-6  # not its nearest float32
    assert source.config["eos_token_id"] == 0
    assert not source.config["tie_word_embeddings"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2': of GGUF files, only those of 'llama'"),
        ({"fields": {"llama.rope.scaling.type": "yarn"}}, "positions scaled by 'yarn'"),
    ],
)
def test_what_is_not_read_is_refused_in_a_sentence(tmp_path, model, change, message):
    with pytest.raises(ConfigError, match=message) as error:
        open_weights(write(tmp_path / "m.gguf", model, **change))
    assert error.value.exit_code == 78


def test_an_unknown_splitting_rule_is_refused(tmp_path, model):
    source = GGUF(write(tmp_path / "m.gguf", model, pre="llama-bpe"))
    with pytest.raises(ConfigError, match="splitting by 'llama-bpe'"):
        source.tokenizer()


def test_an_unknown_tensor_is_refused(tmp_path, model):
    with pytest.raises(BadData, match="tensor rope_freqs.weight"):
        open_weights(write(tmp_path / "m.gguf", model, tensors={"rope_freqs.weight": np.ones(2, np.float32)}))


def test_a_missing_tensor_is_named(tmp_path, model):
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(BadData, match="1 tensors are missing, among them model.layers.1.mlp.up_proj.weight"):
        open_weights(write(tmp_path / "m.gguf", model))


def test_a_file_that_is_no_gguf_is_bad(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"<html>")
    with pytest.raises(BadData, match="web page"):
        open_weights(tmp_path / "m.gguf")


def test_a_file_cut_short_is_bad(tmp_path, model):
    path = write(tmp_path / "m.gguf", model)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(BadData, match="cut short"):
        open_weights(path)


def test_without_the_package_gguf_the_way_to_it_is_said(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'ntjax\[gguf\]'"):
        open_weights(tmp_path / "m.gguf")


def test_smollm2_is_tokenized_with_single_digits_as_it_was_trained(smollm2, tmp_path):
    source = GGUF(smollm2)
    source.tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("\n\n1. one")["input_ids"] == [1116, 33, 30, 582]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], return_dict=False)
    assert ids[:2] == [1, 9690]  # <|im_start|>system, as its template adds when there is none
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(tokenizer) == source.config["vocab_size"] == 49152


@pytest.mark.slow
def test_smollm2_answers_after_the_import(smollm2, tmp_path):
    import importlib

    importlib.import_module("ntjax.import").main(["--model", str(smollm2), "--out", str(tmp_path / "m")])
    assert json.loads((tmp_path / "m/config.json").read_text())["dtype"] == "bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ask = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(ask, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    out = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(out[0, prompt.shape[1] :]) == "The capital of France is Paris.<|im_end|>"
