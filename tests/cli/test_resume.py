"""A run that is killed, stopped or changed, and resumed."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from ntjax.config import load_config
from tests.cli.process import Result, Running, checkpoints, metrics


def unfinished(run: Path, step: int) -> Path:
    """The run as it was after `step`'s checkpoint, except for its log."""
    for later in checkpoints(run / "sft_stage"):
        if later > step:
            shutil.rmtree(run / "sft_stage" / f"checkpoint-{later}")
    for made_last in ("stage.json", "model.safetensors"):
        (run / "sft_stage" / made_last).unlink()
    return run


def assert_same_end(run: Path, whole: Path) -> None:
    """Both ended with the same weights, bit for bit, and the same log."""
    stage, other = run / "sft_stage", whole / "sft_stage"
    assert (stage / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert metrics(stage) == metrics(other)
    assert (stage / "stage.json").exists()


def saving(stage: Path) -> bool:
    return (stage / "checkpoint-4").exists() and any(stage.glob("checkpoint-*.orbax-checkpoint-tmp*"))


KILLS: dict[str, tuple[Callable[[Path], bool], range]] = {  # moment -> its sign, and where the run may go on
    "logged, nothing saved yet": (lambda stage: len(metrics(stage)) >= 1, range(0, 5)),
    "checkpoint committed": (lambda stage: (stage / "checkpoint-8").exists(), range(8, 24)),
    "save under way": (saving, range(4, 24)),
    "last step saved": (lambda stage: (stage / "checkpoint-24").exists(), range(24, 25)),
}


@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_run_comes_to_the_very_same_end(
    moment: str,
    begin: Callable[..., Running],
    ntjax: Callable[..., Result],
    config: Callable[..., Path],
    latest: Callable[[str], Path],
    whole: Path,
) -> None:
    seen, goes_on = KILLS[moment]
    task = f"kill{list(KILLS).index(moment)}"
    command = "train", "--config", config(task)
    first = begin(*command)
    first.until(lambda: seen(latest(task) / "sft_stage"))
    assert first.send(signal.SIGKILL).code == -9
    run, saved = latest(task), max(checkpoints(latest(task) / "sft_stage"), default=0)
    assert saved in goes_on
    ended = ntjax(*command, "--resume", "auto")
    assert ended.code == 0, ended.err
    assert latest(task) == run
    assert (f"resuming at step {saved} of 24" in ended.out) == (saved > 0)
    assert_same_end(run, whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stopped_run_saves_its_step_and_comes_to_the_very_same_end(
    number: signal.Signals,
    code: int,
    begin: Callable[..., Running],
    ntjax: Callable[..., Result],
    config: Callable[..., Path],
    latest: Callable[[str], Path],
    whole: Path,
) -> None:
    task = number.name.lower()
    command = "train", "--config", config(task, {"save_steps": 500})
    first = begin(*command)
    first.until(lambda: metrics(latest(task) / "sft_stage"))
    stopped = first.send(number)
    assert stopped.code == code, stopped.err
    (saved,) = checkpoints(latest(task) / "sft_stage")
    assert f"stopped by {number.name} after step {saved} of 24; step {saved} is saved" in stopped.err
    assert "Traceback" not in stopped.err
    ended = ntjax(*command, "--resume", stopped.err.rpartition("--resume ")[2].strip())
    assert ended.code == 0, ended.err
    assert f"resuming at step {saved} of 24" in ended.out
    assert_same_end(latest(task), whole)


def test_a_checkpoint_is_gone_on_from_and_later_ones_are_replaced(
    ntjax: Callable[..., Result], place: Path, copy: Path, whole: Path
) -> None:
    old = copy / "sft_stage" / "checkpoint-12" / "old"
    old.touch()
    resumed = copy / "sft_stage" / "checkpoint-8"
    ended = ntjax("train", "--config", place / "whole.toml", "--resume", resumed)
    assert ended.code == 0, ended.err
    assert "resuming at step 8 of 24" in ended.out
    assert not old.exists()
    assert checkpoints(copy / "sft_stage") == [4, 8, 12, 16, 20, 24]
    assert_same_end(copy, whole)


def test_a_stage_folder_is_gone_on_from_its_newest_checkpoint(
    ntjax: Callable[..., Result], place: Path, copy: Path, whole: Path
) -> None:
    ended = ntjax("train", "--config", place / "whole.toml", "--resume", unfinished(copy, 16) / "sft_stage")
    assert ended.code == 0, ended.err
    assert "resuming at step 16 of 24" in ended.out
    assert_same_end(copy, whole)


def test_a_finished_run_is_left_as_it_is(ntjax: Callable[..., Result], place: Path, copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (copy / "sft_stage").rglob("*")}
    ended = ntjax("train", "--config", place / "whole.toml", "--resume", copy)
    assert ended.code == 0, ended.err
    assert "sft_stage is done already" in ended.out
    assert {path: path.stat().st_mtime_ns for path in (copy / "sft_stage").rglob("*")} == before


def test_changed_settings_are_listed_and_can_be_allowed(
    ntjax: Callable[..., Result], place: Path, copy: Path, whole: Path
) -> None:
    command = "train", "--config", place / "whole.toml", "--resume", unfinished(copy, 16)
    changed = "stages.0.learning_rate=2e-3", "datasets.sft.num_samples=36"
    refused = ntjax(*command, *changed)
    assert refused.code == 78, refused.err
    assert "learning_rate: 0.001 -> 0.002" in refused.err
    assert "data: " in refused.err
    assert "--allow-changed" in refused.err
    assert metrics(copy / "sft_stage") == metrics(whole / "sft_stage")
    assert load_config(copy / "config.toml").stages[0].learning_rate == 1e-3
    allowed = ntjax(*command, *changed, "--allow-changed")
    assert allowed.code == 0, allowed.err
    assert "resuming at step 16 of 24" in allowed.out
    assert load_config(copy / "config.toml").stages[0].learning_rate == 2e-3
    before, after = metrics(copy / "sft_stage"), metrics(whole / "sft_stage")
    assert [record["step"] for record in before] == [record["step"] for record in after]
    assert before[:5] == after[:5]  # up to step 15
    assert before[6]["learning_rate"] == pytest.approx(2 * after[6]["learning_rate"])


def test_settings_that_change_nothing_computed_may_change(
    ntjax: Callable[..., Result], place: Path, copy: Path, whole: Path
) -> None:
    run = unfinished(copy, 20)
    ended = ntjax(
        *("train", "--config", place / "whole.toml", "--resume", run),
        *("stages.0.save_steps=2", "stages.0.save_total_limit=2"),
    )
    assert ended.code == 0, ended.err
    assert checkpoints(run / "sft_stage") == [22, 24]
    assert_same_end(run, whole)


@pytest.mark.parametrize("named", ["own_folder", "own_folder/checkpoint-16"])
def test_a_stage_with_a_folder_of_its_own_goes_on_there(
    named: str, ntjax: Callable[..., Result], config: Callable[..., Path], place: Path, whole: Path
) -> None:
    stage, command = place / "own_folder", ("train", "--config", config("own", output_dir="own_folder"))
    if not stage.exists():
        assert ntjax(*command).code == 0
    for step in (20, 24):
        shutil.rmtree(stage / f"checkpoint-{step}")
    for made_last in ("stage.json", "model.safetensors"):
        (stage / made_last).unlink()
    ended = ntjax(*command, "--resume", named)
    assert ended.code == 0, ended.err
    assert "resuming at step 16 of 24" in ended.out
    assert (stage / "model.safetensors").read_bytes() == (
        whole / "sft_stage" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("nowhere", "there is no folder nowhere to resume from"),
        ("out/whole/latest/sft_stage/checkpoint-5", "no folder"),
        ("out", "is not a run"),
        ("other_stage/checkpoint-4", "no stage of this config is called 'other_stage'"),
    ],
)
def test_what_is_not_there_cannot_be_resumed(
    folder: str, said: str, ntjax: Callable[..., Result], place: Path, whole: Path
) -> None:
    (place / "other_stage" / "checkpoint-4").mkdir(parents=True, exist_ok=True)
    ended = ntjax("train", "--config", place / "whole.toml", "--resume", folder)
    assert ended.code == 66, ended.err
    assert said in ended.err


def test_auto_starts_a_task_that_never_ran_and_a_second_run_ends_as_the_first(
    ntjax: Callable[..., Result], config: Callable[..., Path], latest: Callable[[str], Path], whole: Path
) -> None:
    ended = ntjax("train", "--config", config("fresh"), "--resume", "auto")
    assert ended.code == 0, ended.err
    assert_same_end(latest("fresh"), whole)
