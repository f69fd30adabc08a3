"""ntjax without a command, --help of each, and completion."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ntjax.__main__ import COMMANDS, EXAMPLES, FIRST, GROUPS
from ntjax.completion import parser_of
from tests.cli.process import Result, cold

Ntjax = Callable[..., Result]
PROGRAM = [sys.executable, "-m", "ntjax"]


def test_help_teaches(tmp_path: Path) -> None:
    shown = cold(tmp_path, ("--help",), {}, PROGRAM)
    assert shown.code == 0, shown.err
    assert shown.out == cold(tmp_path, (), {}, PROGRAM).out
    for name, text in COMMANDS.items():
        assert f"  {name:12}{text}" in shown.out
    order = [shown.out.index(f"ntjax {name} {arguments}".rstrip()) for name, (arguments, _) in FIRST.items()]
    assert order == sorted(order)
    assert "docs/" in shown.out
    assert all(len(line) <= 120 for line in shown.out.splitlines())


def test_every_command_is_in_one_group() -> None:
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(COMMANDS)


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    barred = ["jax", "flax", "transformers", "datasets", "numpy", "rich", "yaml", "shtab"]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({barred}))\n"
        "from ntjax.__main__ import main\n"
        "for sys.argv[1:] in (['--help'], ['--version'], ['inspect', '--help'], ['doctor', '--help']): main()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_ends_with_an_example_that_it_takes(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ntjax.__main__ import explain

    monkeypatch.setenv("COLUMNS", "200")
    explain([name])
    shown = capsys.readouterr().out.rstrip()
    assert shown.startswith(f"usage: ntjax {name} ")
    example = shown.splitlines()[-1]
    assert example.startswith("  ")
    assert f"ntjax {name}" in example
    if name in EXAMPLES:
        parser = parser_of(name)
        given = shlex.split(example.partition(f"ntjax {name} ")[2])
        overrides = name in ("train", "plan")
        (parser.parse_intermixed_args if overrides else parser.parse_args)(given)


def test_help_after_two_dashes_is_another_commands(ntjax: Ntjax) -> None:
    ended = cold(Path.cwd(), ("launch", "--processes", "1", "--", *PROGRAM, "schema", "--help"), {}, PROGRAM)
    assert ended.code == 0, ended.err
    assert "JSON Schema" in ended.out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_flags(shell: str, ntjax: Ntjax) -> None:
    ended = ntjax("completion", shell)
    assert ended.code == 0, ended.err
    for name in COMMANDS:
        assert name in ended.out
    for flag in ("max-new-tokens", "topology", "resume"):
        assert flag in ended.out


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["ins"], ["inspect"]),
        (["inspect", "--st"], ["--stage"]),
        (["init", "pre"], ["pretrain"]),
        (["train", "--config", "ru"], ["run.toml"]),
    ],
)
def test_bash_completes(words: list[str], found: list[str], ntjax: Ntjax, tmp_path: Path) -> None:
    script = ntjax("completion", "bash").out
    (tmp_path / "run.toml").write_text("")
    line = " ".join(f"'{word}'" for word in ["ntjax", *words])
    asked = f"{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words)}; _shtab_ntjax; echo ${{COMPREPLY[@]}}"
    ran = subprocess.run(["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ran.stdout.split() == found, ran.stderr
