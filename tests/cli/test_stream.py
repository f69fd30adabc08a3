"""A pretrain stage whose text is read while it is trained on."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import WORDS
from tests.cli.process import Result, Running, checkpoints, metrics, write_rows

STAGE = {"max_steps": 8, "learning_rate": 1e-3, "warmup_steps": 2, "logging_steps": 1, "save_steps": 3}


@pytest.fixture(scope="session")
def streamed(place: Path) -> Callable[..., Path]:
    """streamed("name", max_steps=...): a config of one stage on 30 documents, about two passes over them."""
    write_rows(place / "documents.jsonl", [{"body": " ".join(WORDS[i % 9 :] * 4)} for i in range(30)])

    def streamed(task: str, **options: Any) -> Path:
        config = {
            "task_name": task,
            "base_output_dir": "out",
            "use_tensorboard": False,
            "model": {"model_name_or_path": "model"},
            "datasets": {
                "text": {
                    "dataset_path": "documents.jsonl",
                    "text_field": "body",
                    "streaming": True,
                    "max_length": 64,
                    "eval_dataset_path": "documents.jsonl",
                    "eval_num_samples": 4,
                }
            },
            "stages": [{"stage_type": "pretrain", "do_eval": True, **STAGE, **options}],
        }
        path = place / f"{task}.json"
        path.write_text(json.dumps(config))
        return path

    return streamed


@pytest.fixture(scope="session")
def undisturbed(
    ntjax: Callable[..., Result], streamed: Callable[..., Path], latest: Callable[[str], Path]
) -> Path:
    """The stage folder of a run that nothing disturbed."""
    ended = ntjax("train", "--config", streamed("stream"))
    assert ended.code == 0, ended.err
    return latest("stream") / "pretrain_stage"


def test_rows_are_full_and_the_epoch_is_that_of_the_position(undisturbed: Path) -> None:
    trained = [record for record in metrics(undisturbed) if "loss" in record]
    assert [record["num_tokens"] for record in trained] == [4 * 64 * step for step in range(1, 9)]
    epochs = [record["epoch"] for record in trained]
    assert epochs == sorted(epochs)
    assert epochs[0] == 0
    assert epochs[-1] >= 1
    assert [record["step"] for record in metrics(undisturbed) if "eval_loss" in record] == [8]


def test_killed_between_checkpoints_it_comes_to_the_very_same_end(
    begin: Callable[..., Running],
    ntjax: Callable[..., Result],
    streamed: Callable[..., Path],
    latest: Callable[[str], Path],
    undisturbed: Path,
) -> None:
    command = "train", "--config", streamed("stream_killed")
    first = begin(*command)
    first.until(lambda: (latest("stream_killed") / "pretrain_stage" / "checkpoint-3").exists())
    assert first.send(signal.SIGKILL).code == -9
    stage = latest("stream_killed") / "pretrain_stage"
    saved = max(checkpoints(stage))
    ended = ntjax(*command, "--resume", "auto")
    assert ended.code == 0, ended.err
    assert f"resuming at step {saved} of 8" in ended.out
    assert (stage / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert metrics(stage) == metrics(undisturbed)


def test_a_missing_column_is_an_error_before_weights_are_read(
    ntjax: Callable[..., Result], streamed: Callable[..., Path]
) -> None:
    ended = ntjax("train", "--config", streamed("stream"), "datasets.text.text_field=words")
    assert ended.code == 66, ended.err
    assert "'body'" in ended.err


def test_inspect_shows_the_first_rows(ntjax: Callable[..., Result], streamed: Callable[..., Path]) -> None:
    shown = ntjax("inspect", "--config", streamed("stream"), "--rows", "2", "--json")
    assert shown.code == 0, shown.err
    first = json.loads(shown.out.splitlines()[0])
    assert first["mask"] == [False] + [True] * (len(first["tokens"]) - 1)
