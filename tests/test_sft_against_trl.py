"""Twenty steps of SFT are TRL 1.16's, and what is exported is what was trained."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from ntjax.config import load_config
from ntjax.data.pack import first_fit
from ntjax.hf.files import read_config
from ntjax.hf.folder import load_params
from ntjax.models import build
from ntjax.prepare import Job, prepare
from ntjax.result import export
from ntjax.trainer import start
from tests.tiny import tiny_model, tiny_tokenizer
from tests.torch_reference import logits, tokens
from tests.trl_reference import (
    WORDS,
    Row,
    Runs,
    by_command,
    by_trl,
    compared,
    here,
    smollm2_folder,
    text,
    turn,
    write_config,
)

SETTINGS: dict[str, Any] = {"learning_rate": 2e-3, "weight_decay": 0.1, "max_grad_norm": 1.25}
# Promised are 1e-3 for losses and 1e-2 for gradient norms, but over twenty steps of a tiny model one without
# weight decay is 5e-5 off, one without clipping 8e-5, one with beta2 = 0.99 4e-4. Equal runs differ by 2e-6.
CLOSE = 1e-5
PIRATES = Path(__file__).parents[1] / "configs" / "data" / "pirate.jsonl"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def conversations(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """75 conversations, some truncated: 10 steps an epoch, the last of one microbatch of 3 rows."""
    rng, out = random.Random(4), tmp_path_factory.mktemp("conversations")
    rows = [
        {"prompt": [turn("user", text(rng, 1, 12))], "completion": [turn("assistant", text(rng, 1, 40))]}
        for _ in range(75)
    ]
    settings: dict[str, Any] = {
        **SETTINGS,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "max_length": 70,
    }
    reference = by_trl(model, rows, out / "trl", **settings)
    assert {len(reference.slots), max(reference.slots)[0]} == {75, 70}
    return compared(reference, by_command(write_config(model, rows, out / "ntjax", **settings)))


@pytest.fixture(scope="module")
def strings(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """77 prompts and completions, of which one has nothing to learn, on eight devices: 5 steps an epoch."""
    rng, out = random.Random(0), tmp_path_factory.mktemp("strings")
    rows = [{"prompt": text(rng, 1, 12), "completion": text(rng, 1, 30)} for _ in range(77)]
    rows[10]["prompt"] = " ".join(WORDS * 8)
    settings: dict[str, Any] = {**SETTINGS, "num_train_epochs": 4, "max_length": 64}
    reference = by_trl(model, rows, out / "trl", per_device_train_batch_size=8, **settings)
    assert len(reference.slots) == 76
    config = write_config(model, rows, out / "ntjax", per_device_train_batch_size=1, **settings)
    return compared(reference, here(config))


@pytest.fixture(scope="module")
def packs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Rows from long to short, which best fit and first fit put in the same packs, on eight devices."""
    rng, out = random.Random(4), tmp_path_factory.mktemp("packs")
    rows = [{"prompt": text(rng, 1, 6), "completion": text(rng, 1, 12)} for _ in range(250)]
    tokenizer = tiny_tokenizer()
    rows.sort(key=lambda row: len(tokenizer(row["prompt"] + row["completion"])["input_ids"]), reverse=True)
    settings: dict[str, Any] = {**SETTINGS, "num_train_epochs": 5, "max_length": 64, "packing": True}
    reference = by_trl(model, rows, out / "trl", per_device_train_batch_size=8, **settings)
    lengths = sorted((length for slot in reference.slots for length in slot), reverse=True)
    assert [[lengths[row] for row in pack] for pack in first_fit(lengths, 64)] == reference.slots
    config = write_config(model, rows, out / "ntjax", per_device_train_batch_size=1, **settings)
    return compared(reference, here(config))


@pytest.fixture(params=["conversations", "strings", "packs"])
def runs(request: pytest.FixtureRequest) -> Runs:
    return request.getfixturevalue(request.param)


def test_losses_are_trls(runs: Runs) -> None:
    assert runs.worst("loss", relative=True) <= CLOSE
    assert len(runs.ours) == 20
    assert runs.ours[-1]["loss"] < runs.ours[0]["loss"] - 0.5


def test_gradient_norms_are_trls(runs: Runs) -> None:
    """Before clipping, which some steps are subject to and some are not."""
    assert runs.worst("grad_norm", relative=True) <= CLOSE
    norms = [record["grad_norm"] for record in runs.ours]
    assert min(norms) < SETTINGS["max_grad_norm"] < max(norms)


def test_learning_rates_are_trls(runs: Runs) -> None:
    assert runs.worst("learning_rate") <= 1e-6 * SETTINGS["learning_rate"]
    assert runs.ours[0]["learning_rate"] == 0


@pytest.mark.parametrize("name", ["mean_token_accuracy", "entropy"])
def test_metrics_are_trls(runs: Runs, name: str) -> None:
    """The rows are such that none of the labels is a near tie (1e-4) for the best logit."""
    assert runs.worst(name) <= 1e-3


@pytest.mark.parametrize("name", ["step", "epoch", "num_tokens"])
def test_counts_are_trls(runs: Runs, name: str) -> None:
    assert all(a == pytest.approx(b, rel=1e-12) for a, b in runs.pairs(name))


def reloaded(folder: Path, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    """The model of a folder, which has every tensor that transformers looks for and no other."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    model, found = loaded
    assert not any(found.values()), found
    return model.eval()


def their_logits(model: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float().numpy()


def our_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    model = build(read_config(folder))
    params = load_params(folder, model.specs, dtype="float32")
    return np.asarray(logits(model, params, ids, tokens(np.ones_like(ids))))


IDS = np.random.default_rng(0).integers(5, 300, (2, 40), dtype=np.int32)


def test_the_exported_model_is_the_one_that_trl_trains(runs: Runs) -> None:
    exported = their_logits(reloaded(runs.folder), IDS)
    assert np.abs(exported - their_logits(runs.model, IDS)).max() <= 1e-3


def test_the_exported_model_has_our_logits(conversations: Runs) -> None:
    exported = their_logits(reloaded(conversations.folder), IDS)
    assert np.abs(exported - our_logits(conversations.folder, IDS)).max() <= 1e-4


def test_the_exported_tokenizer_is_the_one_that_trained(conversations: Runs) -> None:
    tokenizer, source = AutoTokenizer.from_pretrained(conversations.folder), tiny_tokenizer()
    for some in ["The sea is wide.", "<|im_start|>user\n\n 日本 🙂<|im_end|>\n", " a\tb\r\n"]:
        assert tokenizer(some)["input_ids"] == source(some)["input_ids"]
    chat = [turn("user", "hi"), turn("assistant", "yo")]
    assert tokenizer.apply_chat_template(chat) == source.apply_chat_template(chat)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)


def test_the_exported_model_stops_where_it_was_trained_to(conversations: Runs) -> None:
    generation = GenerationConfig.from_pretrained(conversations.folder)
    assert (generation.eos_token_id, generation.pad_token_id) == (2, 0)


def test_bfloat16_is_exported_as_bfloat16(model: Path, tmp_path: Path) -> None:
    """The weights of a stage, held in float32, are rounded once."""
    rows = [{"prompt": "The sea is", "completion": " wide."}]
    config = load_config(write_config(model, rows, tmp_path, dtype="bfloat16"))
    setup = prepare(Job(config, config.stages[0], model, tmp_path / "stage"))
    setup.job.folder.mkdir()
    policy = start(setup)
    export(setup, policy, policy.trainable)
    exported = reloaded(setup.job.folder, dtype="auto")
    tensors, rounded = exported.state_dict(), reloaded(model, dtype=torch.bfloat16).state_dict()
    assert exported.dtype == torch.bfloat16
    assert all(torch.equal(tensors[name], rounded[name]) for name in rounded)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smollm2_folder(tmp_path_factory.mktemp("smollm2") / "model")


def pirate_rows(count: int) -> tuple[list[Row], list[Row]]:
    """Questions with their answers: as messages, and as the prompts and completions that TRL trains alike."""
    rows = [json.loads(line) for line in PIRATES.read_text().splitlines()[:count]]
    return rows, [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in rows]


@pytest.mark.slow
def test_smollm2_is_trained_as_by_trl(smollm2: Path, tmp_path: Path) -> None:
    """37 rows, 10 steps an epoch, the last of a single row: losses within 0.1%, gradient norms within 1%."""
    rows, for_trl = pirate_rows(37)
    settings: dict[str, Any] = {"learning_rate": 2e-5, "weight_decay": 0.01, "num_train_epochs": 2}
    settings |= {"per_device_train_batch_size": 2, "max_length": 64, "gradient_checkpointing": False}
    reference = by_trl(smollm2, for_trl, tmp_path / "trl", threads=2, **settings)
    folder = by_command(write_config(smollm2, rows, tmp_path / "ntjax", **settings))
    runs = compared(reference, folder)
    loss, norm = (runs.worst(name, relative=True) for name in ("loss", "grad_norm"))
    found = f"furthest off: loss {loss:.1e}, gradient norm {norm:.1e}; (ours, TRL's): {runs.pairs('loss')}"
    print(found)
    assert loss <= 1e-3, found
    assert norm <= 1e-2, found
    assert len(runs.ours) == 20, found
    assert runs.ours[-1]["loss"] < runs.ours[0]["loss"] - 1, found
    assert all(runs.worst(name) == 0 for name in ("step", "num_tokens"))
    assert runs.worst("entropy") <= 1e-3
    assert np.abs(their_logits(reloaded(folder), IDS) - our_logits(folder, IDS)).max() <= 2e-3


PROMPTS = [
    "Hi",
    "The capital of France is Paris, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) +",
    "Once upon a time there was a small village by the sea. " * 20,
]


@pytest.mark.slow
def test_smollm2_has_the_logits_of_transformers(smollm2: Path) -> None:
    tokenizer, theirs = AutoTokenizer.from_pretrained(smollm2), reloaded(smollm2)
    ours = build(read_config(smollm2))
    params = load_params(smollm2, ours.specs, dtype="float32")
    for prompt in PROMPTS:
        ids = np.array([tokenizer(prompt)["input_ids"]], np.int32)
        found, expected = logits(ours, params, ids, tokens(np.ones_like(ids))), their_logits(theirs, ids)
        worst = np.abs(np.asarray(found) - expected).max()
        print(f"{ids.shape[1]} tokens: {worst:.1e}")
        assert worst <= 2e-3
        assert (np.asarray(found).argmax(-1) == expected.argmax(-1)).all()
