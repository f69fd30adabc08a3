"""Configs that are shipped, on a real model or on the tiny one, unchanged but for the model's path and steps."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests.cli.process import metrics
from tests.tiny import tiny_model
from tests.trl_reference import smollm2_folder

ROOT = Path(__file__).parents[2]


def train(config: str, out: Path, changed: list[str]) -> Path:
    """Runs a shipped config, as a user would; where its runs are."""
    done = subprocess.run(
        [sys.executable, "-m", "ntjax.train", "--config", f"configs/{config}", "--output-dir", out, *changed],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.slow
def test_the_familiar_example_runs_on_a_real_model(tmp_path: Path) -> None:
    changed = [f"model.model_name_or_path={smollm2_folder(tmp_path / 'smollm2')}"]
    changed += ["stages.sft.max_steps=1", "stages.dpo.max_steps=1"]
    run = train("llm_training_example.toml", tmp_path, changed) / "llama2_sft_dpo" / "latest"
    (first,) = metrics(run / "dpo_stage")
    # The policy is still its own reference, but for the rounding of bfloat16 in two programs.
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert first["rewards/margins"] == pytest.approx(0, abs=0.02)
    for stage in ("sft_stage", "dpo_stage"):
        _, report = AutoModelForCausalLM.from_pretrained(run / stage, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert (run / stage / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_the_whole_chain_runs_on_a_tiny_model(tmp_path: Path) -> None:
    changed = [f"model.model_name_or_path={tiny_model(tmp_path / 'tiny')}"]
    run = train("full_rlhf_pipeline.toml", tmp_path, changed) / "full_rlhf" / "latest"
    for kind in ("pretrain", "sft", "reward", "dpo", "ppo", "grpo"):
        assert (run / f"{kind}_stage" / "adapter" / "adapter_model.safetensors").exists()
    assert "rewards/reward_stage/mean" in metrics(run / "ppo_stage")[0]
    assert {"rewards/last_number/mean", "rewards/length/mean"} <= metrics(run / "grpo_stage")[0].keys()
    _, report = AutoModelForCausalLM.from_pretrained(run / "grpo_stage", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.slow
def test_the_recipe_of_llava_runs_on_a_tiny_model_that_was_given_a_tower(tmp_path: Path) -> None:
    tower = ROOT / "configs" / "data" / "shapes" / "tower.json"
    main = importlib.import_module("ntjax.import").main
    main(
        [
            "--model",
            str(tiny_model(tmp_path / "tiny")),
            "--vision",
            str(tower),
            "--out",
            str(tmp_path / "sees"),
        ]
    )
    changed = [f"model.model_name_or_path={tmp_path / 'sees'}", "stages.0.learning_rate=1e-2"]
    run = train("vlm_training_example.toml", tmp_path, changed) / "llava_recipe" / "latest"
    before = load_file(tmp_path / "sees" / "model.safetensors")
    moved = {}
    for stage in ("align_stage", "sft_stage", "dpo_stage"):
        after = load_file(run / stage / "model.safetensors")
        pairs = ((name, before[name].astype("bfloat16"), after[name]) for name in before)
        moved[stage] = {name.split(".")[0] for name, one, other in pairs if (one != other).any()}
        before = after
        _, report = AutoModelForImageTextToText.from_pretrained(run / stage, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert moved["align_stage"] == {"multi_modal_projector"}
    assert moved["sft_stage"] == {"multi_modal_projector", "language_model"}
    assert metrics(run / "dpo_stage")[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
