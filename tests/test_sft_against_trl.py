"""Twenty steps of SFT are TRL 1.16's, and what is exported is what was trained."""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ntjax.config import load_config
from ntjax.data.loader import Plan
from ntjax.hf.files import read_config
from ntjax.hf.folder import load_params
from ntjax.models import build
from ntjax.trainer import encoded_rows
from tests.tiny import tiny_model, tiny_tokenizer
from tests.torch_reference import logits, tokens
from tests.trl_reference import Row, Runs, by_command, by_trl, compared, here, write_config

pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning",  # TRL's own default sets it
)
WORDS = "the sea is wide and the sky is blue how are you today I am well thank you Paris".split()
SETTINGS: dict[str, Any] = {"learning_rate": 2e-3, "weight_decay": 0.1, "max_grad_norm": 1.25}
PIRATES = Path(__file__).parents[1] / "configs" / "data" / "pirate.jsonl"


def text(rng: random.Random, low: int, high: int) -> str:
    """Some words."""
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def turn(role: str, content: str) -> Row:
    return {"role": role, "content": content}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def conversations(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """75 conversations, some truncated: 10 steps an epoch, of which the last has one microbatch, of 3 rows."""
    rng, out = random.Random(0), tmp_path_factory.mktemp("conversations")
    rows = [
        {"prompt": [turn("user", text(rng, 1, 12))], "completion": [turn("assistant", text(rng, 1, 40))]}
        for _ in range(75)
    ]
    settings = {**SETTINGS, "per_device_train_batch_size": 4, "num_train_epochs": 2, "max_length": 70}
    reference = by_trl(model, rows, out / "trl", **settings)
    assert {len(reference.slots), max(reference.slots)[0]} == {75, 70}
    return compared(reference, by_command(write_config(model, rows, out / "ntjax", **settings)))


@pytest.fixture(scope="module")
def strings(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """77 prompts and completions, of which one has nothing to learn, on eight devices: 5 steps an epoch."""
    rng, out = random.Random(1), tmp_path_factory.mktemp("strings")
    rows = [{"prompt": text(rng, 1, 12), "completion": text(rng, 1, 30)} for _ in range(77)]
    rows[10]["prompt"] = " ".join(WORDS * 8)
    settings = {**SETTINGS, "num_train_epochs": 4, "max_length": 64}
    reference = by_trl(model, rows, out / "trl", per_device_train_batch_size=8, **settings)
    assert len(reference.slots) == 76
    config = write_config(model, rows, out / "ntjax", per_device_train_batch_size=1, **settings)
    return compared(reference, here(config))


@pytest.fixture(scope="module")
def packs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Rows in falling order of length, which best fit and first fit put in the same packs, on eight devices."""
    rng, out = random.Random(2), tmp_path_factory.mktemp("packs")
    rows = [{"prompt": text(rng, 1, 6), "completion": text(rng, 1, 12)} for _ in range(250)]
    tokenizer = tiny_tokenizer()
    rows.sort(key=lambda row: len(tokenizer(row["prompt"] + row["completion"])["input_ids"]), reverse=True)
    settings = {**SETTINGS, "num_train_epochs": 4, "max_length": 64, "packing": True}
    reference = by_trl(model, rows, out / "trl", per_device_train_batch_size=8, **settings)
    path = write_config(model, rows, out / "ntjax", per_device_train_batch_size=1, **settings)
    config = load_config(path)
    lengths = encoded_rows(config, config.stages[0], tokenizer, len(tokenizer))[0].lengths
    ours = Plan(lengths, 64, 8, shuffle=False, packing=True).packs
    assert [[lengths[row] for row in pack] for pack in ours] == reference.slots
    return compared(reference, here(path))


@pytest.fixture(params=["conversations", "strings", "packs"])
def runs(request: pytest.FixtureRequest) -> Runs:
    return request.getfixturevalue(request.param)


def test_losses_are_trls(runs: Runs) -> None:
    assert runs.worst("loss", relative=True) <= 1e-3
    assert len(runs.ours) == 20
    assert runs.ours[-1]["loss"] < runs.ours[0]["loss"] - 0.5


def test_gradient_norms_are_trls(runs: Runs) -> None:
    """Before clipping, which some steps are subject to and some are not."""
    assert runs.worst("grad_norm", relative=True) <= 1e-2
    norms = [record["grad_norm"] for record in runs.ours]
    assert min(norms) < SETTINGS["max_grad_norm"] < max(norms)


def test_learning_rates_are_trls(runs: Runs) -> None:
    assert runs.worst("learning_rate") <= 1e-6 * SETTINGS["learning_rate"]
    assert runs.ours[0]["learning_rate"] == 0


@pytest.mark.parametrize("name", ["mean_token_accuracy", "entropy"])
def test_metrics_are_trls(runs: Runs, name: str) -> None:
    assert runs.worst(name) <= 1e-3


@pytest.mark.parametrize("name", ["step", "epoch", "num_tokens"])
def test_counts_are_trls(runs: Runs, name: str) -> None:
    assert all(a == pytest.approx(b, rel=1e-12) for a, b in runs.pairs(name))
