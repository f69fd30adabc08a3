"""A run that is killed, stopped or changed, and resumed."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.process import Result, Running, checkpoints, metrics


def weights(stage: Path) -> bytes:
    return (stage / "model.safetensors").read_bytes()


def assert_same(stage: Path, other: Path) -> None:
    """Both stages ended with the same weights, bit for bit, and the same log."""
    assert weights(stage) == weights(other)
    assert metrics(stage) == metrics(other)


KILLS: dict[str, Callable[[Path], bool]] = {
    "log before the first checkpoint": lambda stage: len(metrics(stage)) >= 1,
    "checkpoint just committed": lambda stage: (stage / "checkpoint-8").exists(),
    "save under way": lambda stage: any(stage.glob("checkpoint-*.orbax-checkpoint-tmp*")),
    "last step": lambda stage: (stage / "checkpoint-24").exists(),
}


@pytest.mark.parametrize("moment", KILLS)
def test_killed_run_resumes_to_the_very_same_end(
    moment: str, begin: Callable[..., Running], ntjax: Callable[..., Result],
    config: Callable[..., Path], latest: Callable[[str], Path], whole: Path,
) -> None:
    task = moment.replace(" ", "_")
    command = "train", "--config", config(task)
    first = begin(*command)
    first.until(lambda: KILLS[moment](latest(task) / "sft_stage"))
    assert first.send(signal.SIGKILL).code == -9
    run = latest(task)
    print(moment, metrics(run / "sft_stage")[-1:], checkpoints(run / "sft_stage"))
    ended = ntjax(*command, "--resume", "auto")
    assert ended.code == 0, ended.err
    assert latest(task) == run
    assert_same(run / "sft_stage", whole / "sft_stage")
