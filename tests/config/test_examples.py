"""Every file in configs/ is read without a complaint, and its first comment is the command that runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ntjax.config import load_config, refuse_unbuilt

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(path for path in CONFIGS.iterdir() if path.is_file())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_loads(path: Path) -> None:
    assert load_config(path).stages


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix != ".json"], ids=lambda path: path.name)
def test_its_first_comment_is_its_command(path: Path) -> None:
    assert path.read_text().startswith(f"# python -m ntjax.train --config configs/{path.name}")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_in_it_is_refused_and_its_data_are_there(path: Path) -> None:
    config = load_config(path)
    refuse_unbuilt(config)
    assert config.warnings == ()
    for dataset in config.datasets.values():
        assert (CONFIGS / str(dataset.dataset_path)).exists()
