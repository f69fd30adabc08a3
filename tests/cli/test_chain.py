"""pretrain -> sft -> reward -> dpo from one config: what each stage starts from, and a run that is broken off."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import WORDS
from tests.cli.process import Result, Running, checkpoints, metrics, write_rows

STAGES = ["pretrain", "sft", "reward", "dpo"]
LORA = {"use_lora": True, "lora_config": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}}
COMMON = {"max_steps": 6, "learning_rate": 1e-3, "warmup_steps": 2, "logging_steps": 1, "save_steps": 2}
STEPS = COMMON["max_steps"]


@pytest.fixture(scope="session")
def chain(place: Path) -> Callable[..., Path]:
    """chain("name", model={...}, dpo={...}): a config of the four stages."""
    asked = [f"What is {WORDS[i % 10]} {i}?" for i in range(24)]
    right, wrong = ([f"It is {WORDS[(step * i) % 10]}." for i in range(24)] for step in (3, 7))
    pairs = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in zip(asked, right, wrong, strict=True)]
    write_rows(place / "preferences.jsonl", [row for row in pairs if row["chosen"] != row["rejected"]])
    write_rows(place / "text.jsonl", [{"text": " ".join(WORDS[i % 7 :] * 3)} for i in range(24)])
    files = {"pretrain": "text.jsonl", "sft": "pairs.jsonl"}

    def chain(task: str, *, model: dict[str, Any] | None = None, **options: dict[str, Any]) -> Path:
        config = {
            "task_name": task,
            "base_output_dir": "out",
            "use_tensorboard": False,
            "model": {"model_name_or_path": "model", **(model or {})},
            "datasets": {
                kind: {"dataset_path": files.get(kind, "preferences.jsonl"), "max_length": 64}
                for kind in STAGES
            },
            "stages": [{"stage_type": kind, **COMMON, **options.get(kind, {})} for kind in STAGES],
        }
        path = place / f"{task}.json"
        path.write_text(json.dumps(config))
        return path

    return chain


@pytest.fixture(scope="session")
def undisturbed(
    ntjax: Callable[..., Result], chain: Callable[..., Path], latest: Callable[[str], Path]
) -> Path:
    """The folder of a run of the chain with LoRA on 4-bit weights."""
    ended = ntjax("train", "--config", chain("chain", model={**LORA, "load_in_4bit": True}))
    assert ended.code == 0, ended.err
    return latest("chain")


def weights(run: Path) -> dict[str, bytes]:
    """Every stage's weights and adapter."""
    files = [f"{kind}_stage/{name}" for kind in STAGES for name in ("model", "adapter/adapter_model")]
    return {name: (run / f"{name}.safetensors").read_bytes() for name in files}


def test_every_stage_leaves_a_model_an_adapter_and_a_checkpoint(undisturbed: Path) -> None:
    for kind in STAGES:
        stage = undisturbed / f"{kind}_stage"
        assert checkpoints(stage) == [2, 4, 6]
        for name in ("config.json", "tokenizer.json", "model.safetensors", "adapter/adapter_config.json"):
            assert (stage / name).exists(), (kind, name)
        assert [record["step"] for record in metrics(stage)] == list(range(1, STEPS + 1))


def test_a_stage_starts_from_the_one_before_and_dpo_not_from_the_reward_model(undisturbed: Path) -> None:
    log = (undisturbed / "train.log").read_text()
    assert f"sft_stage starts from {undisturbed.parents[2]}/model with the adapter in " in log
    starts = [line.rpartition(" ")[2] for line in log.splitlines() if "_stage starts from " in line]
    adapters = [f"{undisturbed}/{kind}_stage/adapter" for kind in ("pretrain", "sft", "sft")]
    assert starts[1:] == adapters
    assert metrics(undisturbed / "dpo_stage")[0]["rewards/margins"] == 0  # the policy is its reference yet


# A stage of one is broken off in test_resume.py: what is special to a chain is seen in its later stages.
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow if kind == "reward" else pytest.mark.more) for kind in STAGES],
)
def test_killed_in_any_stage_it_goes_on_there_to_the_very_same_end(
    kind: str,
    begin: Callable[..., Running],
    ntjax: Callable[..., Result],
    chain: Callable[..., Path],
    latest: Callable[[str], Path],
    undisturbed: Path,
) -> None:
    task = f"chain_{kind}"
    command = "train", "--config", chain(task, model={**LORA, "load_in_4bit": True})
    first = begin(*command)
    first.until(lambda: (latest(task) / f"{kind}_stage" / "checkpoint-2").exists())
    assert first.send(signal.SIGKILL).code == -9
    ended = ntjax(*command, "--resume", "auto")
    assert ended.code == 0, ended.err
    before = STAGES[: STAGES.index(kind)]
    assert [f"{done}_stage is done already" in ended.out for done in STAGES] == [d in before for d in STAGES]
    run = latest(task)
    assert weights(run) == weights(undisturbed)
    for each in STAGES:
        assert metrics(run / f"{each}_stage") == metrics(undisturbed / f"{each}_stage")


def test_a_part_of_the_chain_is_run_by_name(
    ntjax: Callable[..., Result], chain: Callable[..., Path], latest: Callable[[str], Path]
) -> None:
    ended = ntjax("train", "--config", chain("part"), "--stages", "pretrain,dpo")
    assert ended.code == 0, ended.err
    assert sorted(path.name for path in latest("part").glob("*_stage")) == ["dpo_stage", "pretrain_stage"]
    assert f"dpo_stage starts from {latest('part')}/pretrain_stage" in ended.out
