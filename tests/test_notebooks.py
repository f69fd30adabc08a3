"""The notebooks run from their first cell to their last, on a model of random weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.tiny import tiny_model

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
CURVES = {"01_quick_sft": 1, "02_dpo_curves": 1, "03_grpo_reward": 1, "04_inside": 1, "05_llava": 4}
# Warnings that Jupyter's own packages give.
JUPYTERS = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def read() -> dict[str, Any]:
    return {name: nbformat.read(FOLDER / f"{name}.ipynb", as_version=4) for name in NAMES}


def test_each_is_there_and_is_tested() -> None:
    assert list(CURVES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_files_are_valid_and_have_no_output(name: str, read: dict[str, Any]) -> None:
    book = read[name]
    nbformat.validate(book)
    assert (book.nbformat, book.nbformat_minor) >= (4, 5)
    assert len({cell.id for cell in book.cells}) == len(book.cells)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert f"blob/main/notebooks/{name}.ipynb" in book.cells[0].source
    assert all(len(cell.source.splitlines()) <= 40 for cell in code)


def test_all_set_up_in_the_same_way(read: dict[str, Any]) -> None:
    first = {next(cell.source for cell in book.cells if cell.cell_type == "code") for book in read.values()}
    assert len(first) == 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("notebooks") / "model")


@pytest.mark.slow
@JUPYTERS
@pytest.mark.parametrize("name", NAMES)
def test_all_cells_run(
    name: str, read: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NTJAX_QUICK", "1")
    monkeypatch.setenv("NTJAX_MODEL", str(model))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(model.parent / "compiled"))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    monkeypatch.delenv("XLA_FLAGS")
    book = read[name]
    NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    told = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in told if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in told) == CURVES[name]
    printed = "".join(output.text for output in told if output.output_type == "stream")
    assert set(re.findall(r"\w+Warning\b", printed)) <= {
        "TqdmWarning"
    }  # tqdm's, where ipywidgets isn't installed
