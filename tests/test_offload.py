"""Weights in the host's memory change no number, and are on the devices a layer at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ntjax import mesh as meshes
from ntjax.config import load_config
from ntjax.elsewhere import FAR, NEAR
from ntjax.errors import ConfigError
from ntjax.estimate.programs import Programs
from ntjax.layout import Layout
from ntjax.mesh import HOST
from ntjax.models import build
from ntjax.params import initial
from ntjax.pipeline import run
from ntjax.prepare import layout_of
from ntjax.quantised import in_words, quantise_4bit, quantise_8bit
from tests.cases import some
from tests.cli.process import write_rows
from tests.jaxprs import equations
from tests.tiny import tiny_model

WORDS = ["sea", "sky", "blue", "wide", "Paris", "France", "capital", "one", "two", "three"]
LETTERS = """
def letters(prompts, responses):
    return [sum("a" <= c <= "m" for c in text) / max(len(text), 1) for text in responses]
"""
STAGE = {"max_steps": 3, "learning_rate": 1e-3, "warmup_steps": 0, "logging_steps": 1, "save_strategy": "no"}
SFT: dict[str, Any] = {"stage_type": "sft", "packing": True, "max_length": 64}
DPO: dict[str, Any] = {"stage_type": "dpo", "max_length": 64}
GRPO: dict[str, Any] = {"stage_type": "grpo", "num_generations": 4, "max_completion_length": 8, "beta": 0.1}
GRPO |= {"reward_function": "letters.py:letters", "num_iterations": 2}
PPO: dict[str, Any] = {
    "stage_type": "ppo",
    "max_completion_length": 8,
    "reward_function": "letters.py:letters",
}


def lora(**settings: Any) -> dict[str, Any]:
    return {"use_lora": True, "lora_config": {"target_modules": "all-linear", "r": 4, **settings}}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sft": (SFT, {}),
    "sft, lora": (SFT, lora()),
    "sft, 4 bits": (SFT, lora() | {"load_in_4bit": True}),
    "dpo, lora": (DPO, lora()),
}
MORE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sft, accumulated": (SFT | {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}),
    "sft, 4 bits, double": (SFT, lora() | {"load_in_4bit": True, "bnb_config": {"use_double_quant": True}}),
    "sft, 8 bits, dora": (SFT, lora(use_dora=True) | {"load_in_8bit": True}),
    "sft, pissa, embeddings": (SFT, lora(init_lora_weights="pissa", modules_to_save=["embed_tokens"])),
    "sft, a layer whole": (SFT, lora(target_modules=["q_proj"], modules_to_save=["0.mlp.up_proj"])),
    "dpo, a reference that follows": (DPO | {"sync_ref_model": True, "ref_model_sync_steps": 2}, {}),
    "reward": ({"stage_type": "reward", "max_length": 64}, {}),
    "grpo": (GRPO, {}),
    "grpo, lora": (GRPO, lora()),
    "ppo": (PPO, {}),
}
Train = Callable[..., tuple[list[dict[str, Any]], dict[str, np.ndarray]]]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """train(stage, model settings, devices, offload): the metrics of three steps of 8 rows, and the weights left."""
    folder = tmp_path_factory.mktemp("offload")
    tiny_model(folder / "model")
    (folder / "letters.py").write_text(LETTERS)
    rows = [
        {
            "prompt": f"What is {WORDS[i % 10]} {i}?",
            "completion": f"It is {WORDS[3 * i % 10]}.",
            "chosen": f"It is {WORDS[3 * i % 10]}.",
            "rejected": f"{WORDS[7 * i % 10]} " * (i % 4 + 1),
        }
        for i in range(48)
    ]
    write_rows(folder / "rows.jsonl", rows)
    make = meshes.make_mesh

    def train(stage: dict[str, Any], model: dict[str, Any], count: int, offload: bool) -> Any:
        data: dict[str, Any] = {"dataset_path": str(folder / "rows.jsonl")}
        if stage["stage_type"] in ("dpo", "reward"):
            data |= {"prompt_field": "prompt"}
        config = {
            "task_name": "offload",
            "base_output_dir": str(folder / "out"),
            "use_tensorboard": False,
            "model": {"model_name_or_path": str(folder / "model"), **model},
            "datasets": {"rows": data},
            "mesh": {"zero_stage": 3, "offload_param": offload},
            "stages": [STAGE | stage | {"per_device_train_batch_size": 8 // count}],
        }
        path = folder / "config.json"
        path.write_text(json.dumps(config))
        devices = jax.devices()[:count]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "ntjax.prepare.make_mesh", lambda sizes, _=None, **rest: make(sizes, devices, **rest)
            )
            left = run(load_config(path)) / f"{stage['stage_type']}_stage"
        lines = (left / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], load_file(left / "model.safetensors")

    return train


def check(case: tuple[dict[str, Any], dict[str, Any]], devices: int, train: Train) -> None:
    (near, kept), (far, left) = (train(*case, devices, offload) for offload in (False, True))
    assert len(near) == len(far) == 3
    for name in ("loss", "grad_norm"):
        wanted = [line[name] for line in near]
        assert [line[name] for line in far] == pytest.approx(wanted, rel=1e-6, abs=1e-9), name
    assert left.keys() == kept.keys()
    for name, weight in kept.items():
        np.testing.assert_allclose(left[name], weight, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("devices", some([1, 4], [4]))
@pytest.mark.parametrize("name", some(CASES, ["sft", "sft, lora"], CASES))
def test_a_run_is_what_it_is_without(name: str, devices: int, train: Train) -> None:
    check(CASES[name], devices, train)


@pytest.mark.parametrize("name", some(MORE, ["sft, 4 bits, double"], ["grpo, lora"]))
def test_so_are_all_the_ways_in_which_weights_are_used(name: str, train: Train) -> None:
    check(MORE[name], 2, train)


HF = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 256}
HF |= {
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}


def test_matrices_are_what_is_moved() -> None:
    layout = Layout(meshes.make_mesh({"fsdp": 8}), 3, offload=True)
    specs = build(HF, layout=layout).specs
    params = initial(specs, jax.random.key(0))
    kinds = {path: w.sharding.memory_kind for path, w in layout.put(params, specs).items()}
    near = {"blocks.attn_norm", "blocks.mlp_norm", "norm"}
    assert {path for path, kind in kinds.items() if kind != HOST} == near
    layer = np.asarray(params["blocks.mlp.up"][0])
    for double, far in ((True, {"codes"}), (False, {"codes", "absmax"})):
        node = layout.packed(specs["blocks.mlp.up"], quantise_4bit(layer, "nf4", double, layer.shape))
        put = layout.put({"blocks.mlp.up": jax.tree.map(lambda x: np.stack([x] * 6), node)}, specs)
        arrays = jax.tree_util.tree_leaves_with_path(put["blocks.mlp.up"])
        assert {path[-1].name for path, x in arrays if x.sharding.memory_kind == HOST} == far


@pytest.mark.parametrize("double", [True, False])
def test_codes_in_words_are_the_same_codes(double: bool) -> None:
    numbers = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    for node in (quantise_4bit(numbers, "nf4", double, numbers.shape), quantise_8bit(numbers, 1)):
        words = in_words(node, 8)
        assert (words.codes.dtype, words.shape) == (np.uint32, node.shape)
        arrays = jax.tree.map(jnp.asarray, node)
        np.testing.assert_array_equal(in_words(arrays, 8).codes, words.codes)
        np.testing.assert_array_equal(words.dense(jnp.float32), node.dense(jnp.float32))
    assert in_words(quantise_8bit(numbers[:, :16], 1), 8).codes.dtype == np.int8  # no four for each of eight


def program(tmp_path: Path, **model: Any) -> Any:
    """The SFT step of a model of six layers on 8 devices."""
    (tmp_path / "rows.jsonl").write_text("")
    settings = {"model_name_or_path": str(tmp_path), "gradient_checkpointing": True, **model}
    table = {"model": settings, "datasets": {"d": {"dataset_path": "rows.jsonl"}}}
    table |= {"mesh": {"offload_param": True}, "stages": [{"stage_type": "sft", "max_length": 64}]}
    (tmp_path / "run.json").write_text(json.dumps(table))
    config = load_config(tmp_path / "run.json")
    return next(iter(Programs(config, config.stages[0], HF, layout_of(config))))


def moved(jaxpr: Any, before: Any, after: Any) -> Iterator[tuple[int, ...]]:
    """The shapes of all arrays that a program moves from one memory to another, once for each place it does so."""
    for equation in equations(jaxpr):
        if equation.primitive.name == "device_put":
            for x, y in zip(equation.invars, equation.outvars, strict=True):
                if (x.aval.memory_space, y.aval.memory_space) == (before, after):
                    yield x.aval.shape


def test_frozen_weights_are_fetched_layer_by_layer(tmp_path: Path) -> None:
    """Seven matrices of a layer, forward and backward, a device its part of them; no stack of layers."""
    step = program(tmp_path, **lora())
    shapes = list(moved(step.function.trace(*step.arguments).jaxpr.jaxpr, FAR, NEAR))
    assert len(shapes) >= 14
    assert not [shape for shape in shapes if shape[0] == 6]
    assert step.held["weights"] < step.held["optimizer"]  # adapters and norms: no base


def test_gradients_of_weights_that_are_trained_stay_on_the_devices(tmp_path: Path) -> None:
    step = program(tmp_path)
    jaxpr = step.function.trace(*step.arguments).jaxpr.jaxpr
    assert not list(moved(jaxpr, NEAR, FAR))
    stacks = [shape for shape in moved(jaxpr, FAR, NEAR) if shape[0] == 6]
    assert len(stacks) == 7  # for their update


def test_a_machine_without_host_memory_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntjax.prepare.has_host_memory", lambda mesh: False)
    with pytest.raises(
        ConfigError, match=r"offload_param = true, but cpu devices can't reach the host's memory"
    ):
        program(tmp_path)
