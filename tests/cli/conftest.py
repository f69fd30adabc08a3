"""A folder with a tiny model and data, and runs of commands in it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli import process
from tests.cli.process import Result, Running, write_rows
from tests.tiny import tiny_model

WORDS = ["sea", "sky", "blue", "wide", "Paris", "France", "capital", "one", "two", "three"]
STAGE = {
    "stage_type": "sft",
    "max_steps": 24,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "logging_steps": 3,
    "save_steps": 4,
}


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder: model/, pairs.jsonl (40 rows), and what the tests write."""
    folder = tmp_path_factory.mktemp("cli")
    # Read by jax when it is imported: set before the server of `process` starts, so for every command.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    tiny_model(folder / "model")
    rows = [
        {"prompt": f"What is {WORDS[i % 10]} {i}?", "completion": f"It is {WORDS[3 * i % 10]}."}
        for i in range(40)
    ]
    write_rows(folder / "pairs.jsonl", rows)
    return folder


@pytest.fixture(scope="session")
def begin(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Running]:
    """begin("train", "--config", ...): a command that is running, on one device unless `env` says otherwise."""
    prints, numbers = tmp_path_factory.mktemp("prints"), itertools.count()

    def begin(*args: object, env: dict[str, str] | None = None) -> Running:
        return process.start(
            place, tuple(map(str, args)), env or process.devices(1), prints / str(next(numbers))
        )

    return begin


@pytest.fixture(scope="session")
def ntjax(begin: Callable[..., Running]) -> Callable[..., Result]:
    """ntjax("train", "--config", ...): how the command ended."""

    def ntjax(*args: object, env: dict[str, str] | None = None) -> Result:
        return begin(*args, env=env).wait()

    return ntjax


@pytest.fixture(scope="session")
def config(place: Path) -> Callable[..., Path]:
    """config("name", {"bf16": True}, packing=True): a config file of that task name, a table a stage; what is named
    is set in all stages."""

    def config(
        task: str, *stages: dict[str, Any], dataset: dict[str, Any] | None = None, **same: Any
    ) -> Path:
        tables: list[tuple[str, dict[str, Any]]] = [("[model]", {"model_name_or_path": "model"})]
        tables += [("[datasets.sft]", {"dataset_path": "pairs.jsonl", "max_length": 64} | (dataset or {}))]
        tables += [("[[stages]]", STAGE | stage | same) for stage in stages or [{}]]
        lines = [f'task_name = "{task}"', 'base_output_dir = "out"', "use_tensorboard = false"]
        for title, table in tables:
            lines += ["", title, *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
        path = place / f"{task}.toml"
        path.write_text("\n".join(lines) + "\n")
        return path

    return config


@pytest.fixture(scope="session")
def latest(place: Path) -> Callable[[str], Path]:
    """latest("name"): the folder of the task's last run."""
    return lambda task: (place / "out" / task / "latest").resolve()


@pytest.fixture(scope="session")
def whole(ntjax: Callable[..., Result], config: Callable[..., Path], latest: Callable[[str], Path]) -> Path:
    """The folder of a run that nothing disturbed: 24 steps, logged every 3, saved every 4."""
    ended = ntjax("train", "--config", config("whole"))
    assert ended.code == 0, ended.err
    return latest("whole")


@pytest.fixture
def copy(whole: Path, place: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of `whole` that can be spoilt."""
    return Path(shutil.copytree(whole, place / "copies" / request.node.name))
