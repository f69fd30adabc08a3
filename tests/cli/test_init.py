"""init: every template is a config that loads, as it is and with its comments taken off, and that trains."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ntjax.config import load_config, refuse_unbuilt
from ntjax.init import KINDS, main
from tests.cases import some
from tests.cli.process import Result, metrics

Ntjax = Callable[..., Result]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_loads_with_and_without_its_comments(kind: str, here: Path) -> None:
    main([kind])
    config = load_config(f"{kind}.toml")
    refuse_unbuilt(config)
    assert config.warnings == ()
    assert [stage.stage_type for stage in config.stages] == [stage.kind for stage in KINDS[kind]]
    for dataset in config.datasets.values():
        assert dataset.dataset_path is not None
        assert len((here / dataset.dataset_path).read_text().splitlines()) == 8
    text = Path(f"{kind}.toml").read_text()
    assert all(len(line) <= 120 for line in text.splitlines())
    bare = here / "bare.toml"
    bare.write_text(re.sub(r"(?m)^# (\[|\w+ = )", r"\1", text))
    refuse_unbuilt(load_config(bare))
    assert "#:schema" not in text
    (here / "ntjax.schema.json").write_text("{}")
    main([kind, "--force"])
    assert Path(f"{kind}.toml").read_text().startswith("#:schema ./ntjax.schema.json\n")


def test_files_that_are_there_stay(ntjax: Ntjax, place: Path) -> None:
    first = ntjax("init", "sft", "--out", "begun/mine.toml", "--model", "model")
    assert first.code == 0, first.err
    assert 'model_name_or_path = "model"' in (place / "begun/mine.toml").read_text()
    assert "ntjax inspect --config begun/mine.toml" in first.out
    assert ntjax("init", "sft", "--out", "begun/mine.toml", "--model", "model").code == 0  # the same again
    data = place / "begun/data/sft.jsonl"
    data.write_text("mine\n")
    again = ntjax("init", "chain", "--out", "begun/chain.toml")
    assert again.code == 78
    assert "begun/data/sft.jsonl is there already" in again.err
    assert not (place / "begun/chain.toml").exists()
    assert data.read_text() == "mine\n"
    assert ntjax("init", "chain", "--out", "begun/chain.toml", "--force").code == 0
    assert json.loads(data.read_text().splitlines()[0])["messages"]
    yaml = ntjax("init", "sft", "--out", "begun/mine.yaml")
    assert yaml.code == 78
    assert "mine.toml" in yaml.err
    assert ntjax("init", "sftt").code == 78


@pytest.mark.parametrize("kind", some(["sft", "dpo", "grpo"], ["sft", "dpo"], ["grpo"]))
def test_a_template_trains(kind: str, ntjax: Ntjax, place: Path) -> None:
    made = ntjax("init", kind, "--out", f"fresh/{kind}.toml", "--model", "model")
    assert made.code == 0, made.err
    args = "--config", f"fresh/{kind}.toml"
    seen = ntjax("inspect", *args)
    assert seen.code == 0, seen.err
    ended = ntjax("train", *args, "--output-dir", "fresh/runs", f"stages.{kind}.max_steps=1")
    assert ended.code == 0, ended.err
    (line,) = metrics(place / f"fresh/runs/{kind}/latest/{kind}_stage")
    assert line["step"] == 1
