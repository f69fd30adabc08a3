"""GRPO and PPO raise the reward of a model of random weights, from prompts to weights, with fixed seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ntjax.config import load_config
from ntjax.mesh import make_mesh
from ntjax.pipeline import run
from tests.cli.process import write_rows
from tests.tiny import tiny_model

LETTERS = """
def letters(prompts, responses):
    return [sum("a" <= c <= "m" for c in text) / max(len(text), 1) for text in responses]
"""
COMMON = {
    "reward_function": "letters.py:letters",
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "per_device_train_batch_size": 32,
}
GRPO = {"stage_type": "grpo", "num_generations": 8, "max_completion_length": 8, "max_steps": 30}
PPO = {"stage_type": "ppo", "response_length": 8, "ppo_epochs": 2, "max_steps": 60, "temperature": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trend")
    tiny_model(path / "model")
    (path / "letters.py").write_text(LETTERS)
    write_rows(path / "asked.jsonl", [{"prompt": f"Say {n}:"} for n in range(16)])
    return path


@pytest.mark.parametrize("stage", [GRPO, PPO], ids=["grpo", "ppo"])
def test_rewards_rise(stage: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    one = jax.devices()[:1]
    monkeypatch.setattr("ntjax.prepare.make_mesh", lambda sizes, *_, **__: make_mesh(devices=one))
    config = {
        "task_name": stage["stage_type"],
        "base_output_dir": "out",
        "use_tensorboard": False,
        "model": {"model_name_or_path": "model"},
        "datasets": {"rl": {"dataset_path": "asked.jsonl"}},
        "stages": [COMMON | stage],
    }
    path = folder / f"{stage['stage_type']}.json"
    path.write_text(json.dumps(config))
    ran = run(load_config(path))
    lines = (ran / f"{stage['stage_type']}_stage" / "completions.jsonl").read_text().splitlines()
    rewards = [json.loads(line)["reward"] for line in lines]
    first, last = np.mean(rewards[:64]), np.mean(rewards[-64:])
    assert first < 0.25
    assert last > first + 0.15
