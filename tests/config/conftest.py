from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ntjax.config import Config, load_config

Load = Callable[..., Config]

SMALLEST = """\
[model]
model_name_or_path = "tiny"
[datasets.sft]
dataset_path = "rows.jsonl"
[[stages]]
stage_type = "sft"
"""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Writes a text to run<suffix> in an empty working folder and loads it."""
    monkeypatch.chdir(tmp_path)

    def write_and_load(text: str, *overrides: str, suffix: str = ".toml") -> Config:
        Path(f"run{suffix}").write_text(text, encoding="utf-8")
        return load_config(f"run{suffix}", overrides)

    return write_and_load


@pytest.fixture
def load_stage(load: Load) -> Load:
    """Loads the smallest config with these lines added to its one stage, the first of them on line 7."""
    return lambda lines, *overrides: load(SMALLEST + lines, *overrides)


@pytest.fixture
def load_tables(load: Load) -> Load:
    """Loads the smallest config as JSON, with these top-level tables replaced or added."""
    smallest = {
        "model": {"model_name_or_path": "tiny"},
        "datasets": {"sft": {"dataset_path": "rows.jsonl"}},
        "stages": [{"stage_type": "sft"}],
    }
    return lambda *overrides, **tables: load(
        json.dumps(smallest | tables, indent=1), *overrides, suffix=".json"
    )
