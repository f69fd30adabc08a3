"""Which model a stage goes back to, which run is the task's latest, and which rows it is evaluated on."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from ntjax.config import Config, load_config
from ntjax.pipeline import goes_back_to
from ntjax.runs import begun_since, find_resume, make_latest, new_run
from ntjax.stages.rows import stage_rows


def loaded(folder: Path, *stages: dict[str, Any], **data: Any) -> Config:
    config = {
        "task_name": "task",
        "base_output_dir": str(folder / "out"),
        "model": {"model_name_or_path": "first"},
        "datasets": {"all": {"dataset_path": str(folder / "rows.jsonl"), **data}},
        "stages": list(stages) or [{"stage_type": "sft"}],
    }
    (folder / "run.json").write_text(json.dumps(config))
    return load_config(folder / "run.json")


SCORES = {"stage_type": "reward", "load_from": "elsewhere"}
CHAINS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "one": ([{"stage_type": "sft"}], "first"),
    "its own": ([{"stage_type": "sft", "load_from": "org/other"}], "org/other"),
    "the first's": ([{"stage_type": "sft", "load_from": "other"}, {"stage_type": "dpo"}], "other"),
    "by name": (
        [{"stage_type": "sft", "load_from": "other"}, {"stage_type": "dpo", "load_from": "sft"}],
        "other",
    ),
    "a reward model is no start": ([SCORES, {"stage_type": "dpo"}], "first"),
    "but for another": ([SCORES, {"stage_type": "reward", "stage_name": "again"}], "elsewhere"),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_stage_goes_back_to_the_model_that_the_first_of_its_chain_was_given(
    name: str, tmp_path: Path
) -> None:
    stages, model = CHAINS[name]
    config = loaded(tmp_path, *stages)
    assert goes_back_to(config, config.stages[-1]) == model


def test_a_run_that_is_gone_on_with_is_the_latest(tmp_path: Path) -> None:
    config = loaded(tmp_path)
    old, new = new_run(config), new_run(config)
    latest = new.parent / "latest"
    assert latest.resolve() == new.resolve()
    make_latest(config, old.resolve())
    assert latest.resolve() == old.resolve()
    resumed = find_resume(config, "auto")
    assert resumed is not None
    assert resumed.run == old.resolve()
    (tmp_path / "copy").mkdir()
    make_latest(config, tmp_path / "copy")  # no run of the task
    assert latest.resolve() == old.resolve()
    assert not (tmp_path / "latest").exists()


def test_what_was_begun_since_is_told_from_earlier_runs(tmp_path: Path) -> None:
    """By which `ntjax launch` goes on with its own run alone."""
    config, now = loaded(tmp_path), time.time()
    assert not begun_since(config, now)
    latest = new_run(config).parent / "latest"
    assert begun_since(config, now)
    os.utime(latest, (now - 600, now - 600), follow_symlinks=False)
    assert not begun_since(config, now)


def test_a_split_is_of_the_rows_that_are_trained_on(tmp_path: Path) -> None:
    for name, count in (("rows", 10), ("held", 4)):
        lines = (json.dumps({"prompt": f"{name} {n}", "completion": "so"}) for n in range(count))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    config = loaded(tmp_path, dataset_split="train[:50%]", eval_dataset_path=str(tmp_path / "held.jsonl"))
    rows, evaluation = stage_rows(config, config.datasets["all"], 0)
    assert rows is not None
    assert evaluation is not None
    assert (len(rows), len(evaluation)) == (5, 4)
