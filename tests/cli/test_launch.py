"""Runs of two processes: they train as one does, end together, and go on as if nothing had happened."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ntjax.launch import free_port
from tests.cases import some
from tests.cli.faulty import FAULTS
from tests.cli.process import Result, cold, devices, losses, metrics

ROOT = Path(__file__).parents[2]
MOST = 15  # seconds from a fault to the end of every process
TIMEOUTS = {"timeouts.start": 60, "timeouts.heartbeat": 5, "timeouts.step": 8, "timeouts.save": 8}
SETTINGS = {"max_steps": 12, "save_steps": 4, "per_device_train_batch_size": 1}
KILLS = [("kill", 0, 1), ("kill", 1, 4), ("kill", 0, 5), ("kill", 1, 8), ("kill", 1, 9), ("kill", 0, 11)]
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def two(place: Path) -> Callable[..., Result]:
    """two(args, fault=("kill", 1, 5)): `ntjax.launch` of `ntjax.train ARGS` in two processes of `count` devices."""

    def two(
        *args: object, fault: tuple[str, int, int] | None = None, count: int = 4, restarts: int = 2
    ) -> Result:
        program = ["ntjax.train"]
        if fault:
            note = place / f"fault-{'-'.join(map(str, fault))}"
            program = ["tests.cli.faulty", *map(str, fault), str(note)]
        overrides = [f"{key}={value}" for key, value in TIMEOUTS.items()]
        command = [sys.executable, "-m", *program, *map(str, args), *overrides]
        launch = "launch", "--processes", "2", "--max-restarts", str(restarts), "--"
        return cold(place, (*launch, *command), {**devices(count), "PYTHONPATH": str(ROOT)})

    return two


@pytest.fixture(scope="module")
def together(two: Callable[..., Result], config: Callable[..., Path], latest: Callable[[str], Path]) -> Path:
    """The stage of an undisturbed run of two processes."""
    ended = two("--config", config("together", **SETTINGS), "mesh.zero_stage=3")
    assert ended.code == 0, ended.err
    return latest("together") / "sft_stage"


@slow
@pytest.mark.parametrize("fault", KILLS, ids=lambda kill: f"{kill[1]}-at-{kill[2]}")
def test_a_run_that_loses_a_process_comes_to_the_very_same_end(
    fault: tuple[str, int, int],
    two: Callable[..., Result],
    config: Callable[..., Path],
    latest: Callable[[str], Path],
    together: Path,
) -> None:
    task = f"lost-{fault[1]}-{fault[2]}"
    ended = two("--config", config(task, **SETTINGS), "mesh.zero_stage=3", fault=fault)
    assert ended.code == 0, ended.err
    assert "starting again, 1 of 2" in ended.err
    stage = latest(task) / "sft_stage"
    assert (stage / "model.safetensors").read_bytes() == (together / "model.safetensors").read_bytes()
    assert metrics(stage) == metrics(together)


@slow
def test_a_signal_to_one_stops_both_and_they_go_on(
    two: Callable[..., Result], config: Callable[..., Path], latest: Callable[[str], Path], together: Path
) -> None:
    path = config("asked", **SETTINGS)
    ended = two("--config", path, "mesh.zero_stage=3", fault=("term", 1, 5), restarts=0)
    assert ended.code == 75
    assert "stopped by SIGTERM after step 7 of 12" in ended.err
    goes_on = two("--config", path, "mesh.zero_stage=3", "--resume", "auto")
    assert goes_on.code == 0, goes_on.err
    weights = (latest("asked") / "sft_stage" / "model.safetensors").read_bytes()
    assert weights == (together / "model.safetensors").read_bytes()


def test_two_processes_of_four_devices_lose_what_one_of_one_does(
    ntjax: Callable[..., Result], config: Callable[..., Path], latest: Callable[[str], Path], together: Path
) -> None:
    path = config("alone", **{**SETTINGS, "per_device_train_batch_size": 8})
    ended = ntjax("train", "--config", path, env=devices(1))
    assert ended.code == 0, ended.err
    one = latest("alone") / "sft_stage"
    assert losses(together) == pytest.approx(losses(one), rel=1e-6)
    assert [r["num_tokens"] for r in metrics(together)] == [r["num_tokens"] for r in metrics(one)]


@slow
@pytest.mark.parametrize(("processes", "count", "rows"), [(1, 8, 1), (2, 2, 2), (1, 1, 8), (1, 2, 4)])
def test_a_checkpoint_of_2_times_4_goes_on_elsewhere(
    processes: int,
    count: int,
    rows: int,
    two: Callable[..., Result],
    ntjax: Callable[..., Result],
    together: Path,
    config: Callable[..., Path],
    place: Path,
) -> None:
    """The first loss after it is the same; restoring compares digests of every leaf."""
    import shutil

    run = Path(shutil.copytree(together.parent, place / f"moved-{processes}-{count}"))
    resume = "--resume", run / "sft_stage" / "checkpoint-4"
    changed = f"stages.0.per_device_train_batch_size={rows}", "mesh.zero_stage=3"
    args = "--config", place / "together.toml", *resume, *changed
    ended = two(*args, count=count) if processes == 2 else ntjax("train", *args, env=devices(count))
    assert ended.code == 0, ended.err
    assert "resuming at step 4 of 12" in ended.out
    assert losses(run / "sft_stage") == pytest.approx(losses(together), rel=1e-6)


def direct(place: Path, path: Path, fault: str, who: int) -> Iterator[tuple[int, float]]:
    """(exit code, seconds after the fault) of each process, which nobody but the test looks after."""
    note = place / f"direct-{fault}-{who}"
    overrides = [f"{key}={value}" for key, value in TIMEOUTS.items()]
    command = [sys.executable, "-m", "tests.cli.faulty", fault, str(who), "5", str(note)]
    command += ["--config", str(path), "mesh.zero_stage=3", *overrides]
    shared = {**os.environ, **devices(4), "PYTHONPATH": str(ROOT)}
    shared |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "NTJAX_NUM_PROCESSES": "2"}
    members = [
        subprocess.Popen(
            command, cwd=place, env={**shared, "NTJAX_PROCESS_ID": str(i)}, stderr=subprocess.PIPE
        )
        for i in range(2)
    ]
    ends: dict[int, float] = {}
    deadline = time.monotonic() + 120
    while len(ends) < 2 and time.monotonic() < deadline:
        for i, member in enumerate(members):
            if i not in ends and member.poll() is not None:
                ends[i] = time.time()
        if fault == "stop" and 1 - who in ends:
            members[who].kill()  # a stopped process can't end: what started it has to
        time.sleep(0.05)
    for member in members:
        member.kill()
        member.communicate()
    assert note.exists()
    began = float(note.read_text())
    yield from ((member.returncode, ends[i] - began) for i, member in enumerate(members))


@pytest.mark.parametrize("who", some([0, 1], [0]))
@pytest.mark.parametrize("fault", [pytest.param(f, marks=() if f == "raise" else slow) for f in FAULTS])
def test_one_failure_ends_all(fault: str, who: int, place: Path, config: Callable[..., Path]) -> None:
    ends = list(direct(place, config(f"fails-{fault}-{who}", **SETTINGS), fault, who))
    assert all(code != 0 for code, _ in ends), ends
    assert all(seconds < MOST for _, seconds in ends), ends


def test_processes_that_were_given_different_settings_say_so(
    place: Path, config: Callable[..., Path]
) -> None:
    config("agree", **SETTINGS)
    seed = "import os, sys, runpy; sys.argv.append('seed=' + os.environ['NTJAX_PROCESS_ID'])"
    program = f"{seed}; runpy.run_module('ntjax.train', run_name='__main__')"
    command = [sys.executable, "-c", program, "--config", "agree.toml"]
    ended = cold(place, ("launch", "--processes", "2", "--max-restarts", "2", "--", *command), devices(1))
    assert ended.code == 78
    assert "process 1 started with another config than process 0" in ended.err
    assert "here 'seed = 1', there 'seed = 0'" in ended.err
    assert "not started again" in ended.err


def test_a_process_that_does_not_come_is_named(place: Path, config: Callable[..., Path]) -> None:
    place_of = "--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "3", "--process-id", "0"
    alone = "train", "--config", str(config("waits", **SETTINGS)), *place_of, "timeouts.start=2"
    ended = cold(place, alone, devices(1))
    assert ended.code == 76
    assert "process 1, 2 of 3 did not come in 2 s" in ended.err


def test_half_a_place_is_refused(ntjax: Callable[..., Result], config: Callable[..., Path]) -> None:
    ended = ntjax("train", "--config", config("half", **SETTINGS), "--process-id", "1")
    assert ended.code == 78
    assert "give all three" in ended.err
