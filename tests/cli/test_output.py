"""What a run leaves: its folder, its logs, its checkpoints, and stages that start from one another."""

from __future__ import annotations

import json
import math
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ntjax.config import load_config
from tests.cli.process import Result, Running, checkpoints, losses, metrics

MODEL_FILES = {
    *("model.safetensors", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
}


RUN_FILES = {"config.toml", "train.log", "environment.json", "report.html"}


def test_a_run_folder(whole: Path, place: Path) -> None:
    assert (place / "out" / "whole" / "latest").readlink() == Path(whole.name)
    assert {path.name for path in whole.iterdir()} == RUN_FILES | {"sft_stage"}
    files = {path.name for path in (whole / "sft_stage").iterdir() if path.is_file()}
    assert files == MODEL_FILES | {"metrics.jsonl", "stage.json"}
    assert checkpoints(whole / "sft_stage") == [4, 8, 12, 16, 20, 24]


def test_the_resolved_config_reads_back_as_itself(whole: Path, place: Path) -> None:
    assert load_config(whole / "config.toml") == load_config(place / "whole.toml")


def test_the_logs(whole: Path) -> None:
    records = [json.loads(line) for line in (whole / "sft_stage" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [3, 6, 9, 12, 15, 18, 21, 24]
    contract = ["step", "epoch", "loss", "grad_norm", "learning_rate", "num_tokens", "tokens_per_second"]
    contract += ["trained_tokens_per_second", "step_time"]
    for record in records:
        assert list(record)[:9] == contract
        assert all(math.isfinite(value) for value in record.values())
        assert record["tokens_per_second"] > record["trained_tokens_per_second"] > 0
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    log = (whole / "train.log").read_text()
    assert (whole / "config.toml").read_text() in log
    for record in records:
        assert f"'step': {record['step']}, " in log


def test_transformers_reads_the_stage_folder(whole: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(whole / "sft_stage", output_loading_info=True)
    model, report = loaded
    assert not any(report.values())
    assert len(AutoTokenizer.from_pretrained(whole / "sft_stage")) == model.config.vocab_size


@pytest.fixture(scope="module")
def best(
    ntjax: Callable[..., Result], config: Callable[..., Path], latest: Callable[[str], Path]
) -> tuple[Path, Result]:
    """The stage folder of a run that keeps one checkpoint, and the worst: the first, since losses fall."""
    options = {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "greater_is_better": True,
    }
    ended = ntjax("train", "--config", config("best", options, dataset={"validation_split_ratio": 0.25}))
    assert ended.code == 0, ended.err
    return latest("best") / "sft_stage", ended


def test_evaluation_is_logged(best: tuple[Path, Result]) -> None:
    stage, ended = best
    assert "30 examples of 30 rows" in ended.out
    records = [record for record in metrics(stage) if "eval_loss" in record]
    assert [record["step"] for record in records] == [4, 8, 12, 16, 20, 24]
    found = [record["eval_loss"] for record in records]
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0]
    for record in records:
        assert record["eval_perplexity"] == pytest.approx(math.exp(record["eval_loss"]))


def test_the_best_checkpoint_is_kept_and_becomes_the_result(
    best: tuple[Path, Result], ntjax: Callable[..., Result], place: Path
) -> None:
    stage, _ = best
    assert checkpoints(stage) == [4, 24]
    exported = ntjax("export", "--checkpoint", stage / "checkpoint-4", "--out", "best_exported")
    assert exported.code == 0, exported.err
    result, expected = (
        load_file(stage / "model.safetensors"),
        load_file(place / "best_exported" / "model.safetensors"),
    )
    assert result.keys() == expected.keys()
    assert all(np.array_equal(result[name], expected[name]) for name in result)


@pytest.fixture(scope="module")
def chain(
    begin: Callable[..., Running],
    ntjax: Callable[..., Result],
    config: Callable[..., Path],
    latest: Callable[[str], Path],
) -> tuple[Path, Result, float]:
    """A run of the stages a, b and c, killed in b and resumed; how it ended, and when a's weights were written."""
    stages = [{"stage_name": name} for name in "ab"] + [{"stage_name": "c", "load_from": "a"}]
    command = "train", "--config", config("chain", *stages)
    first = begin(*command)
    first.until(lambda: metrics(latest("chain") / "b_stage"))
    assert first.send(signal.SIGKILL).code == -9
    run = latest("chain")
    written = (run / "a_stage" / "model.safetensors").stat().st_mtime_ns
    return run, ntjax(*command, "--resume", "auto"), written


def test_a_killed_chain_does_not_repeat_what_is_done(chain: tuple[Path, Result, float]) -> None:
    run, resumed, written = chain
    assert resumed.code == 0, resumed.err
    assert "a_stage is done already" in resumed.out
    assert (run / "a_stage" / "model.safetensors").stat().st_mtime_ns == written
    assert {path.name for path in run.iterdir() if path.is_dir()} == {"a_stage", "b_stage", "c_stage"}


def test_a_stage_starts_from_the_one_before_or_the_one_named(chain: tuple[Path, Result, float]) -> None:
    run, resumed, _ = chain
    for stage in "bc":
        assert f"{stage}_stage starts from {run / 'a_stage'}\n" in resumed.out
    # b and c differ in nothing but how they were told to start from a.
    assert metrics(run / "c_stage") == metrics(run / "b_stage")
    assert losses(run / "b_stage")[0] < losses(run / "a_stage")[-1]
    weights = [(run / f"{stage}_stage" / "model.safetensors").read_bytes() for stage in "abc"]
    assert weights[0] != weights[1] == weights[2]


def test_a_stage_alone_from_a_folder_into_a_folder(
    chain: tuple[Path, Result, float], ntjax: Callable[..., Result], place: Path
) -> None:
    run, _, _ = chain
    alone = ntjax(
        *("train", "--config", place / "chain.toml", "--stages", "b", "--output-dir", "elsewhere"),
        *(f"stages.b.load_from={run / 'a_stage'}", "stages.b.output_dir=b_alone"),
    )
    assert alone.code == 0, alone.err
    made = place / "elsewhere" / "chain" / "latest"
    assert {path.name for path in made.iterdir()} == RUN_FILES
    assert metrics(place / "b_alone") == metrics(run / "b_stage")
    result = (place / "b_alone" / "model.safetensors").read_bytes()
    assert result == (run / "b_stage" / "model.safetensors").read_bytes()


def test_a_stage_cannot_start_from_one_that_never_ran(
    ntjax: Callable[..., Result], place: Path, chain: object
) -> None:
    ended = ntjax("train", "--config", place / "chain.toml", "--stages", "c")
    assert ended.code == 66, ended.err
    assert "a_stage" in ended.err
    assert "Traceback" not in ended.err


def test_recomputing_activations_changes_no_loss(
    ntjax: Callable[..., Result], place: Path, latest: Callable[[str], Path], whole: Path
) -> None:
    ended = ntjax(
        *("train", "--config", place / "whole.toml", "task_name=recomputed"),
        *("stages.0.gradient_checkpointing=true", "stages.0.save_strategy=no"),
    )
    assert ended.code == 0, ended.err
    stage = latest("recomputed") / "sft_stage"
    assert checkpoints(stage) == []
    assert losses(stage) == pytest.approx(losses(whole / "sft_stage"), rel=1e-5)


def test_bf16_computes_in_bfloat16_and_keeps_float32(
    ntjax: Callable[..., Result], place: Path, latest: Callable[[str], Path], whole: Path
) -> None:
    ended = ntjax("train", "--config", place / "whole.toml", "task_name=bf16", "stages.0.bf16=true")
    assert ended.code == 0, ended.err
    stage = latest("bf16") / "sft_stage"
    exact = losses(whole / "sft_stage")
    assert losses(stage) == pytest.approx(exact, rel=1e-2)
    assert losses(stage) != pytest.approx(exact, rel=1e-6)
    assert {str(x.dtype) for x in load_file(stage / "model.safetensors").values()} == {"float32"}


def test_packing_fills_rows_with_the_same_tokens(
    ntjax: Callable[..., Result], place: Path, latest: Callable[[str], Path]
) -> None:
    """40 rows in steps of 4 take 10; packed to 64 tokens they take fewer, and an epoch still sees every token once."""
    options = "stages.0.packing=true", "stages.0.logging_steps=1"
    ended = ntjax("train", "--config", place / "whole.toml", "task_name=packed", *options)
    assert ended.code == 0, ended.err
    tokens = int(re.findall(r"of (\d+) tokens learned", ended.out)[0])
    epochs = [record for record in metrics(latest("packed") / "sft_stage") if record["epoch"] % 1 == 0]
    assert len(epochs) >= 24 // 5
    assert [record["num_tokens"] for record in epochs] == [tokens * record["epoch"] for record in epochs]


def test_configs_of_other_kinds_say_the_same(ntjax: Callable[..., Result], place: Path, whole: Path) -> None:
    import tomllib

    import yaml

    data = tomllib.loads((place / "whole.toml").read_text())
    (place / "whole.yaml").write_text(yaml.safe_dump(data))
    (place / "whole.json").write_text(json.dumps(data))
    (place / "whole.py").write_text(f"def get_config():\n    return {data!r}\n")
    printed = []
    for kind in ("toml", "yaml", "json", "py"):
        # Refused after the resolved config is printed.
        ended = ntjax(
            *("train", "--config", f"whole.{kind}", f"--output-dir=kinds/{kind}"),
            "datasets.sft.dataset_path=pears.jsonl",
        )
        assert ended.code == 66, ended.err
        (run,) = (place / "kinds" / kind / "whole").glob("2*")
        printed.append((run / "config.toml").read_text().replace(f"kinds/{kind}", "out"))
    assert len(set(printed)) == 1
