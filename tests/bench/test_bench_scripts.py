"""The scripts that benchmarks.md and scaling.md are measured with run, on tiny models."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "scripts" / "bench"
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}  # of the devices, one is enough

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _compiled(tmp_path_factory):
    """What torch compiles is kept apart: a run that was killed leaves libraries behind that can't be loaded."""
    ENVIRONMENT["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("name", ["sampler", "compile", "input", "startup", "gpu"])
def test_every_row_of_a_table_can_be_measured(name):
    before = sorted((ROOT / "docs" / "bench").glob("*"))
    out = run(sys.executable, str(BENCH / f"{name}.py"), "--toy", "--rounds", "1")
    assert '"failed"' not in out
    assert sorted((ROOT / "docs" / "bench").glob("*")) == before, "--toy leaves nothing"


@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the [tpu] extra")
def test_plans_for_tpus_can_be_made():
    lines = run(sys.executable, str(BENCH / "tpu.py"), "--toy").splitlines()
    assert sum("| --- |" in line for line in lines) == 3
    assert any("all-gather along fsdp" in line for line in lines)


def test_a_gpu_machine_needs_python_alone(tmp_path):
    script = (str(BENCH / "gpu.sh"), "60", "--toy", "--only", "1b-dpo")
    done = subprocess.run(
        script,
        env={**ENVIRONMENT, "PYTHON": sys.executable, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_not_begun_in_time_is_told(tmp_path):
    out = run(sys.executable, str(BENCH / "gpu.py"), "--toy", "--seconds", "0", "--out", str(tmp_path))
    assert out.count("not run, for want of time") == 8
    assert not list(tmp_path.iterdir())
