"""What a model folder from elsewhere may not do, and what half a download looks like."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ntjax.errors import BadData, CheckpointError, ConfigError, InputMissing, Refused
from ntjax.hf.files import inside, read_config, replacing
from ntjax.hf.folder import open_weights, save_params

from .declared import llama_specs, random_params


@pytest.fixture
def shards(tmp_path, specs, config) -> Path:
    """A folder with an index and several files."""
    save_params(
        tmp_path / "s", random_params(specs), specs, dtype="float32", config=config, max_shard_bytes=4000
    )
    return tmp_path / "s"


def renamed(shards: Path, name: str) -> None:
    """Makes the index call its first file `name`."""
    path = shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = min(index["weight_map"].values())
    index["weight_map"] = {key: name if file == first else file for key, file in index["weight_map"].items()}
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\\b", "a\0b", ""]
)
def test_names_that_leave_the_folder_are_refused(shards, name):
    (shards.parent / "secret.safetensors").write_bytes(b"")
    renamed(shards, name)
    with pytest.raises(Refused) as error:
        open_weights(shards)
    assert error.value.exit_code == 77
    assert repr(name) in str(error.value)


def test_a_link_out_of_the_folder_is_refused(shards):
    first = min(shards.glob("*.safetensors"))
    moved = first.rename(shards.parent / "elsewhere.safetensors")
    first.symlink_to(moved)
    with pytest.raises(Refused, match="link to .*elsewhere.safetensors, outside"):
        open_weights(shards)


def test_the_links_of_the_hubs_cache_are_followed(tmp_path, folder):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    shutil.copy(folder / "model.safetensors", blobs / "1234")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1234")
    assert "model.norm.weight" in open_weights(snapshot).names()


def test_a_link_to_the_folder_itself_is_followed(tmp_path, folder):
    (tmp_path / "latest").symlink_to(folder)
    assert "model.norm.weight" in open_weights(tmp_path / "latest").names()


def test_a_file_of_the_index_that_is_absent_is_missed_before_any_is_opened(shards):
    last, first = max(shards.glob("*.safetensors")), min(shards.glob("*.safetensors"))
    last.unlink()
    first.write_bytes(b"not opened")
    with pytest.raises(InputMissing, match=f"{last.name} isn't there") as error:
        open_weights(shards)
    assert error.value.exit_code == 66


def test_an_index_that_disagrees_with_its_files_is_bad(shards):
    renamed(shards, max(shards.glob("*.safetensors")).name)
    with pytest.raises(BadData, match="should be in model-"):
        open_weights(shards)


@pytest.mark.parametrize(
    ("content", "guess"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><title>Sign in</title>", "web page"),
        (b"PK\x03\x04 and more", "torch.save"),
        (b"\x10\0\0\0\0\0\0\0{}", "cut short"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "flax_model.msgpack"])
def test_a_file_that_is_not_what_its_name_says_is_bad_with_a_guess(tmp_path, name, content, guess):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadData, match=guess) as error:
        open_weights(tmp_path)
    assert error.value.exit_code == 65
    assert name in str(error.value)


def test_a_file_cut_short_is_bad(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadData, match="cut short"):
        open_weights(folder)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(Refused, match="save_pretrained") as error:
        open_weights(tmp_path)
    assert error.value.exit_code == 77


def test_a_folder_without_weights_says_what_is_there(tmp_path):
    (tmp_path / "README.md").write_text("")
    with pytest.raises(InputMissing, match="README.md"):
        open_weights(tmp_path)


def test_a_model_that_is_only_its_own_code_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "modeling.Mine"}})
    )
    with pytest.raises(Refused, match="'mine' is code that comes with the model"):
        read_config(tmp_path)


def test_auto_map_beside_a_known_architecture_is_never_run_and_not_needed(tmp_path):
    config = {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path) == config


def test_weights_quantised_by_others_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}'
    )
    with pytest.raises(ConfigError, match="quantised with gptq") as error:
        read_config(tmp_path)
    assert error.value.exit_code == 78


@pytest.mark.parametrize("content", ["{", "[]", "\x00", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_bad(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BadData, match="config.json"):
        read_config(tmp_path)


def test_no_config_is_missing(tmp_path):
    with pytest.raises(InputMissing, match="config.json isn't there"):
        read_config(tmp_path)


def test_a_write_that_fails_leaves_the_old_model_and_no_trace(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def write() -> None:
        with replacing(folder, "model*.safetensors*") as create:
            create("config.json").write(b"{}")
            create("model.safetensors").write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_file_system_that_refuses_is_a_checkpoint_error(tmp_path, config):
    (tmp_path / "file").write_text("")
    specs = llama_specs()
    with pytest.raises(CheckpointError) as error:
        save_params(tmp_path / "file" / "out", random_params(specs), specs, dtype="float32", config=config)
    assert error.value.exit_code == 74


def test_a_hidden_file_is_inside(tmp_path):
    (tmp_path / ".x").write_text("")
    assert inside(tmp_path, ".x") == tmp_path / ".x"
