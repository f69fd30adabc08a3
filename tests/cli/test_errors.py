"""What can be wrong: its exit code, its message, and that it is found before weights are read."""

from __future__ import annotations

import json
import resource
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.cli.process import Result, cold, metrics, write_rows


@pytest.fixture(scope="module")
def spoilt(place: Path, config: Callable[..., Path], whole: Path) -> Path:
    """The config of a model without weights, beside files that are not as they should be."""
    shutil.copytree(place / "model", place / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(place / "bare", place / "pickled")
    (place / "pickled" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    rows = [json.dumps({"prompt": "a", "completion": "b"}) + "\n"] * 3
    (place / "torn.jsonl").write_text("".join([*rows, '{"prompt": "What is\n', *rows]))
    write_rows(place / "odd.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "answer": "b"}])
    (place / "format.py").write_text("def halve(row):\n    return row['prompt'] / 2\n")
    path = config("spoilt")
    path.write_text(path.read_text().replace('"model"', '"bare"'))
    return path


WRONG: dict[str, tuple[Sequence[str], int, Sequence[str]]] = {
    "misspelt override": (
        ["stages.0.learn_rate=1"],
        78,
        ["stages.0.learn_rate", "did you mean learning_rate"],
    ),
    "wrong type": (["stages.0.max_steps=many"], 78, ["max_steps", "a whole number"]),
    "impossible": (["stages.0.max_steps=0"], 78, ["max_steps", "no steps would be taken"]),
    "not built": (["stages.0.fp16=true"], 78, ["not built yet: float16 with loss scaling (stages.0.fp16)"]),
    "deepspeed": (["--deepspeed", "ds.json"], 66, ['"ds.json": there is no such file']),
    "no such stage": (["--stages", "dpo"], 78, ["--stages", "'dpo'", "sft_stage"]),
    "no wandb": (["use_wandb=true"], 78, ["use_wandb", 'pip install "ntjax[wandb]"']),
    "no trackio": (["use_trackio=true"], 78, ["use_trackio", 'pip install "ntjax[trackio]"']),
    "no evaluation rows": (["stages.0.do_eval=true"], 78, ["do_eval", "[datasets.sft]"]),
    "unwritable": (["--output-dir", "pairs.jsonl/x"], 78, ["base_output_dir", "Not a directory"]),
    "used folder": (["stages.0.output_dir=out/whole/latest/sft_stage"], 78, ["another run", "--resume"]),
    "no data": (["datasets.sft.dataset_path=pears.jsonl"], 66, ["pears.jsonl", "did you mean 'pairs.jsonl'"]),
    "no model": (["model.model_name_or_path=nowhere"], 66, ["nowhere"]),
    "no weights": ([], 66, ["bare", "safetensors"]),
    "pickled": (["model.model_name_or_path=pickled"], 77, ["pytorch_model.bin"]),
    "torn row": (["datasets.sft.dataset_path=torn.jsonl"], 65, ["torn.jsonl:4"]),
    "missing field": (["datasets.sft.dataset_path=odd.jsonl"], 65, ["odd.jsonl:2"]),
    "nothing to learn": (["datasets.sft.max_length=3"], 65, ["the prompt alone fills max_length"]),
    "formatting": (
        ["datasets.sft.formatting_func=format.py:halve"],
        70,
        ["format.py:2", "pairs.jsonl:1", "TypeError"],
    ),
    "no such function": (["datasets.sft.formatting_func=format.py:half"], 78, ["format.py:halve"]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_train_says_what_is_wrong(wrong: str, ntjax: Callable[..., Result], spoilt: Path) -> None:
    args, code, said = WRONG[wrong]
    ended = ntjax("train", "--config", spoilt, *args)
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err
    for phrase in said:
        assert phrase in ended.err


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["train", "--config", "nowhere.toml"], 66, "nowhere.toml"),
        (["inspect", "--config", "spoilt.toml", "--stage", "dpo"], 78, "there is no stage 'dpo'"),
        (["generate", "--model", "nowhere", "--prompt", "a"], 66, "nowhere"),
        (["generate", "--model", "model", "--prompts", "nowhere.jsonl"], 66, "nowhere.jsonl"),
        (["generate", "--model", "model", "--prompts", "torn.jsonl"], 65, "torn.jsonl:4"),
        (["export", "--checkpoint", "nowhere", "--out", "x"], 66, "nowhere"),
        (["import", "--model", "nowhere", "--out", "x"], 66, "nowhere"),
    ],
)
def test_the_other_commands_say_what_is_wrong(
    args: list[str], code: int, said: str, ntjax: Callable[..., Result], spoilt: Path
) -> None:
    ended = ntjax(*args)
    assert ended.code == code, ended.err
    assert said in ended.err
    assert "Traceback" not in ended.err


def test_debug_shows_the_traceback(ntjax: Callable[..., Result], spoilt: Path) -> None:
    ended = ntjax("train", "--config", spoilt, "--debug", "datasets.sft.dataset_path=torn.jsonl")
    assert ended.code == 65
    assert "Traceback" in ended.err
    assert ended.err.splitlines()[-1].startswith("ntjax: torn.jsonl:4")


def leaves(stage: Path, step: int) -> dict[str, Any]:
    """dtype, shape and digest of each leaf of a checkpoint, the count of steps aside."""
    record = json.loads((stage / f"checkpoint-{step}" / "record" / "metadata").read_text())
    return {name: leaf for name, leaf in record["leaves"].items() if name != "step"}


def test_a_run_that_diverges_stops_with_the_state_it_had_before(
    ntjax: Callable[..., Result], config: Callable[..., Path], latest: Callable[[str], Path]
) -> None:
    path = config("diverges", learning_rate=1e30, warmup_steps=0, save_steps=1, logging_steps=1)
    ended = ntjax("train", "--config", path)
    assert ended.code == 79, ended.err
    assert "not finite in 5 steps in a row" in ended.err
    assert "Traceback" not in ended.err
    stage = latest("diverges") / "sft_stage"
    skipped = [record["step"] for record in metrics(stage) if "loss" not in record]
    assert len(skipped) == 4  # the fifth ends the run, unlogged
    before = leaves(stage, skipped[0] - 1)
    assert [leaves(stage, step) for step in skipped] == [before] * 4
    assert not (stage / "model.safetensors").exists()


def timed(place: Path, *args: str) -> tuple[Result, float]:
    """How a command ended, and the seconds of CPU it used."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = cold(place, args, {})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_and_config_errors_are_quick(place: Path, config: Callable[..., Path]) -> None:
    path = config("misspelt", {"learn_rate": 1e-3})
    line = path.read_text().splitlines().index("learn_rate = 0.001") + 1
    ended, seconds = timed(place, "train", "--config", str(path))
    assert ended.code == 78, ended.err
    assert f"misspelt.toml:{line}" in ended.err
    assert "did you mean learning_rate" in ended.err
    assert "Traceback" not in ended.err
    assert seconds < 3
    for command in ("train", "inspect", "generate", "export", "import"):
        shown, seconds = timed(place, command, "--help")
        assert shown.code == 0, shown.err
        assert "--debug" in shown.out
        assert seconds < 3


def test_files_of_the_user_do_not_take_the_place_of_modules(
    tmp_path: Path, config: Callable[..., Path]
) -> None:
    for name in ("tomllib", "yaml", "dataclasses", "difflib"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    ended = cold(tmp_path, ("train", "--config", str(config("shadowed", {"learn_rate": 1}))), {})
    assert ended.code == 78, ended.err
    assert "did you mean learning_rate" in ended.err


def test_the_console_script_is_the_same_thing(place: Path, config: Callable[..., Path]) -> None:
    def script(*args: str) -> Result:
        return cold(place, args, {}, program=[str(Path(sys.executable).parent / "ntjax")])

    path = str(config("console", {"learn_rate": 1}))
    assert script("train", "--config", path) == cold(place, ("train", "--config", path), {})
    unknown = script("trian")
    assert unknown.code == 78
    assert "did you mean train?" in unknown.err
    listed = script()
    assert listed.code == 0
    for command in ("train", "inspect", "generate", "export", "import"):
        assert command in listed.out
