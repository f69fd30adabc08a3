"""Every file in configs/ is read without a complaint, and its first comment is the command that runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ntjax.config import load_config, refuse_unbuilt
from ntjax.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(path for path in CONFIGS.iterdir() if path.is_file())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_loads(path: Path) -> None:
    assert load_config(path).stages


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix != ".json"], ids=lambda path: path.name)
def test_its_first_comment_is_its_command(path: Path) -> None:
    assert path.read_text().startswith(f"# python -m ntjax.train --config configs/{path.name}")


def test_what_is_built_is_not_refused() -> None:
    config = load_config(CONFIGS / "sft_smollm2.toml")
    refuse_unbuilt(config)
    assert config.warnings == ()


def test_what_is_not_built_is_refused_in_one_sentence() -> None:
    with pytest.raises(ConfigError) as error:
        refuse_unbuilt(load_config(CONFIGS / "llm_training_example.toml"))
    assert "LoRA" in error.value.message
    assert "\n" not in error.value.message
