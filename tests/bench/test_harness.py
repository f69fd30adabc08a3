"""What the benchmarks make of measurements: medians, ratios, records that are kept, tables of a document."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
sys.path.insert(0, str(BENCH))

import record  # noqa: E402
import tables  # noqa: E402
from harness import figures, ratios, timed  # noqa: E402
from peers import rows  # noqa: E402
from peers.clock import Clock  # noqa: E402

HEAD = {
    "command": "python scripts/bench/some.py",
    "date": "2026-01-02",
    "machine": {"cores": 2, "cpu": "a CPU", "memory_gb": 24, "accelerator": None},
    "versions": {"python": "3.11.7"},
}
SCRIPT = """
import argparse, os, sys, time
sys.path.insert(0, {bench!r})
import record
from pathlib import Path
from harness import Absent, Row, main, measured

record.FOLDER = Path({out!r})

def quick(args): return measured([0.1], [0.2], tokens=[10], first_s=1.0, loss=[1.5])
def slow(args): return measured([0.3 if args.toy else 0.2], [0.2], tokens=[10], first_s=1.0)
def away(args): raise Absent("not here")
def broken(args): raise ValueError(os.environ["SAID"])

first = Row("a", "row a", {{"ntjax": quick, "other": slow, "third": away}}, "1.2")
rows = [first, Row("b", "row b", {{"ntjax": broken}})]
main("some", rows, argparse.ArgumentParser(), ["pytest", "no-such-package"], SAID="it broke")
"""


def a_run(seconds: list[float], **rest) -> dict:
    return {
        "seconds": seconds,
        "cpu": seconds,
        "tokens": None,
        "peak_gb": 1.0,
        "first_s": 2.0,
        "loss": [],
        **rest,
    }


def a_row(what: str, **figures_of) -> dict:
    found = {who: figures([a_run([seconds])]) for who, seconds in figures_of.items()}
    return {"what": what, "asked": "1.5", "rounds": 2, "figures": found, "ratio": ratios(found)}


def test_a_first_step_is_apart():
    losses = iter([3.0, 2.0, 1.0])
    run = timed(lambda: next(losses), 2, tokens=8)
    assert len(run["seconds"]) == len(run["cpu"]) == 2
    assert run["tokens"] == [8, 8]
    assert run["loss"] == [3.0, 2.0, 1.0]
    assert run["first_s"] > 0
    assert run["peak_gb"] > 0


def test_figures_are_medians_of_all_rounds():
    found = figures([a_run([1.0, 9.0]), a_run([2.0], peak_gb=3.0)])
    assert (found["seconds"], found["seconds_from_to"], found["steps"]) == (2.0, [1.0, 9.0], 3)
    assert (found["peak_gb"], found["tokens_per_s"]) == (3.0, None)


def test_tokens_of_steps_that_differ_are_counted_over_a_run():
    assert figures([a_run([1.0, 4.0, 4.0], tokens=[8, 8, 8])])["tokens_per_s"] == 2.0
    assert figures([a_run([1.0, 3.0], tokens=[10, 30]), a_run([4.0], tokens=[4])])["tokens_per_s"] == 5.5


def test_ratios_are_the_first_over_each_other():
    found = {"ntjax": figures([a_run([2.0])]), "x": figures([a_run([3.0])]), "y": {"absent": "no"}}
    assert ratios(found) == {"x": 1.5}
    assert ratios({"ntjax": {"absent": "no"}, "x": figures([a_run([1.0])])}) == {}
    packed, padded = figures([a_run([2.0], tokens=[10])]), figures([a_run([1.0], tokens=[4])])
    assert ratios({"ntjax": packed, "x": padded}) == {"x": 1.25}


def test_a_clock_measures_from_mark_to_mark():
    clock = Clock()
    for step in range(4):
        clock.mark(loss=4.0 - step, tokens=10 * (step + 1))
    run = clock.run(warm=2)
    assert run["tokens"] == [10, 10]
    assert len(run["seconds"]) == 2
    assert run["loss"] == [4.0, 3.0, 2.0]
    assert len(clock.run(warm=1, last=2)["seconds"]) == 1


def test_rows_that_were_not_measured_again_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "FOLDER", tmp_path)
    order = ["first", "second", "third"]
    record.write("some", [a_row("second", ntjax=1.0), a_row("gone", ntjax=1.0)], HEAD, order)
    record.write("some", [a_row("first", ntjax=1.23456789)], {**HEAD, "date": "2026-01-03"}, order)
    kept = json.loads((tmp_path / "some" / "a-cpu.json").read_text())["rows"]
    assert [(row["what"], row["date"]) for row in kept] == [("first", "2026-01-03"), ("second", "2026-01-02")]
    assert kept[0]["figures"]["ntjax"]["seconds"] == 1.235
    record.write("some", [a_row("third", ntjax=1.0)], {**HEAD, "versions": {"python": "3.12"}}, order)
    assert [row["what"] for row in json.loads((tmp_path / "some" / "a-cpu.json").read_text())["rows"]] == [
        "third"
    ]
    lent = HEAD["machine"] | {"accelerator": "NVIDIA H100 80GB HBM3"}
    record.write("some", [a_row("second", ntjax=1.0)], {**HEAD, "machine": lent}, order)
    assert sorted(path.name for path in (tmp_path / "some").iterdir()) == [
        "a-cpu.json",
        "nvidia-h100-80gb-hbm3.json",
    ]


def test_a_processor_is_told_by_more_than_its_name():
    info = "cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nflags\t: fpu\n\nmodel\t: 18\n"
    assert record.cpu(info) == "AMD EPYC, family 25, model 17"
    assert record.cpu("processor\t: 0\nBogoMIPS\t: 50.00\n") == "unknown"


def test_a_document_has_its_tables_between_marks():
    row = {**a_row("a step", ntjax=2.0, torch=3.0), "date": "2026-01-02"}
    row["figures"]["Tunix"] = {"absent": "no --tunix-python"}
    document = "# A\n<!-- bench: some -->\nold\n<!-- end -->\nB\n<!-- bench: none -->\n<!-- end -->\n"
    one, other = (
        {**HEAD, "machine": {**HEAD["machine"], "cpu": cpu}, "rows": [row]} for cpu in ("a CPU", "B")
    )
    found = tables.filled(document, {"some": [one], "none": []}.__getitem__)
    assert "| a step | ntjax | 2 | | 2 | 1 | | 1.5 |" in found
    assert "| | torch | 3 | | 3 | 1 | 1.50 | |" in found
    assert "| | Tunix | absent: no --tunix-python | | | | | |" in found
    assert "2026-01-02, medians of rounds: 2. 2 CPU cores (a CPU), 24 GB; python 3.11.7." in found
    assert "old" not in found
    assert "Not measured yet: `python scripts/bench/none.py`." in found
    assert tables.filled(found, {"some": [one], "none": []}.__getitem__) == found
    both = tables.filled(found, {"some": [one, other], "none": []}.__getitem__)
    assert [line for line in both.splitlines() if line.startswith("**")] == ["**a CPU**", "**B**"]


def test_the_command_measures_in_processes_and_keeps_the_record(tmp_path):
    script = tmp_path / "some.py"
    script.write_text(SCRIPT.format(bench=str(BENCH), out=str(tmp_path / "bench")))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)

    toy = run("--toy", "--rounds", "1", "--only", "a")
    assert toy.returncode == 0, toy.stderr
    assert json.loads(toy.stdout)["ratio"] == {"other": 3.0}
    assert not (tmp_path / "bench").exists()
    done = run("--rounds", "2")
    assert done.returncode != 0
    assert "ValueError: it broke" in done.stderr
    assert "failed: b" in done.stderr
    kept = json.loads(next((tmp_path / "bench" / "some").glob("*.json")).read_text())
    first, second = kept["rows"]
    assert first["ratio"] == {"other": 2.0}
    assert first["figures"]["ntjax"]["steps"] == first["rounds"] == 2
    assert first["figures"]["third"] == {"absent": "not here"}
    assert second["figures"]["ntjax"] == {"absent": "ValueError: it broke", "failed": True}
    assert set(kept["versions"]) == {"python", "pytest"}


def test_the_worse_of_a_pair_answers_another_question():
    pairs = rows.preferred(rows.toy_rows())
    assert pairs[0]["chosen"] == pairs[-1]["rejected"]
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
    assert [len(row["prompt"]) for row in rows.asked(rows.toy_rows(), 3)] == [1, 1, 1]


def test_the_reward_counts_digits():
    said = [[{"role": "assistant", "content": text}] for text in ("12ab", "", "ab")]
    assert rows.digits([], said) == [0.5, 0.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("row", ["fp32", "bf16", "lora", "sft", "reward", "dpo", "grpo"])
def test_every_row_of_the_table_can_be_measured(row):
    command = [sys.executable, BENCH / "cpu.py", "--toy", "--rounds", "1", "--only", row]
    one_device = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(command, env=one_device, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ratio"]
