"""`python -m ntjax.import`: whatever ntjax reads becomes a plain safetensors folder."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from ntjax.errors import BadData, ConfigError
from ntjax.hf.folder import load_params, save_flax
from ntjax.hf.tokenizer import save_tokenizer
from tests.tiny import tiny_tokenizer

from .conftest import tensors
from .test_gguf_file import write

main = importlib.import_module("ntjax.import").main


def test_a_safetensors_folder_is_copied_to_the_bit(folder, model, tmp_path, capsys):
    save_tokenizer(tiny_tokenizer(), folder)
    main(["--model", str(folder), "--out", str(tmp_path / "out")])
    written = load_file(tmp_path / "out/model.safetensors")
    assert written.keys() == tensors(model).keys()
    for name, tensor in tensors(model).items():
        assert written[name].tobytes() == tensor.tobytes()
    assert "30 tensors, 7,408 parameters, float32" in capsys.readouterr().out
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_the_dtype_asked_for_is_written(folder, model, tmp_path):
    main(["--model", str(folder), "--out", str(tmp_path / "out"), "--dtype", "bfloat16"])
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        np.testing.assert_array_equal(tensor, tensors(model)[name].astype(ml_dtypes.bfloat16))
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_each_tensor_keeps_its_own_dtype_unless_asked(folder, tmp_path):
    named = load_file(folder / "model.safetensors")
    mixed = {n: t if "norm" in n else t.astype(ml_dtypes.bfloat16) for n, t in named.items()}
    save_file(mixed, folder / "model.safetensors")
    main(["--model", str(folder), "--out", str(tmp_path / "out")])
    written = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in mixed.items():
        assert written[name].dtype == tensor.dtype
        np.testing.assert_array_equal(written[name], tensor)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_a_flax_folder_becomes_the_torch_model(folder, model, specs, config, tmp_path):
    save_flax(
        tmp_path / "flax", load_params(folder, specs, dtype="float32"), specs, dtype="float32", config=config
    )
    main(["--model", str(tmp_path / "flax"), "--out", str(tmp_path / "out")])
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    for name, tensor in tensors(again).items():
        np.testing.assert_array_equal(tensor, tensors(model)[name])


def test_a_gguf_file_becomes_the_torch_model(model, tmp_path):
    write(tmp_path / "m.gguf", model)
    main(["--model", str(tmp_path / "m.gguf"), "--out", str(tmp_path / "out")])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in tensors(again).items():
        np.testing.assert_array_equal(tensor, tensors(model)[name])
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {"eos_token_id": 0}


def test_weights_that_are_not_the_configs_are_bad(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(
        BadData, match="model.layers.2.input_layernorm.weight in model.safetensors is no weight"
    ):
        main(["--model", str(folder), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_left_alone(folder, tmp_path):
    with pytest.raises(ConfigError, match="isn't empty"):
        main(["--model", str(folder), "--out", str(folder)])


def command(*arguments: str, before: str = "pass") -> subprocess.CompletedProcess[str]:
    script = f"import runpy, sys; {before}; sys.argv = ['import', *sys.argv[1:]]; "
    script += "runpy.run_module('ntjax.import', run_name='__main__', alter_sys=False); "
    script += "print([m for m in ('torch', 'jax', 'transformers') if sys.modules.get(m)])"
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_works_where_there_is_no_torch(folder, tmp_path):
    save_tokenizer(tiny_tokenizer(), folder)
    load = "import pathlib; from ntjax.hf.tokenizer import load_tokenizer; sys.modules['torch'] = None; "
    load += f"load_tokenizer(pathlib.Path({str(folder)!r}))"
    done = command("--model", str(folder), "--out", str(tmp_path / "out"), before=load)
    assert done.returncode == 0, done.stderr
    assert "['jax', 'transformers']" in done.stdout


def test_help_is_quick():
    check = (
        "import atexit; atexit.register(lambda: print(sorted({'jax', 'transformers'} & set(sys.modules))))"
    )
    done = command("--help", before=check)
    assert done.returncode == 0
    assert "--model SRC" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_exit_code_and_message_reach_the_shell(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    done = command("--model", str(tmp_path), "--out", str(tmp_path / "out"))
    assert done.returncode == 77
    assert done.stderr.startswith("ntjax: ")
    assert "Traceback" not in done.stderr
