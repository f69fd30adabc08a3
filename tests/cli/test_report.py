"""The report that a run writes of itself, and the command that writes it of any run."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import ntjax as package
from tests.cli.process import Result, Running, cold, devices, write_rows


def test_a_run_leaves_its_report_and_what_it_ran_on(whole: Path) -> None:
    page = (whole / "report.html").read_text()
    assert "done, 24 steps" in page
    assert "40 examples of 40 rows" in page
    noted = json.loads((whole / "environment.json").read_text())
    assert (noted["ntjax"], noted["platform"], noted["devices"]) == (package.__version__, "cpu", 1)
    assert noted["mesh"] == "data 1, fsdp 1, tensor 1, sequence 1"
    assert not list(whole.glob(".*"))


def test_the_command_says_where_the_report_is(ntjax: Callable[..., Result], copy: Path, place: Path) -> None:
    (copy / "report.html").unlink()
    ended = ntjax("report", copy)
    assert (ended.code, ended.out) == (0, f"{copy / 'report.html'}\n"), ended.err
    assert "done, 24 steps" in (copy / "report.html").read_text()
    ended = ntjax("report", copy / "sft_stage", "--out", "elsewhere.html")
    assert (ended.code, ended.out) == (0, "elsewhere.html\n"), ended.err
    assert "done, 24 steps" in (place / "elsewhere.html").read_text()
    assert not (copy / "sft_stage" / "report.html").exists()


def test_a_report_is_written_at_saves_and_resuming_goes_on_with_it(
    begin: Callable[..., Running],
    ntjax: Callable[..., Result],
    config: Callable[..., Path],
    latest: Callable[[str], Path],
) -> None:
    command = "train", "--config", config("reported", {"save_steps": 1})
    running = begin(*command)
    running.until(lambda: (latest("reported") / "report.html").exists())
    assert running.send(signal.SIGKILL).code == -9
    run = latest("reported")
    assert " of 24" in (run / "report.html").read_text(), "the stage was under way"
    ended = ntjax("report", run)
    assert ended.code == 0, ended.err
    assert " of 24" in (run / "report.html").read_text()
    ended = ntjax(*command, "--resume", "auto")
    assert ended.code == 0, ended.err
    assert "done, 24 steps" in (run / "report.html").read_text()


def test_a_report_that_cannot_be_written_ends_no_run(
    begin: Callable[..., Running],
    ntjax: Callable[..., Result],
    config: Callable[..., Path],
    latest: Callable[[str], Path],
) -> None:
    command = "train", "--config", config("unreported", {"save_steps": 1})
    running = begin(*command)
    running.until(lambda: (latest("unreported") / "sft_stage" / "checkpoint-2").exists())
    running.send(signal.SIGKILL)
    run = latest("unreported")
    for name in ("report.html", "environment.json"):
        (run / name).unlink(missing_ok=True)
        (run / name / "in the way").mkdir(parents=True)
    ended = ntjax(*command, "--resume", "auto")
    assert ended.code == 0, ended.err
    assert ended.out.count("the report can't be written, training goes on") == 1


def test_what_is_no_run_is_refused_in_a_sentence(
    ntjax: Callable[..., Result], place: Path, copy: Path
) -> None:
    missing = ntjax("report", "nowhere")
    assert missing.code == 66
    assert "there is no folder nowhere" in missing.err
    model = ntjax("report", "model")
    assert model.code == 66
    assert "is no run: there is neither config.toml in it nor metrics.jsonl" in model.err
    unwritable = ntjax("report", copy, "--out", "nowhere/report.html")
    assert unwritable.code == 78
    assert "--out: the report can't be written" in unwritable.err
    path = copy / "sft_stage" / "metrics.jsonl"
    write_rows(path, [{"step": 1, "loss": 1.0}, ["no record"]])
    broken = ntjax("report", copy)
    assert broken.code == 65
    assert f"{path}:2: not a record of metrics" in broken.err
    assert all("Traceback" not in ended.err for ended in (missing, model, unwritable, broken))


def test_a_report_needs_neither_jax_nor_transformers(copy: Path, place: Path) -> None:
    barred = (
        "sys.modules.update(dict.fromkeys(['jax', 'flax', 'torch', 'transformers', 'datasets', 'orbax']))"
    )
    program = f"import sys; {barred}; from ntjax import errors, report; errors.run(report.main, sys.argv[2:])"
    ended = cold(place, ("report", str(copy)), devices(1), [sys.executable, "-c", program])
    assert ended.code == 0, ended.err
