"""The wheel: built without a network, and used from an empty folder with nothing of the source in reach."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ntjax import __version__

ROOT = Path(__file__).parents[1]
BUILD = ("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir")
Run = Callable[..., str]


def pip(*args: object) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, args)], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: building leaves folders in the source."""
    pytest.importorskip("setuptools")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "ntjax", source / "ntjax", ignore=shutil.ignore_patterns("__pycache__"))
    pip(*BUILD, out, source)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run("init", "sft"): what `ntjax` of the wheel prints, in an empty folder."""
    installed, empty = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("empty")
    pip("install", "--no-deps", "--no-index", "--quiet", "--target", installed, wheel)
    env = {**os.environ, "PYTHONPATH": str(installed)}

    def run(*args: str, program: tuple[str, ...] = ("-m", "ntjax")) -> str:
        command = [sys.executable, *program, *args]
        ran = subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True, timeout=60)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    where = run(program=("-c", "import ntjax; print(ntjax.__file__)"))
    assert Path(where.strip()).is_relative_to(installed)
    return run


def test_it_has_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "ntjax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == files
    assert "ntjax/py.typed" in held


def test_its_metadata_is_the_projects(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with zipfile.ZipFile(wheel) as held:
        (name,) = (name for name in held.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = held.read(name).decode()
        entries = held.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert f"Version: {__version__}\n" in metadata
    assert f"Summary: {project['description']}\n" in metadata
    for extra in project["optional-dependencies"]:
        assert f"Provides-Extra: {extra}\n" in metadata
    assert "ntjax = ntjax.__main__:main" in entries
    assert "# ntjax" in metadata  # the README


def test_it_works_from_an_empty_folder(run: Run) -> None:
    assert run("--version").strip() == __version__
    assert "The first five minutes" in run("--help")
    assert "sft.toml" in run("init", "sft")
    assert json.loads(run("schema"))["title"] == "ntjax config"
    assert run("init", "vlm", "--out", "deep/vlm.toml")
    loaded = "from ntjax.config import load_config; print(load_config('sft.toml').task_name)"
    assert run(program=("-c", loaded)).strip() == "sft"


def test_the_changelog_begins_with_this_version() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    first = next(line for line in lines if line.startswith("## [") and "Unreleased" not in line)
    assert first.startswith(f"## [{__version__}]")
