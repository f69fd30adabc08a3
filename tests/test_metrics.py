"""Sums with counts, and the log of them."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import resource
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from ntjax.errors import ConfigError
from ntjax.metrics import Mean, MetricsLog, Tracked, Window, add, append_lines, finish, read_metrics, rewind
from ntjax.progress import Progress, duration

NAN = float("nan")


def test_means_of_unequal_batches_are_weighted_by_their_counts() -> None:
    few = {"loss": Mean(8.0, 2.0)}  # mean 4
    many = {"loss": Mean(6.0, 6.0)}  # mean 1
    assert finish(add(few, many)) == {"loss": 14.0 / 8.0}  # not (4 + 1) / 2


def test_a_metric_of_nothing_is_left_out() -> None:
    assert finish({"loss": Mean(1.0, 2.0), "reward": Mean(0.0, 0.0)}) == {"loss": 0.5}


def test_a_metric_may_be_in_one_of_two() -> None:
    assert finish(add({"a": Mean(1.0, 1.0)}, {"b": Mean(2.0, 1.0)})) == {"a": 1.0, "b": 2.0}


def test_metrics_are_added_inside_jit() -> None:
    metrics = {"loss": Mean(jnp.float32(3), jnp.float32(2))}
    assert finish(jax.jit(add)(metrics, metrics)) == {"loss": 1.5}


STEPS = [({"loss": Mean(0.1 * n, 3.0), "rare": Mean(0.7 * n, n % 2)}, 10 * n) for n in range(1, 8)]


def test_a_window_restored_in_the_middle_logs_the_same_bits() -> None:
    whole, resumed = Window(), Window()
    for metrics, tokens in STEPS:
        whole.add(metrics, tokens)
    for metrics, tokens in STEPS[:4]:
        resumed.add(metrics, tokens)
    resumed = Window.from_state(json.loads(json.dumps(resumed.state())))
    for metrics, tokens in STEPS[4:]:
        resumed.add(metrics, tokens)

    wanted, got = whole.finish(1.0), resumed.finish(1.0)
    assert {key: got[key] for key in ("loss", "rare", "num_tokens")} == {
        key: wanted[key] for key in ("loss", "rare", "num_tokens")
    }
    assert got["tokens_per_second"] == 50 + 60 + 70, "of the steps this process has done"


def test_tokens_run_on_and_means_and_speeds_begin_anew() -> None:
    window = Window()
    window.add({"loss": Mean(4.0, 2)}, tokens=100)
    window.add({"loss": Mean(2.0, 6)}, tokens=100)
    assert window.finish(seconds=4.0) == {
        "loss": 0.75,
        "num_tokens": 200,
        "tokens_per_second": 50.0,
        "trained_tokens_per_second": 2.0,
        "step_time": 2.0,
    }
    window.add({"loss": Mean(6.0, 2)}, tokens=50, trained=30)  # the loss of pairs counts pairs
    assert window.finish(seconds=1.0) == {
        "loss": 3.0,
        "num_tokens": 250,
        "tokens_per_second": 50.0,
        "trained_tokens_per_second": 30.0,
        "step_time": 1.0,
    }


def test_a_record_is_one_line_with_the_known_keys_first(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write({"rewards/margins": 0.5, "step": 10, "loss": 1.25, "epoch": 0.1})
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 10, "epoch": 0.1, "loss": 1.25, "rewards/margins": 0.5}\n'
    ), "written before close"
    log.close()


def test_a_value_that_is_not_finite_is_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write({"step": 1, "loss": NAN, "grad_norm": math.inf})
    log.close()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None}]


def test_a_resumed_log_equals_one_that_never_stopped(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    records = [{"step": step, "loss": 1 / step} for step in range(1, 7)]
    log = MetricsLog(whole)
    for record in records:
        log.write(record)
    log.close()

    log = MetricsLog(stopped)
    for record in records[:5]:
        log.write(record)
    log.close()
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # kill -9
    assert read_metrics(stopped) == records[:5]

    log = MetricsLog(stopped)
    log.rewind(3)
    for record in records[3:]:
        log.write(record)
    log.close()

    assert (stopped / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert [path.name for path in stopped.iterdir()] == ["metrics.jsonl"]


def test_other_logs_with_steps_are_rewound_too(tmp_path: Path) -> None:
    (tmp_path / "completions.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    rewind(tmp_path, 1, "completions.jsonl")
    assert (tmp_path / "completions.jsonl").read_text() == '{"step": 1}\n'


def test_there_is_nothing_to_read_before_the_first_step(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_a_full_disk_loses_lines_whole_and_warns_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = MetricsLog(tmp_path)
    log.write({"step": 1, "loss": 1.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, limits[1]))
    try:
        log.write({"step": 2, "loss": 2.0})
        log.write({"step": 3, "loss": 3.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.write({"step": 4, "loss": 4.0})
    log.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 4]
    assert caplog.text.count("metrics.jsonl can't be written") == 1


def test_a_full_disk_leaves_no_half_line_of_completions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "completions.jsonl"
    append_lines(path, [{"step": 1, "completion": "a"}])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    try:
        append_lines(path, [{"step": 2, "completion": "b"}, {"step": 2, "completion": "c"}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    append_lines(path, [{"step": 3, "completion": "d"}])
    rewind(tmp_path, 3, path.name)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]
    assert "completions.jsonl can't be written" in caplog.text


def test_tensorboard_gets_the_names_dashboards_group_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorboardX

    written = []
    monkeypatch.setattr(
        tensorboardX.SummaryWriter,
        "add_scalar",
        lambda self, tag, value, step: written.append((tag, value, step)),
    )
    log = MetricsLog(tmp_path, tensorboard=tmp_path / "tb")
    log.write({"step": 10, "loss": 1.5, "eval_loss": 2.5, "rewards/margins": 0.5})
    log.close()
    assert written == [("train/loss", 1.5, 10), ("eval/loss", 2.5, 10), ("train/rewards/margins", 0.5, 10)]
    assert list((tmp_path / "tb").glob("events.*"))


# --- Weights & Biases, in its own words: init, define_metric, log, finish ----------------


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.down = False

    def define_metric(self, name: str, **options: Any) -> None: ...

    def log(self, values: dict[str, Any]) -> None:
        if self.down:
            raise ConnectionError("network is down")
        self.logged.append(values)

    def finish(self) -> None: ...


class UsageError(Exception): ...


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = types.ModuleType("wandb")
    run = FakeRun()
    module.run = run  # type: ignore[attr-defined]
    module.errors = types.SimpleNamespace(UsageError=UsageError)  # type: ignore[attr-defined]
    module.init = lambda **options: run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_the_same_names(tmp_path: Path, wandb: Any) -> None:
    log = MetricsLog(tmp_path, wandb=Tracked("ntjax"))
    log.write({"step": 10, "loss": 1.5, "eval_loss": 2.5})
    log.close()
    assert wandb.run.logged == [{"train/loss": 1.5, "eval/loss": 2.5, "train/global_step": 10}]


def test_training_goes_on_when_wandb_is_down(
    tmp_path: Path, wandb: Any, caplog: pytest.LogCaptureFixture
) -> None:
    log = MetricsLog(tmp_path, wandb=Tracked("ntjax"))
    wandb.run.down = True
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 1.0})
    log.close()
    assert caplog.text.count("Weights & Biases can't be written, training goes on") == 1
    assert len(read_metrics(tmp_path)) == 3


def test_training_starts_when_wandb_is_down(
    tmp_path: Path, wandb: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def unreachable(**options: Any) -> None:
        raise ConnectionError("no route to host")

    wandb.init = unreachable
    log = MetricsLog(tmp_path, wandb=Tracked("ntjax"))
    log.write({"step": 1, "loss": 1.0})
    log.close()
    assert "no route to host" in caplog.text


def test_wandb_without_a_login_is_a_config_error(tmp_path: Path, wandb: Any) -> None:
    def refuse(**options: Any) -> None:
        raise UsageError("api_key not configured")

    wandb.init = refuse
    with pytest.raises(ConfigError, match="wandb login"):
        MetricsLog(tmp_path, wandb=Tracked("ntjax"))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_a_config_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # how Python is told that there is none
    with pytest.raises(ConfigError, match=rf'pip install "ntjax\[{name}\]"') as raised:
        MetricsLog(tmp_path, **{name: Tracked("ntjax")})
    assert raised.value.exit_code == 78


def test_wandb_itself_takes_a_stage_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = MetricsLog(tmp_path, wandb=Tracked("ntjax", name="task/run/sft_stage", run_id="run-sft_stage"))
    for step, loss in ((1, 2.5), (2, 1.5)):
        log.write({"step": step, "loss": loss})
    log.close()
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    wanted, deadline = (b"train/loss", b"train/global_step", b"2.5", b"1.5"), time.monotonic() + 10
    while not all(text in written.read_bytes() for text in wanted):  # a process of W&B's own writes it
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- Trackio, whose API is W&B's: init, log, finish ---------------------------------------


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> Any:
    module, run, logged = types.ModuleType("trackio"), FakeRun(), []
    run.log = lambda values, step: logged.append((step, values))  # type: ignore[assignment, misc]
    module.asked, module.logged = {}, logged  # type: ignore[attr-defined]
    module.init = lambda **options: module.asked.update(options) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


def test_trackio_gets_the_same_names_and_the_step(tmp_path: Path, trackio: Any) -> None:
    log = MetricsLog(tmp_path, trackio=Tracked("ntjax", name="task/run/sft_stage"))
    log.write({"step": 10, "loss": 1.5, "eval_loss": 2.5})
    log.close()
    assert trackio.logged == [(10, {"train/loss": 1.5, "eval/loss": 2.5})]
    assert (trackio.asked["name"], trackio.asked["resume"]) == ("task/run/sft_stage", "allow")
    assert "space_id" not in trackio.asked, "what is logged stays on this machine"


def test_training_starts_when_trackio_fails(
    tmp_path: Path, trackio: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def full(**options: Any) -> None:
        raise OSError("no space left on device")

    trackio.init = full
    log = MetricsLog(tmp_path, trackio=Tracked("ntjax"))
    log.write({"step": 1, "loss": 1.0})
    log.close()
    assert "Trackio can't be written, training goes on" in caplog.text
    assert len(read_metrics(tmp_path)) == 1


TRACKED = """
import sys
from pathlib import Path
from ntjax.metrics import MetricsLog, Tracked

for stage, steps in (("sft", (1, 2)), ("dpo", (1,)), ("sft", (3,))):  # the first one is resumed after the second
    log = MetricsLog(Path(sys.argv[1]), trackio=Tracked("ntjax", name=f"task/run/{stage}", config={"seed": 1}))
    for step in steps:
        log.write({"step": step, "loss": step / 2})
    log.close()
from trackio.sqlite_storage import SQLiteStorage
for stage in ("sft", "dpo"):
    print([(x["step"], x["train/loss"]) for x in SQLiteStorage.get_logs("ntjax", f"task/run/{stage}")])
"""


def test_trackio_itself_takes_two_stages_one_of_them_resumed(tmp_path: Path) -> None:
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("the extra trackio is not installed")
    ran = subprocess.run(  # it reads where it writes when it is imported
        [sys.executable, "-c", TRACKED, str(tmp_path)],
        env={**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    found = [line for line in ran.stdout.splitlines() if line.startswith("[(")]
    assert found == ["[(1, 0.5), (2, 1.0), (3, 1.5)]", "[(1, 0.5)]"]


# --- progress -----------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_a_logging_step_is_a_line() -> None:
    stream, now = io.StringIO(), [0.0]
    with Progress("sft_stage", 500, start=20, stream=stream, clock=lambda: now[0]) as progress:
        progress.update(100)
        now[0] = 50.0  # 100 steps in 50 s: 380 to go take 190 s
        progress.update(120, {"loss": 1.2345, "learning_rate": 1.9e-5, "tokens_per_second": 812.4})
        progress.note("saved checkpoint-120")
    assert stream.getvalue() == (
        "sft_stage 120/500 loss 1.234 lr 1.9e-05 812 tok/s eta 3m10s\nsaved checkpoint-120\n"
    )


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    with Progress("sft_stage", 500, stream=stream) as progress:
        progress.update(120, {"loss": 1.25})
        progress.note("saved [checkpoint-120]")
    shown = stream.getvalue()
    assert "120/500 loss 1.25 eta" in shown
    assert "saved [checkpoint-120]" in shown
    assert "\x1b[3" not in shown, "NO_COLOR"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (192, "3m12s"), (3599.6, "1h00m"), (7500, "2h05m"), (93600, "1d02h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
