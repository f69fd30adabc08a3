"""Shapes of a plan are those that training makes: weights, batches, optimizer, of every kind of stage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ntjax import memory, trainer
from ntjax.config import load_config
from ntjax.estimate import shapes
from ntjax.estimate.chips import CHIPS
from ntjax.estimate.paper import shortage
from ntjax.estimate.programs import Programs
from ntjax.estimate.target import Target
from ntjax.hf.files import read_config
from ntjax.loop import Loop
from ntjax.pipeline import run
from ntjax.prepare import Job, layout_of, prepare
from tests.cases import some
from tests.cli.process import write_rows
from tests.tiny import tiny_model

LETTERS = """
def letters(prompts, responses):
    return [float(len(text)) for text in responses]
"""
LORA = {"use_lora": True, "lora_config": {"r": 4, "target_modules": "all-linear"}}
MODELS: dict[str, dict[str, Any]] = {
    "full": {},
    "bf16": {"dtype": "bfloat16", "param_dtype": "bfloat16"},
    "lora": LORA,
    "dora on nf4": {
        **LORA,
        "lora_config": {**LORA["lora_config"], "use_dora": True},
        "load_in_4bit": True,
        "bnb_config": {"use_double_quant": True},
    },
    "8 bits": {**LORA, "load_in_8bit": True},
    "a head trained whole": {**LORA, "lora_config": {"modules_to_save": ["embed_tokens"]}},
}
ROLLOUT = {"reward_function": "letters.py:letters", "max_length": 64, "max_steps": 1}
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"packing": True, "max_length": 64, "gradient_accumulation_steps": 2},
    "pretrain": {"max_length": 64},
    # A plan has rows that are as long as they may be; what shares a prompt takes less room than that.
    "reward": {"max_length": 64, "share_prompts": False},
    "dpo": {"max_length": 64, "share_prompts": False},
    "ppo": {**ROLLOUT, "response_length": 8},
    "grpo": {**ROLLOUT, "num_generations": 2, "max_completion_length": 8, "beta": 0.1, "num_iterations": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    tiny_model(folder / "model")
    (folder / "letters.py").write_text(LETTERS)
    answer = "It is wide and blue, and " * 6
    write_rows(folder / "pairs.jsonl", [{"prompt": "The sea?", "chosen": answer, "rejected": "Sky."}] * 48)
    write_rows(folder / "rows.jsonl", [{"prompt": "The sea?", "completion": answer}] * 48)
    write_rows(folder / "text.jsonl", [{"text": answer}] * 48)
    return folder


def config_of(folder: Path, kind: str, model: dict[str, Any], mesh: dict[str, Any]) -> Any:
    data = {"dpo": "pairs", "reward": "pairs", "pretrain": "text"}.get(kind, "rows")
    stage = {"stage_type": kind, "max_steps": 1, "per_device_train_batch_size": 1, "warmup_steps": 0}
    config = {
        "base_output_dir": str(folder / "out"),
        "use_tensorboard": False,
        "model": {"model_name_or_path": str(folder / "model"), **model},
        "datasets": {"rows": {"dataset_path": str(folder / f"{data}.jsonl")}},
        "mesh": mesh,
        "stages": [stage | STAGES[kind] | {"save_strategy": "no"}],
    }
    path = folder / "run.json"
    path.write_text(json.dumps(config))
    return load_config(path)


def programs(config: Any) -> Programs:
    hf = read_config(Path(config.model.model_name_or_path))
    return Programs(config, config.stages[0], hf, layout_of(config))


def told(tree: Any) -> Any:
    """Shape, dtype and place of every array."""
    return jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype), x.sharding.spec, x.sharding.memory_kind), tree)


@pytest.mark.parametrize("mesh", [{"zero_stage": 3}, {"fsdp": 4, "tensor": 2}], ids=["zero 3", "tensor 2"])
@pytest.mark.parametrize("kind", ["full", "bf16", "lora", "dora on nf4", "8 bits", "a head trained whole"])
def test_weights_and_optimizer(kind: str, mesh: dict[str, Any], folder: Path) -> None:
    config = config_of(folder, "sft", MODELS[kind], mesh)
    setup = prepare(Job(config, config.stages[0], folder / "model", folder / "out" / "stage"))
    policy = trainer.start(setup)
    made = programs(config)
    weights = shapes.weights(config, made.stage, made.model, made.layout)
    assert told(weights.frozen) == told(policy.frozen)
    assert told(weights.trainable) == told(made.layout.put(policy.trainable, policy.specs))
    assert weights.specs == policy.specs
    state = made.train(made.model, weights).arguments[0]
    held = sum(memory.held(tree) for tree in (weights.trainable, weights.frozen))
    train = next(iter(made))
    assert train.held == {"weights": held, "optimizer": memory.held(state.opt_state)}


@pytest.mark.parametrize("kind", some(STAGES, ["sft", "dpo", "grpo"]))
def test_batches(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step is given in a run; rows are shorter there where no row is as long as the stage lets it be."""
    config = config_of(folder, kind, {}, {"zero_stage": 3})
    seen: list[dict[str, Any]] = []
    prepared = Loop.prepared

    def spied(loop: Any, batch: Any) -> Any:
        seen.append(prepared(loop, batch))
        return seen[-1]

    monkeypatch.setattr(Loop, "prepared", spied)
    run(config)
    planned = next(iter(programs(config))).arguments[2]
    given = seen[0]
    assert {n: (x.dtype, x.ndim) for n, x in planned.items()} == {
        n: (x.dtype, x.ndim) for n, x in given.items()
    }
    for name, x in given.items():
        assert x.shape[:2] == planned[name].shape[:2], name
        assert all(a <= b for a, b in zip(x.shape, planned[name].shape, strict=True)), name


def test_every_program_of_a_stage_is_there(folder: Path) -> None:
    def names(kind: str, **settings: Any) -> list[str]:
        made = programs(config_of(folder, kind, {}, {"zero_stage": 3}))
        return [one.name for one in replace(made, stage=replace(made.stage, **settings))]

    assert names("sft") == ["train"]
    assert names("dpo") == ["train", "reference"]
    assert names("dpo", precompute_ref_log_probs=True) == ["train", "reference"]
    assert names("grpo") == ["train", "reference", "policy", "prefill", "decode"]
    assert names("grpo", beta=0.0, num_iterations=1) == ["train", "prefill", "decode"]
    assert names("ppo", reward_model_path="stage:reward") == [
        *("train", "reference", "policy", "prefill", "decode", "reward")
    ]


def test_what_lies_beside_a_program_is_told(folder: Path) -> None:
    """A reference of its own, with all weights trained; with adapters it is the frozen weights."""
    full = {one.name: one for one in programs(config_of(folder, "dpo", {}, {"zero_stage": 3}))}
    assert full["train"].beside == {"reference": full["reference"].held["reference"]}
    assert set(full["reference"].beside) == {"weights", "optimizer"}
    lora = {one.name: one for one in programs(config_of(folder, "dpo", LORA, {"zero_stage": 3}))}
    assert lora["train"].beside == {}
    assert set(lora["reference"].held) == {"weights"}


@pytest.mark.parametrize("model", ["full", "dora on nf4"])
@pytest.mark.parametrize("kind", STAGES)
def test_every_stage_can_be_planned_on_paper(kind: str, model: str, folder: Path) -> None:
    one = programs(config_of(folder, kind, {**MODELS[model], "attention": "blocked"}, {"zero_stage": 3}))
    for size, short in ((1e3, True), (1e15, False)):
        chip = replace(CHIPS["h100"], memory=size)
        assert (shortage(one, Target("small", jax.devices(), chip)) is not None) == short
