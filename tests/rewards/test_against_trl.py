"""A file of rewards written for TRL gives here what it gives there."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import start_event_loop_in_daemon

from ntjax.lookup import load_file
from ntjax.rewards import Batch, Rewards

WRITTEN_FOR_TRL = """
import asyncio, functools, re
import torch

def correct(completions, answer, **kwargs):
    texts = [completion[0]["content"] for completion in completions]
    return [1.0 if text == a else 0.0 for text, a in zip(texts, answer)]

def brevity(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **kwargs):
    log_extra("asked", [prompt[-1]["content"] for prompt in prompts])
    log_metric("tokens", sum(len(ids) for ids in completion_ids) / len(completion_ids))
    return torch.tensor([-0.25 * len(ids) * (1 + trainer_state.global_step) for ids in completion_ids])

async def judged(completions, level, **kwargs):
    await asyncio.sleep(0.001)
    return [None if each == "hard" else 0.5 for each in level]

def scaled(weight, completion_ids, **kwargs):
    return tuple(weight * len(ids) for ids in completion_ids)

half = functools.partial(scaled, 0.5)

class Digits:
    def __call__(self, completions, **kwargs):
        return [len(re.findall("[0-9]", completion[0]["content"])) for completion in completions]

digits = Digits()
"""
NAMES = ["correct", "brevity", "judged", "half", "digits"]


def theirs(functions: list[Any], labels: list[str], batch: Batch) -> tuple[torch.Tensor, Any, Any]:
    """What TRL's trainer computes: the rewards, and what was logged."""
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", is_main_process=True),
        reward_funcs=functions,
        reward_processing_classes=[None] * len(functions),
        reward_func_names=labels,
        state=SimpleNamespace(**batch.state),
        environments=None,
        args=SimpleNamespace(report_to=[]),
        _pending_extra_logs=defaultdict(list),
        _pending_metrics=defaultdict(list),
    )
    trainer._log_completion_extra = lambda *given: GRPOTrainer._log_completion_extra(trainer, *given)
    trainer._log_metric = lambda *given: GRPOTrainer._log_metric(trainer, *given)
    thread, trainer.async_loop, ready = start_event_loop_in_daemon(name="test")
    ready.wait()
    rows = [dict(zip(batch.columns, row, strict=True)) for row in zip(*batch.columns.values(), strict=True)]
    found = GRPOTrainer._calculate_rewards(
        trainer, rows, batch.prompts, batch.completions, batch.completion_ids
    )
    trainer.async_loop.call_soon_threadsafe(trainer.async_loop.stop)
    thread.join()
    trainer.async_loop.close()
    return found, dict(trainer._pending_extra_logs), dict(trainer._pending_metrics)


def test_rewards_and_logs_are_trl_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "written_for_trl.py"
    file.write_text(WRITTEN_FOR_TRL)
    drawn = ["12", "I say 7", "", "12"]
    batch = Batch(
        prompts=[[{"role": "user", "content": f"question {n}"}] for n in (0, 0, 1, 1)],
        completions=[[{"role": "assistant", "content": text}] for text in drawn],
        completion_ids=[[1, 2], [3, 4, 5], [], [1, 2]],
        columns={"answer": ["12", "12", "7", "7"], "level": ["easy", "easy", "hard", "hard"]},
        state={"global_step": 3, "max_steps": 8, "epoch": 0.5, "num_train_epochs": 1},
    )
    rewards = Rewards([f"written_for_trl.py:{name}" for name in NAMES], tmp_path)
    try:
        ours = rewards.submit(batch).result()
    finally:
        rewards.close()
    assert rewards.labels == ["correct", "brevity", "judged", "scaled", "Digits"]
    module = load_file(file)
    monkeypatch.setattr("trl.trainer.grpo_trainer.gather", lambda tensor: tensor)
    wanted, extra, metrics = theirs([getattr(module, name) for name in NAMES], rewards.labels, batch)
    assert np.isnan(wanted.numpy()).any()
    np.testing.assert_array_equal(ours.scores, wanted.numpy())
    assert (ours.extra, ours.metrics) == (extra, metrics)
