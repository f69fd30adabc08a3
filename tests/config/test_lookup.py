"""Functions of users by name, and the stages by folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ntjax import lookup
from ntjax.errors import ConfigError, UserCodeError

REWARDS = """\
from __future__ import annotations
import functools, math
from os import system
from dataclasses import dataclass

LIMIT = 3

def brevity(prompts, responses):
    return [-float(len(response)) for response in responses]

@dataclass
class Scaled:
    factor: float = 1.0
    def __call__(self, prompts, responses):
        return [self.factor] * len(prompts)

def _hidden(prompts, responses):
    return []

half = functools.partial(brevity, [])
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The config's folder, with the working folder beside it."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "cwd").mkdir()
    (tmp_path / "configs" / "rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path / "configs"


@pytest.mark.parametrize("name", ["rewards.py:brevity", "rewards:brevity", "./rewards.py:brevity"])
def test_a_function_is_found_beside_the_config(folder: Path, name: str) -> None:
    assert lookup.function(name, folder)([""], ["abc"]) == [-3.0]


def test_an_absolute_path_is_found(folder: Path) -> None:
    assert lookup.function(f"{folder}/rewards.py:brevity", Path("/"))([""], ["abc"]) == [-3.0]


def test_classes_and_partial_functions_are_callables_too(folder: Path) -> None:
    assert lookup.function("rewards.py:Scaled", folder)(2.0)(["", ""], []) == [2.0, 2.0]
    assert lookup.function("rewards.py:half", folder)(["abc"]) == [-3.0]


def test_the_config_folder_comes_before_the_working_folder(folder: Path) -> None:
    Path("rewards.py").write_text("def brevity(): return 'cwd'")
    Path("other.py").write_text("def brevity(): return 'cwd'")
    assert lookup.function("rewards:brevity", folder)([""], ["abc"]) == [-3.0]
    assert lookup.function("other:brevity", folder)() == "cwd"


def test_a_dotted_module_is_a_path_below_the_folder(folder: Path) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "scores.py").write_text("def f(): return 1")
    assert lookup.function("mine.scores:f", folder)() == 1


def test_an_installed_module_comes_last(folder: Path) -> None:
    import yaml

    assert lookup.function("yaml:safe_dump", folder) is yaml.safe_dump


def test_a_users_file_never_takes_the_place_of_a_standard_module(folder: Path) -> None:
    Path("json.py").write_text("def loads(text): return 'mine'")
    assert lookup.function("json:loads", folder)("1") == "mine"
    assert sys.modules["json"] is json
    assert sys.path[-1] == str(Path.cwd())


def test_a_users_file_may_import_its_neighbours(folder: Path) -> None:
    (folder / "neighbour_of_rewards.py").write_text("ANSWER = 42")
    (folder / "asks.py").write_text("from neighbour_of_rewards import ANSWER\ndef f(): return ANSWER")
    assert lookup.function("asks.py:f", folder)() == 42


WRONG = {
    "no colon": ("brevity", "'brevity' is not a function's name"),
    "nothing before the colon": (":brevity", "is not a function's name"),
    "private": ("rewards.py:_hidden", "'_hidden' can't be used: name a public function"),
    "dunder": ("rewards.py:__builtins__", "can't be used"),
    "dotted": ("rewards.py:Scaled.factor", "can't be used"),
    "misspelt": ("rewards.py:brevty", "rewards.py has no function brevty; it has brevity, Scaled"),
    "not callable": ("rewards.py:LIMIT", "rewards.py:LIMIT is not a function but int"),
    "a module": ("rewards.py:math", "is not a function but module"),
    "standard, re-exported": ("rewards.py:system", "rewards.py:system is Python's own"),
    "standard": ("os:system", "os is one of Python's own modules"),
    "builtin": ("builtins:eval", "builtins is one of Python's own modules"),
    "standard, dotted": ("os.path:join", "os.path is one of Python's own modules"),
    "missing file": ("reward.py:f", "there is no file reward.py: looked in"),
    "missing module": (
        "no_such_module:f",
        "there is no module no_such_module: looked for no_such_module.py in",
    ),
    "missing package": ("no_such.module:f", "there is no module no_such.module"),
}


@pytest.mark.parametrize(("name", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_name_is_a_config_error_at_its_setting(folder: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        lookup.function(name, folder, "run.toml:9")
    assert caught.value.exit_code == 78
    assert caught.value.where == "run.toml:9"
    assert message in str(caught.value)


def test_a_syntax_error_in_a_users_file_names_its_line(folder: Path) -> None:
    (folder / "broken.py").write_text("x = 1\ndef f(:\n")
    with pytest.raises(ConfigError, match="not Python: invalid syntax") as caught:
        lookup.function("broken.py:f", folder, "run.toml:9")
    assert caught.value.where == f"{folder}/broken.py:2"


@pytest.mark.parametrize("line", ["1 / 0", "import no_such_module", "raise SystemExit(0)"])
def test_what_a_users_file_raises_names_its_line(folder: Path, line: str) -> None:
    (folder / "raises.py").write_text(f"x = 1\n\n{line}\n")
    with pytest.raises(UserCodeError, match="importing the file raised") as caught:
        lookup.function("raises.py:f", folder)
    assert caught.value.where == f"{folder}/raises.py:3"
    assert caught.value.exit_code == 70


def test_the_stages_are_the_files_with_options() -> None:
    assert lookup.stage_types() == ("dpo", "grpo", "ppo", "pretrain", "reward", "sft")
    assert lookup.stage_options("sft").__module__ == "ntjax.stages.sft"
