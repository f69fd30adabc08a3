"""Imports run one way, and nothing heavy is imported where a command must start fast."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "ntjax"
ABOVE = {"models", "stages", "pipeline", "trainer", "loop", "sampler", "slots", "estimate"}
COMMANDS = {path.stem for path in ROOT.glob("*.py")} & {
    *("train", "plan", "inspect", "generate", "export", "import", "eval", "report", "launch", "__main__"),
    *("doctor", "init", "schema", "completion"),
}

# Package or module -> the parts of ntjax it may import, itself aside.
ONLY = {
    "errors": set(),
    "lookup": {"errors"},
    "marks": set(),
    "params": set(),
    "quantised": set(),
    "mesh": {"errors"},
    "narrow": set(),
    "turned": {"quantised"},
    "elsewhere": {"mesh"},
    "weights": {"narrow", "elsewhere", "turned", "quantised", "params", "mesh"},
    "layout": {"weights", "elsewhere", "turned", "quantised", "params", "mesh", "errors"},
    "parallel": {"layout", "elsewhere", "params", "mesh"},
    "metrics": {"errors"},
    "ops": {"weights", "narrow", "mesh", "errors", "config.remat"},
    "models": {"ops", "params", "weights", "elsewhere", "layout", "parallel", "mesh", "errors", "marks"},
    "losses": {"errors", "metrics", "ops.logprobs"},
    "data": {"errors", "marks"},
    "rewards": {"errors", "lookup"},
}
NEVER = {"torch", "trl", "peft", "bitsandbytes", "tests"}


def sources(part: str) -> list[Path]:
    """The files of a module or a package of ntjax."""
    return sorted((ROOT / part).rglob("*.py")) or [ROOT / f"{part}.py"]


def type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that can run: what only a type checker reads is left out."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not type_checking(child):
            yield from statements(child)


def imported(path: Path) -> set[str]:
    """The dotted names that a file imports, at its top or inside functions."""
    names: set[str] = set()
    for node in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} is relative"
            module = node.module or ""
            within = module == "ntjax" or (ROOT.parent / module.replace(".", "/")).is_dir()
            names |= {f"{module}.{alias.name}" for alias in node.names} if within else {module}
    return names


def parts(path: Path) -> set[str]:
    """What a file imports of ntjax, without the "ntjax."."""
    return {name.removeprefix("ntjax.") for name in imported(path) if name.startswith("ntjax.")}


def within(name: str, allowed: set[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in allowed)


@pytest.mark.parametrize("part", ONLY)
def test_a_part_imports_only_what_lies_below_it(part: str) -> None:
    for path in sources(part):
        stray = {name for name in parts(path) if not within(name, ONLY[part] | {part})}
        assert not stray, f"{path.relative_to(ROOT)} imports {sorted(stray)}"


def test_the_config_knows_no_model_and_no_stage() -> None:
    for path in sources("config"):
        stray = {name for name in parts(path) if within(name, ABOVE | COMMANDS)}
        assert not stray, f"{path.relative_to(ROOT)} imports {sorted(stray)}"


def test_stages_know_nothing_of_what_runs_them() -> None:
    for path in sources("stages"):
        stray = {name for name in parts(path) if within(name, {"trainer", "loop", "pipeline"} | COMMANDS)}
        assert not stray, f"{path.relative_to(ROOT)} imports {sorted(stray)}"


def test_nothing_imports_the_references() -> None:
    files = sorted(ROOT.rglob("*.py"))
    assert len(files) > 40
    for path in files:
        stray = {name for name in imported(path) if name.split(".")[0] in NEVER}
        assert not stray, f"{path.relative_to(ROOT)} imports {sorted(stray)}"


def test_the_config_is_read_without_jax_torch_transformers_or_datasets() -> None:
    barred = "sys.modules.update(dict.fromkeys(['jax', 'flax', 'torch', 'transformers', 'datasets']))"
    program = f"import sys; {barred}; import ntjax, ntjax.errors, ntjax.lookup, ntjax.config"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT.parent, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
