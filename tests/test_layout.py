"""Every mesh computes what one device computes, with the collectives and the memory that its ZeRO stage means."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from ntjax import mesh as meshes
from ntjax.config import load_config
from ntjax.pipeline import run
from tests.cli.process import write_rows
from tests.tiny import tiny_model

WORDS = ["sea", "sky", "blue", "wide", "Paris", "France", "capital", "one", "two", "three"]
COMMON = {
    "max_steps": 10,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_strategy": "no",
}
LETTERS = """
def letters(prompts, responses):
    return [sum("a" <= c <= "m" for c in text) / max(len(text), 1) for text in responses]
"""
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"stage_type": "sft", "packing": True, "max_length": 64},
    "dpo": {"stage_type": "dpo", "max_length": 64},
    "grpo": {
        "stage_type": "grpo",
        "num_generations": 4,
        "max_completion_length": 8,
        "beta": 0.1,
        "reward_function": "letters.py:letters",
    },
}
MESHES: dict[str, dict[str, Any]] = {
    "zero 0": {"zero_stage": 0},
    "zero 1": {"zero_stage": 1},
    "zero 2": {"zero_stage": 2},
    "zero 3": {"zero_stage": 3},
    "tensor 2": {"tensor": 2},
    "sequence 2": {"sequence": 2},
    "data 2, zero 3 over 2, sequence 2": {"data": 2, "fsdp": 2, "sequence": 2},
    "zero 3 over 2, tensor 2, sequence 2": {"fsdp": 2, "tensor": 2, "sequence": 2},
    "zero 2 over 4, tensor 2": {"zero_stage": 2, "fsdp": 4, "tensor": 2},
}
Train = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """train(stage, mesh, model): the metrics of ten steps of 8 rows; without a mesh, on one device."""
    folder = tmp_path_factory.mktemp("layout")
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
    done: dict[str, list[dict[str, Any]]] = {}

    def train(kind: str, mesh: dict[str, Any] | None, **model: Any) -> list[dict[str, Any]]:
        name = json.dumps([kind, mesh, model])
        if name in done:
            return done[name]
        devices = jax.devices() if mesh else jax.devices()[:1]
        sizes = {axis: size for axis, size in (mesh or {}).items() if axis != "zero_stage"}
        groups = len(devices) // (sizes.get("tensor", 1) * sizes.get("sequence", 1))
        table: dict[str, Any] = {"dataset_path": str(folder / "rows.jsonl")}
        if kind == "dpo":
            table |= {"prompt_field": "prompt"}
        config = {
            "task_name": "layout",
            "base_output_dir": str(folder / "out" / str(len(done))),
            "use_tensorboard": False,
            "model": {"model_name_or_path": str(folder / "model"), **model},
            "datasets": {"rows": table},
            "mesh": mesh or {},
            "stages": [COMMON | STAGES[kind] | {"per_device_train_batch_size": 8 // groups}],
        }
        path = folder / f"{len(done)}.json"
        path.write_text(json.dumps(config))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ntjax.prepare.make_mesh", lambda sizes, **rest: make(sizes, devices, **rest))
            ran = run(load_config(path))
        lines = (ran / f"{kind}_stage" / "metrics.jsonl").read_text().splitlines()
        done[name] = [json.loads(line) for line in lines]
        return done[name]

    return train


def check(ours: list[dict[str, Any]], one: list[dict[str, Any]]) -> None:
    assert len(ours) == len(one) == 10
    for name in ("loss", "grad_norm"):
        wanted = [line[name] for line in one]
        assert [line[name] for line in ours] == pytest.approx(wanted, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("kind", STAGES)
def test_ten_steps_are_those_of_one_device(kind: str, mesh: dict[str, Any], train: Train) -> None:
    check(train(kind, mesh), train(kind, None))
