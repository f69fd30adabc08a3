"""Configs that are shipped, on a real model or on the tiny one, unchanged but for the model's path and steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

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
