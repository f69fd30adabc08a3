"""Twenty steps of a reward stage are TRL 1.16's, and transformers scores with what is left as we do."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ntjax.config import load_config
from ntjax.feed import encoded_rows
from ntjax.hf.files import read_config
from ntjax.hf.folder import load_params
from ntjax.models import build
from tests.peft_reference import WARNINGS
from tests.tiny import tiny_model
from tests.trl_reference import Row, Runs, compared, here, reward_by_trl, scoring, text, turn, write_config

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNINGS]
METRICS = ["min_reward", "mean_reward", "max_reward", "accuracy", "margin"]
SETTINGS: dict[str, Any] = {"learning_rate": 2e-3, "weight_decay": 0.1, "num_train_epochs": 4}
SETTINGS |= {"max_length": 64, "warmup_steps": 2}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
CASES: dict[str, Row] = {
    "messages": {"center_rewards_coefficient": 0.1},
    "text that ends with padding": {},
    "adapter": {},
}
CLOSE = 1e-4  # promised is 1e-3


def answers(rng: random.Random, talk: bool) -> Row:
    """Two answers to a question, and by how much the first is better."""
    asked, chosen, rejected = (text(rng, 1, 8) for _ in range(3))
    if not talk:
        return {"prompt": asked, "chosen": " sea " + chosen, "rejected": " " + rejected}
    better, worse = ([turn("user", asked), turn("assistant", each)] for each in ("sea " + chosen, rejected))
    return {"chosen": better, "rejected": worse, "margin": rng.choice([0.0, 0.5, 1.0])}


def base(out: Path, talk: bool) -> Path:
    """A folder of a tiny scoring model, written by transformers; without a chat template, padding is the end token."""
    folder = tiny_model(out / "language", "chatml" if talk else None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.pad_token_id == tokenizer.eos_token_id) == (not talk)
    torch.manual_seed(0)
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    return out / "base"


@pytest.fixture(scope="module")
def configs() -> dict[str, Path]:
    """Our config of each run that was made."""
    return {}


@pytest.fixture(scope="module", params=CASES)
def runs(
    request: pytest.FixtureRequest, configs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    """80 pairs, 16 a step, on eight devices; with an adapter, of PEFT's own first A and with its copy of the head."""
    rng, out, name = random.Random(1), tmp_path_factory.mktemp("reward"), request.param
    talk = "padding" not in name
    folder, rows = base(out, talk), [answers(rng, talk) for _ in range(80)]
    ours: Row = {**SETTINGS, **CASES[name], "per_device_train_batch_size": 1}
    theirs: Row = {**SETTINGS, **CASES[name], "per_device_train_batch_size": 8}
    adapter = None
    if name == "adapter":
        adapter, lora = out / "adapter", {"r": 4, "lora_alpha": 32, "target_modules": TARGETS}
        head = {"modules_to_save": ["score"], "task_type": "SEQ_CLS"}
        theirs |= {"peft_config": peft.LoraConfig(**lora, **head)}
        theirs |= {"change": lambda model: model.save_pretrained(adapter)}
        ours |= {"model_settings": {"use_lora": True, "lora_config": lora}}
    reference = reward_by_trl(folder, rows, out / "trl", **theirs)
    configs[name] = write_config(folder, rows, out / "ntjax", stage="reward", **ours)
    return compared(reference, here(configs[name], adapter))


def off(runs: Runs, name: str) -> float:
    """How far apart a metric is at most, relative to TRL's value where that is above 1."""
    return max(abs(ours - theirs) / max(1, abs(theirs)) for ours, theirs in runs.pairs(name))


@pytest.mark.parametrize("name", ["loss", *METRICS])
def test_metrics_are_trls(runs: Runs, name: str) -> None:
    assert off(runs, name) <= CLOSE
    assert len(runs.ours) == 20


def test_gradient_norms_are_trls(runs: Runs) -> None:
    assert runs.worst("grad_norm", relative=True) <= 1e-3


def test_it_learns(runs: Runs) -> None:
    assert runs.ours[-1]["loss"] < runs.ours[0]["loss"] - 0.05
    assert runs.ours[-1]["accuracy"] > 0.8


def padded(documents: list[np.ndarray], pad: int, left: bool) -> dict[str, torch.Tensor]:
    """Documents as a batch for transformers."""
    width = max(map(len, documents)) + 3
    ids, mask = np.full((len(documents), width), pad), np.zeros((len(documents), width), np.int64)
    for row, tokens in enumerate(documents):
        place = slice(-len(tokens), None) if left else slice(len(tokens))
        ids[row, place], mask[row, place] = tokens, 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def our_scores(pairs: Any, folder: Path, stage: Any, pad: int) -> np.ndarray:
    """The scores [16, 2] of the first pairs by the stage's own loss, which tells a pair's mean and margin."""
    model = build(read_config(folder), labels=1)
    params, loss = load_params(folder, model.specs, dtype="float32"), jax.jit(stage.loss(model))
    scores = []
    for index in range(16):
        told = loss(params, pairs.batch([[index]], 64, 1, pad))
        mean, margin = (float(told[name].total / told[name].weight) for name in ("mean_reward", "margin"))
        scores.append([mean + margin / 2, mean - margin / 2])
    return np.array(scores)


@pytest.mark.parametrize("left", [False, True])
def test_transformers_scores_with_the_folder_as_we_do(
    runs: Runs, left: bool, configs: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    config = load_config(configs[request.node.callspec.params["runs"]])
    tokenizer = AutoTokenizer.from_pretrained(runs.folder)
    pairs: Any = encoded_rows(config, config.stages[0], tokenizer, 400)[0]
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(
        runs.folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loaded[1].values()), loaded[1]
    documents = [document.tokens for index in range(16) for document in pairs.example(index).documents]
    ends = {int(tokens[-1]) for tokens in documents}
    assert (tokenizer.pad_token_id in ends) == (tokenizer.pad_token_id == tokenizer.eos_token_id)
    with torch.no_grad():
        theirs = loaded[0].eval()(**padded(documents, tokenizer.pad_token_id, left)).logits.numpy()
    ours = our_scores(pairs, runs.folder, config.stages[0], tokenizer.pad_token_id)
    assert np.abs(ours - theirs.reshape(16, 2)).max() <= 1e-4
    assert np.abs(ours).max() > 0.1


@pytest.mark.parametrize("runs", ["adapter"], indirect=True)
def test_peft_loads_the_adapter_with_its_head(runs: Runs, configs: dict[str, Path]) -> None:
    plain = scoring(configs["adapter"].parents[1] / "base")
    adapted = peft.PeftModel.from_pretrained(plain, runs.folder / "adapter").eval()
    assert adapted.peft_config["default"].task_type == "SEQ_CLS"
    ids = torch.from_numpy(np.random.default_rng(0).integers(5, 300, (4, 20)))
    with torch.no_grad():
        found, merged = adapted(input_ids=ids).logits, scoring(runs.folder).eval()(input_ids=ids).logits
        trained = runs.model(input_ids=ids).logits
    assert (found - merged).abs().max() <= 1e-4
    assert (found - trained).abs().max() <= 1e-3
