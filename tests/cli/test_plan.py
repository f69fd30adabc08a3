"""`ntjax.plan`: on the devices there are, and for TPUs and GPUs that need not be here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ntjax.estimate import chips, target
from tests.cli import process
from tests.cli.process import Result

ROOT = Path(__file__).parents[2]
EIGHT = process.devices(8)
GRPO = {
    "stage_type": "grpo",
    "reward_function": "letters.py:letters",
    "num_generations": 4,
    "per_device_train_batch_size": 2,
    "max_length": 64,
    "max_completion_length": 32,
    "beta": 0.1,
}
STAGES = [
    {"stage_type": "sft", "max_length": 64, "per_device_train_batch_size": 2, "gradient_checkpointing": True}
]
STAGES += [{"stage_type": "dpo", "max_length": 64, "per_device_train_batch_size": 1}, GRPO]
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def chain(place: Path) -> str:
    table = {
        "model": {"model_name_or_path": "model", "dtype": "bfloat16"},
        "datasets": {"rows": {"dataset_path": "pairs.jsonl"}},
        "mesh": {"zero_stage": 3},
        "stages": STAGES,
    }
    (place / "plan.json").write_text(json.dumps(table))
    return "plan.json"


@pytest.mark.slow
def test_every_program_of_every_stage_is_in_the_plan(chain: str, ntjax: Run) -> None:
    done = ntjax("plan", "--config", chain, "--json", env=EIGHT)
    assert done.code == 0, done.err
    programs = [json.loads(line) for line in done.out.splitlines()]
    assert [(one["stage"], one["program"]) for one in programs] == [
        *[("sft_stage", "train"), ("dpo_stage", "train"), ("dpo_stage", "reference")],
        *[("grpo_stage", name) for name in ("train", "reference", "prefill", "decode")],
    ]
    for one in programs:
        assert one["total"] == sum(one["memory"].values()) + sum(one["beside"].values())
        assert one["work"]["dense"] > 0
        assert one["moved"] > 0
    train = programs[0]
    assert {each["kind"] for each in train["collectives"]} >= {"all-gather", "reduce-scatter"}
    assert all(each["axes"] == ["fsdp"] for each in train["collectives"])
    # 8 devices share out weights and two moments of 4 bytes each, vectors but for.
    assert train["memory"]["optimizer"] == pytest.approx(2 * train["memory"]["weights"], rel=0.01)


def test_people_are_shown_a_table(chain: str, ntjax: Run) -> None:
    done = ntjax("plan", "--config", chain, "--stages", "sft", env=EIGHT)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert any("8 x cpu; 8 devices: fsdp 8, ZeRO 3" in line for line in lines)
    heading = next(line for line in lines if "program" in line)
    row = next(line for line in lines if line.split()[:2] == ["sft_stage", "train"])
    assert len(row) <= len(heading)
    assert "all-gather along fsdp" in done.out
    assert "compiling train" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--topology", "v9:4x4"], 78, "v5e:4x4"),
        (["--topology", "v5p:4x4"], 78, "v5p:2x2x2"),
        (["--topology", "h100:many"], 78, "h100:8"),
        (["--stages", "sfd"], 78, "sft_stage"),
        (["mesh.tensor=3"], 78, "8"),
        (["--auto"], 78, "--topology"),
        (["model.model_name_or_path=nowhere"], 66, "nowhere"),
    ],
)
def test_mistakes_are_said_in_a_line(
    arguments: list[str], code: int, said: str, chain: str, ntjax: Run
) -> None:
    if "v5p" in str(arguments) and not importlib.util.find_spec("libtpu"):
        pytest.skip("libtpu isn't installed")
    done = ntjax("plan", "--config", chain, *arguments, env=EIGHT)
    assert done.code == code, done.err
    assert said in done.err


def test_training_says_beforehand_what_will_not_fit(
    chain: str, place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ntjax.config import load_config
    from ntjax.pipeline import shortage
    from ntjax.prepare import Job, prepare

    monkeypatch.chdir(place)
    told = load_config(chain, ["model.attention=xla"])
    setup = prepare(Job(told, told.stages[0], place / "model", place / "out" / "sft"))
    assert shortage(setup) is None  # nothing is known of a CPU
    small = replace(chips.CHIPS["h100"], memory=1e5)
    monkeypatch.setattr(target, "KINDS", {"cpu": "h100"})
    monkeypatch.setattr(target, "CHIPS", {"h100": small})
    assert "sft_stage may need" in str(shortage(setup))
    monkeypatch.setattr(target, "CHIPS", {"h100": replace(small, memory=1e12)})
    assert shortage(setup) is None


def plan(*arguments: str) -> Any:
    """The plan of a shipped config as a user gets it."""
    ran = subprocess.run(
        [sys.executable, "-m", "ntjax.plan", "--config", *arguments, "--json"],
        env={**os.environ, "XLA_FLAGS": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return ran.returncode, [json.loads(line) for line in ran.stdout.splitlines()], ran.stderr


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu isn't installed")
def test_a_7b_model_is_planned_for_tpus_that_are_not_here() -> None:
    code, (train,), _ = plan("configs/plan/llama2_7b_sft.toml", "--topology", "v5e:4x4")
    assert code == 0
    assert train["kernels"]["splash"] >= 3
    assert train["fits"]
    assert 6e9 < 16 * train["memory"]["weights"] / 4 < 7e9  # so many weights, in fp32, over 16 chips
    assert train["memory"]["optimizer"] == pytest.approx(2 * train["memory"]["weights"], rel=0.01)
    assert 0.3 < train["utilisation"] < 0.8
    assert {each["axes"][0] for each in train["collectives"]} == {"fsdp"}
    # Weights in bf16 come to a chip once forward and once backward, though the backward pass forms layers again.
    gathers = [each for each in train["collectives"] if each["kind"] == "all-gather"]
    gathered = sum(each["times"] * each["bytes"] * (1 - 1 / each["devices"]) for each in gathers)
    assert gathered < 1.01 * 2 * 15 / 16 * 16 * train["memory"]["weights"] / 2


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu isn't installed")
def test_llava_in_4_bits_fits_a_small_chip() -> None:
    """Microbatches in a loop, for which XLA must not form the dequantised weights of all layers: 13 GB."""
    code, (train,), _ = plan("configs/plan/llava15_7b_qlora.toml", "--topology", "v5e:1x1")
    assert code == 0
    assert train["fits"]
    assert train["memory"]["gradients, temporaries"] < 5e9


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu isn't installed")
def test_what_does_not_fit_ends_with_a_code_and_a_way_out() -> None:
    big = ["stages.sft.per_device_train_batch_size=16", "model.gradient_checkpointing=false"]
    code, (train,), said = plan("configs/plan/llama2_7b_sft.toml", "--topology", "v5e:4x4", *big)
    assert code == 78
    assert train["fits"] is False
    assert "--auto" in said.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda13_plugin"), reason="JAX's CUDA plugin isn't installed"
)
def test_a_7b_model_is_planned_for_gpus_that_are_not_here() -> None:
    code, (train,), _ = plan("configs/plan/llama2_7b_sft.toml", "--topology", "h100:8")
    assert code == 0
    assert train["kernels"]["cudnn"] >= 2
    assert train["memory"]["cuDNN's workspace"] > 0


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda13_plugin"), reason="JAX's CUDA plugin isn't installed"
)
def test_an_update_on_a_gpu_copies_no_state() -> None:
    """Beside the weights and their moments stand gradients, and little else."""
    short = ("stages.sft.max_length=256", "stages.sft.per_device_train_batch_size=1")
    _, (train,), _ = plan("configs/plan/llama2_7b_sft.toml", "--topology", "h100:1", *short)
    assert train["memory"]["gradients, temporaries"] < 1.1 * train["memory"]["weights"]
