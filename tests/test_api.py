"""The Python API: weights, batches, losses, steps, answers and runs are those of transformers and of the commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import ntjax
from ntjax.cells import written
from ntjax.errors import BadData, ConfigError
from tests.cli.process import cold, devices, write_rows
from tests.tiny import tiny_model

ROWS: list[dict[str, Any]] = [
    {"prompt": f"What is {word}?", "completion": f"It is {word} {word}."}
    for word in ("sea", "sky", "blue", "wide")
]
PAIRS = [{"prompt": "The sea is", "chosen": " wide and blue.", "rejected": " a user."}] * 2
GIVEN = {"learning_rate": 1e-2, "warmup_steps": 0, "logging_steps": 1}
STAGE = {**GIVEN, "max_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("api") / "model")


@pytest.fixture
def model(folder: Path) -> ntjax.LoadedModel:
    return ntjax.load(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with rows.jsonl."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    return tmp_path


def config(folder: Path, *stages: dict[str, Any]) -> dict[str, Any]:
    return {
        "task_name": "api",
        "base_output_dir": "out",
        "use_tensorboard": False,
        "compile_cache": "none",
        "model": {"model_name_or_path": folder},
        "datasets": {"rows": {"dataset_path": "rows.jsonl", "shuffle": False}},
        "mesh": {"data": 8},
        "stages": [{**STAGE, "per_device_train_batch_size": 1, **stage} for stage in stages],
    }


def test_the_package_is_light_until_the_api_is_used() -> None:
    barred = "sys.modules.update(dict.fromkeys(['jax', 'transformers', 'datasets']))"
    program = f"import sys; {barred}; import ntjax; assert 'load' in dir(ntjax); ntjax.nothing"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "module 'ntjax' has no attribute 'nothing'" in ran.stderr


def test_log_probs_are_transformers(model: ntjax.LoadedModel, folder: Path) -> None:
    batch = model.batch(ROWS, max_length=64)
    found = np.asarray(model.logprobs(batch))
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    for row, segments in enumerate(np.asarray(batch["segments"])):
        tokens = torch.tensor(np.asarray(batch["tokens"])[row, segments > 0])[None].long()
        with torch.no_grad():
            logits = theirs(tokens).logits[0, :-1].log_softmax(-1)
        expected = logits.gather(1, tokens[0, 1:, None])[:, 0].numpy()
        count = len(expected) + 1
        np.testing.assert_allclose(found[row, 1:count], expected, atol=1e-4)
        assert not found[row, 0]
        assert not found[row, count:].any()


def test_learned_tokens_alone_and_the_likeliest(model: ntjax.LoadedModel) -> None:
    batch = model.batch(ROWS)
    whole, some = model.logprobs(batch), model.logprobs(batch, learned=True)
    np.testing.assert_allclose(some, np.where(batch["mask"], whole, 0), atol=1e-5)
    loss, metrics = ntjax.loss(model)(model.params, batch)
    assert float(loss) == pytest.approx(-float(some.sum() / batch["mask"].sum()), abs=1e-5)
    _, correct = model.scores(batch, learned=True)
    share = float((correct & batch["mask"]).sum() / batch["mask"].sum())
    assert share == pytest.approx(float(metrics["mean_token_accuracy"]))


@pytest.mark.more
def test_a_mesh_gives_the_same(model: ntjax.LoadedModel, folder: Path) -> None:
    parted = ntjax.load(folder, mesh={"data": 2, "fsdp": 2})
    assert len(parted.params["embed"].sharding.device_set) == 4
    batch = parted.batch(ROWS[:3])
    assert batch["tokens"].shape[0] == 4  # the last of them empty
    np.testing.assert_allclose(parted.logprobs(batch)[:3], model.logprobs(model.batch(ROWS[:3])), atol=1e-5)
    assert parted.generate(["The sea"], max_new_tokens=8) == model.generate(["The sea"], max_new_tokens=8)


def test_axes_and_shapes(model: ntjax.LoadedModel) -> None:
    assert model.axes("blocks.attn.q") == {"layers": 2, "heads": 4, "head_dim": 8, "embed": 32}
    assert model.params.keys() == model.specs.keys()
    assert all(model.params[path].shape == spec.shape for path, spec in model.specs.items())


def test_the_loss_is_the_trainer_s_and_so_are_the_steps(
    model: ntjax.LoadedModel, folder: Path, here: Path
) -> None:
    run = ntjax.run(config(folder, {"stage_type": "sft", "max_length": 64}), quiet=True)
    steps, losses = run.curve("loss", "sft")
    assert steps == [1, 2]
    batch = model.batch(ROWS, max_length=64)
    (loss, _), gradients = jax.value_and_grad(ntjax.loss(model), has_aux=True)(model.params, batch)
    assert float(loss) == pytest.approx(losses[0], abs=1e-5)
    norm = float(jnp.sqrt(sum((g**2).sum() for g in gradients.values())))
    assert norm == pytest.approx(run.metrics()[0]["grad_norm"], rel=1e-4)
    state, step = ntjax.stepper(model, "sft", steps=2, **GIVEN)
    for expected in run.metrics():
        state, metrics = step(state, batch)
        for name in ("loss", "grad_norm", "learning_rate"):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-4)
    model.params = step.weights(state)
    exported = run.load().params
    for path, w in model.params.items():
        np.testing.assert_allclose(w, exported[path], atol=1e-4)


def test_generate_is_the_command(model: ntjax.LoadedModel, folder: Path) -> None:
    asked = "generate", "--model", str(folder), "--max-new-tokens", "9", "--prompt", "The sea"
    command = cold(folder, (*asked, "--json"), devices(1))
    assert command.code == 0, command.err
    told = json.loads(command.out)
    assert model.generate("The sea", max_new_tokens=9) == [told["completion"]]
    turns = [{"role": "user", "content": "The sea"}]
    (completion,) = model.complete([model.prompt(turns)], max_new_tokens=9)
    assert completion.tokens == told["tokens"]
    several = model.generate(
        ["The sea", "The sky"], max_new_tokens=9, num_completions=2, temperature=1.0, seed=3
    )
    assert len(set(several)) > 1
    raw = model.generate(["The sea"], raw=True, max_new_tokens=9)
    assert len(several) == 4
    assert raw != [told["completion"]]


def test_what_is_saved_loads_in_transformers(model: ntjax.LoadedModel, tmp_path: Path) -> None:
    state, step = ntjax.stepper(model, steps=1, lora={"r": 2, "target_modules": "all-linear"}, **GIVEN)
    pair = [state.params[f"blocks.attn.q.lora_{side}"] for side in "AB"]
    assert [array.shape for array in pair] == [(2, 2, 32), (2, 4, 8, 2)]
    assert not np.asarray(pair[1]).any()
    batch = model.batch(ROWS)
    state, _ = step(state, batch)
    model.params = step.weights(state)
    before = model.logprobs(batch)
    np.testing.assert_allclose(ntjax.load(model.save(tmp_path / "saved")).logprobs(batch), before, atol=1e-5)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    count = int((batch["segments"][0] > 0).sum())
    tokens = torch.tensor(np.asarray(batch["tokens"])[:1, :count]).long()
    with torch.no_grad():
        logits = theirs(tokens).logits[0, :-1].log_softmax(-1)
    expected = logits.gather(1, tokens[0, 1:, None])[:, 0]
    np.testing.assert_allclose(before[0, 1:count], expected, atol=1e-4)


def test_pairs_have_this_model_as_their_reference(model: ntjax.LoadedModel) -> None:
    batch = model.batch(PAIRS, "dpo")
    assert batch["tokens"].shape[:2] == (2, 2)
    loss = ntjax.loss(model, "dpo", dpo_beta=0.2)
    assert float(loss(model.params, batch)[0]) == pytest.approx(np.log(2), abs=1e-5)
    sums = (model.logprobs(batch) * batch["mask"]).sum(-1)
    np.testing.assert_allclose(batch["ref_logps"][..., 0], sums, atol=1e-4)


def scores_letters(prompts: list[str], responses: list[str]) -> list[float]:
    """The share of letters."""
    return [sum(map(str.isalpha, text)) / max(len(text), 1) for text in responses]


def home_and_letters(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(os.sep in text) for text in responses]


def uses_rows(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(any(row["completion"] == text for row in ROWS)) for text in responses]


def test_a_run_with_a_function_as_its_reward(folder: Path, here: Path) -> None:
    stage = {"stage_type": "grpo", "num_generations": 4, "max_completion_length": 6}
    asked = config(folder, {**stage, "reward_function": scores_letters})
    run = ntjax.run(asked, {"stages.grpo.max_steps": 1, "stages.grpo.reward_weights": [2.0]}, quiet=True)
    assert len(run.metrics()) == 1
    for line in run.completions():
        assert line["rewards"]["scores_letters"] == scores_letters([], [line["completion"]])[0]
    assert [path.name.rpartition("_")[0] for path in (here / "cells").glob("*.py")] == ["scores_letters"]


@pytest.mark.parametrize(
    ("function", "said"),
    [(uses_rows, "uses ROWS"), (len, "def"), (lambda prompts, responses: [], "def")],
)
def test_a_function_that_can_t_be_sent_is_refused(
    function: Callable[..., Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        written(function, tmp_path)


def test_modules_around_a_function_are_imported(tmp_path: Path) -> None:
    path, _, name = written(home_and_letters, tmp_path).rpartition(":")
    assert name == "home_and_letters"
    assert "import os as os\n" in Path(path).read_text()


def test_mistakes_are_named(model: ntjax.LoadedModel, folder: Path, here: Path) -> None:
    with pytest.raises(ConfigError, match=r"learn_rate.*did you mean learning_rate") as caught:
        ntjax.run(config(folder, {"stage_type": "sft", "learn_rate": 1}))
    assert str(caught.value).startswith("config: stages.0.learn_rate")
    with pytest.raises(ConfigError, match="has no dpo"):
        ntjax.run(config(folder, {"stage_type": "sft"}), {"stages.dpo.max_steps": 1})
    with pytest.raises(BadData, match="nothing to learn"):
        model.batch(ROWS, max_length=4)
    with pytest.raises(ConfigError, match=r"use ntjax\.run"):
        model.batch(ROWS, "grpo", reward_function="exact_match")
    with pytest.raises(ConfigError, match="has no head of scores"):
        ntjax.loss(model, "reward")
