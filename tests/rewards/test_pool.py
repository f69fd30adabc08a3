"""Rewards that misbehave: each gets its documented answer, and the next call is right."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ntjax.errors import ConfigError, UserCodeError
from ntjax.rewards import Batch, Rewards

MISBEHAVING = '''
import asyncio, ctypes, json, math, os, re, signal, sys, time

def good(prompts, responses):
    return [float(len(text)) for text in responses]

def on(word):
    """Misbehaves where a completion is this word, else gives lengths."""
    def wrap(act):
        def reward(prompts, responses):
            lengths = [float(len(text)) for text in responses]
            return act(lengths) if word in responses else lengths
        reward.__name__ = act.__name__
        return reward
    return wrap

@on("bad")
def raises(lengths):
    raise ValueError("no such luck")

@on("bad")
def raises_in_a_library(lengths):
    return json.loads("{")

@on("bad")
def raises_like_a_timeout(lengths):
    raise ValueError("it took longer than I thought")

@on("bad")
def nan(lengths):
    return [math.nan, *lengths[1:]]

@on("bad")
def inf(lengths):
    return [*lengths[:-1], math.inf]

@on("bad")
def abstains(lengths):
    return [None, *lengths[1:]]

@on("bad")
def text(lengths):
    return "1.0"

@on("bad")
def texts(lengths):
    return [str(length) for length in lengths]

@on("bad")
def short(lengths):
    return lengths[1:]

@on("bad")
def scalar(lengths):
    return 1.0

@on("bad")
def unordered(lengths):
    return {1.0, 2.0}

@on("bad")
def nothing(lengths):
    return None

@on("bad")
def hangs(lengths):
    while True:
        time.sleep(1)

@on("bad")
def hangs_in_c(lengths):
    re.match(r"(a+)+$", "a" * 64 + "b")

@on("bad")
def exits(lengths):
    print("about to leave", flush=True)
    os._exit(3)

@on("bad")
def crashes(lengths):
    ctypes.string_at(0)

@on("bad")
def is_killed(lengths):
    os.kill(os.getpid(), signal.SIGKILL)

@on("bad")
def forks(lengths):
    if os.fork() == 0:
        return [-1.0] * len(lengths)
    return lengths

@on("bad")
def floods(lengths):
    for _ in range(20000):
        print("x" * 1000)
        print("y" * 100, file=sys.stderr)
    return lengths

class Remembers:
    def __init__(self):
        self.calls = 0
    def __call__(self, prompts, responses):
        self.calls += 1
        return [float(self.calls)] * len(prompts)
    def state_dict(self):
        return {"calls": self.calls}
    def load_state_dict(self, state):
        self.calls = state["calls"]

class KeepsNothingPlain(Remembers):
    def state_dict(self):
        return {"calls": object()}

class ForgetsHow(Remembers):
    def load_state_dict(self, state):
        raise KeyError("calls")

class NeedsMore(Remembers):
    def __init__(self, weight):
        self.weight = weight

class IsNotCalled:
    pass

class Later:
    """As a client of a judge: belongs to the loop it was first used in."""
    loop = None
    async def __call__(self, prompts, completions, **kwargs):
        self.loop = self.loop or asyncio.get_running_loop()
        assert self.loop is asyncio.get_running_loop()
        await asyncio.sleep(0)
        return [2.0 for _ in completions]

def trl(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **kwargs):
    for right in answer:
        log_extra("right", [right])
    log_metric("mean_length", sum(map(len, completion_ids)) / len(completion_ids))
    assert set(kwargs) == {"level"}
    return [float(turns[0]["content"] == a) + trainer_state.global_step for turns, a in zip(completions, answer)]

def logs(prompts, completions, log_extra, **kwargs):
    log_extra(column="objects", values=[IsNotCalled() for _ in completions])
    return [float(completion == "mine") for completion in completions]

def asks_for_more(prompts, completions, answer, level=1):
    return [0.0] * len(prompts)

def neither(text, target):
    return []
'''
LIMIT = 0.6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards")
    (path / "mine.py").write_text(MISBEHAVING)
    return path


@pytest.fixture
def rewards(folder: Path) -> Iterator[Callable[..., Rewards]]:
    opened = []

    def rewards(*names: str, **options: Any) -> Rewards:
        named = [name if ":" in name or "(" in name else f"mine.py:{name}" for name in names]
        opened.append(Rewards(named, folder, where="run.toml:7", **{"timeout": LIMIT, **options}))
        return opened[-1]

    yield rewards
    for each in opened:
        each.close()


def texts(*completions: str) -> Batch:
    return Batch(["?"] * len(completions), list(completions), [[1]] * len(completions))


def scores(rewards: Rewards, *completions: str) -> list[Any]:
    return rewards.submit(texts(*completions)).result().scores[:, 0].tolist()


WRONG = {
    "raises": r"ValueError at .*mine\.py:\d+: no such luck",
    "raises_in_a_library": r"JSONDecodeError at .*mine\.py:\d+: Expecting property",
    "raises_like_a_timeout": r"ValueError at .*mine\.py:\d+: it took longer",
    "nan": r"row 0: its reward is nan",
    "inf": r"row 1: its reward is inf",
    "text": r"returned '1\.0'; allowed is a list of 2 numbers",
    "texts": r"row 0: its reward is '3\.0'",
    "short": r"returned 1 rewards for 2 completions",
    "scalar": r"returned 1\.0; allowed",
    "unordered": r"returned \{1\.0, 2\.0\}; allowed",
    "nothing": r"returned None; allowed",
    "exits": r"ended with exit code 3; it printed last: about to leave",
    "crashes": r"ended with SIGSEGV",
    "is_killed": r"ended with SIGKILL",
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_ends_the_run_and_is_told(name: str, rewards: Callable[..., Rewards]) -> None:
    asked = rewards(name)
    assert scores(asked, "a", "bb") == [1, 2]
    with pytest.raises(UserCodeError, match=WRONG[name]) as error:
        scores(asked, "bad", "bb")
    assert error.value.where == "run.toml:7"
    assert name in str(error.value)


@pytest.mark.parametrize("name", WRONG)
def test_with_mask_its_rows_count_for_nothing_and_the_next_call_is_right(
    name: str, rewards: Callable[..., Rewards]
) -> None:
    asked = rewards(name, on_error="mask", budget=1)
    assert np.isnan(scores(asked, "bad", "bb")).all()
    assert scores(asked, "a", "bb") == [1, 2]
    with pytest.raises(UserCodeError, match=r"call 2 that failed; 1 may"):
        scores(asked, "bad", "bb")


@pytest.mark.parametrize("name", ["hangs", "hangs_in_c"])
def test_a_hang_costs_the_time_limit_and_no_more(name: str, rewards: Callable[..., Rewards]) -> None:
    asked = rewards(name, budget=1)
    assert scores(asked, "a", "bb") == [1, 2]
    began = time.monotonic()
    assert np.isnan(scores(asked, "bad", "bb")).all()
    assert LIMIT <= time.monotonic() - began < LIMIT + 1
    assert scores(asked, "a", "bb") == [1, 2]
    with pytest.raises(UserCodeError, match=r"longer than 0\.6 s"):
        scores(asked, "bad", "bb")


def test_one_that_abstains_is_left_out_of_that_row(rewards: Callable[..., Rewards]) -> None:
    found = scores(rewards("abstains"), "bad", "bb")
    assert np.isnan(found[0])
    assert found[1] == 2


@pytest.mark.parametrize("name", ["forks", "floods"])
def test_forks_and_floods_change_nothing(
    name: str, rewards: Callable[..., Rewards], capfd: pytest.CaptureFixture[str]
) -> None:
    asked = rewards(name, timeout=20.0)
    for _ in range(3):
        assert scores(asked, "bad", "bb") == [3, 2]
        assert scores(asked, "a", "bb") == [1, 2]
    assert capfd.readouterr() == ("", "")
    assert sum(map(len, asked.workers[0].printed)) <= 64 * 1024


def test_trl_s_form_gets_columns_ids_and_the_loggers(rewards: Callable[..., Rewards]) -> None:
    asked = rewards("trl", "good", "Later")
    assert asked.labels == ["trl", "good", "Later"]
    batch = Batch(
        prompts=[[{"role": "user", "content": "?"}]] * 2,
        completions=[[{"role": "assistant", "content": text}] for text in ("5", "66")],
        completion_ids=[[1], [1, 2]],
        columns={"answer": ["5", "6"], "level": [1, 2]},
        state={"global_step": 10},
    )
    asked.check(batch)
    found = asked.submit(batch).result()  # the second call of each
    assert found.scores.tolist() == [[11, 1, 2], [10, 2, 2]]
    assert found.extra == {"right": ["5", "6"]}
    assert found.metrics == {"mean_length": [1.5]}


def test_what_a_reward_remembers_goes_on_in_another_process(rewards: Callable[..., Rewards]) -> None:
    first = rewards("Remembers")
    first.check(texts("a"))  # is forgotten
    assert scores(first, "a") == [1]
    assert scores(first, "a") == [2]
    second = rewards("Remembers")
    second.load_state(first.state())
    assert scores(second, "a") == [3]


@pytest.mark.parametrize("name", ["KeepsNothingPlain", "ForgetsHow"])
def test_a_state_that_can_t_be_kept_ends_the_run(name: str, rewards: Callable[..., Rewards]) -> None:
    asked = rewards(name)
    with pytest.raises(UserCodeError, match=rf"{name} was .* its state_dict: it raised (TypeError|KeyError)"):
        asked.load_state(asked.state())


def test_columns_never_take_the_place_of_what_was_drawn(rewards: Callable[..., Rewards]) -> None:
    batch = Batch(["?"], ["mine"], [[1]], {"completions": ["the data's"], "prompts": ["the data's"]})
    found = rewards("logs").submit(batch).result()
    assert found.scores.tolist() == [[1]]
    assert "IsNotCalled object" in found.extra["objects"][0]  # as text: nothing of theirs is unpickled


def test_a_column_that_the_data_lack_is_a_config_error(rewards: Callable[..., Rewards]) -> None:
    batch = Batch(["?"], ["a"], [[1]], {"solution": ["a"]})
    with pytest.raises(
        ConfigError, match=r"takes answer, which the data don't have; their columns: solution"
    ):
        rewards("asks_for_more").check(batch)


def test_batches_wait_for_one_another(rewards: Callable[..., Rewards]) -> None:
    asked = rewards("good", "good", "good")
    waiting = [asked.submit(texts(*["a" * n] * n)) for n in range(1, 6)]
    assert [each.result().scores.tolist() for each in waiting] == [[[n] * 3] * n for n in range(1, 6)]


def test_a_function_that_hangs_ends_with_the_trainer(folder: Path) -> None:
    trainer = (
        "import os, pathlib; from ntjax.rewards import Batch, Rewards\n"
        f"rewards = Rewards(['mine.py:hangs'], pathlib.Path({str(folder)!r}))\n"
        "rewards.submit(Batch(['?'], ['bad'], [[1]]))\n"
        "print(rewards.workers[0].process.pid, flush=True); os._exit(0)"
    )
    ran = subprocess.run([sys.executable, "-c", trainer], capture_output=True, text=True, check=True)
    ends = time.monotonic() + 10
    while running(int(ran.stdout)) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not running(int(ran.stdout))


def running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mine.py:absent", "no function absent"),
        ("mine.py:neither", r"takes text, target"),
        ("mine.py:NeedsMore", r"needs weight to be made"),
        ("mine.py:IsNotCalled", r"has no __call__"),
        ("absent.py:good", "no file absent.py"),
        ("numeri", "did|no reward"),
        ("length(1", "can't be read"),
    ],
)
def test_a_reward_that_isn_t_there_is_a_config_error(
    name: str, said: str, rewards: Callable[..., Rewards]
) -> None:
    with pytest.raises(ConfigError, match=said):
        rewards(name if "(" in name or ":" in name else f"{name}()")


def test_functions_run_beside_one_another_and_beside_the_caller(
    folder: Path, rewards: Callable[..., Rewards]
) -> None:
    (folder / "slow.py").write_text(
        "import time\ndef slow(prompts, responses):\n    time.sleep(0.5)\n    return [1.0] * len(prompts)\n"
    )
    asked = rewards("slow.py:slow", "slow.py:slow", timeout=5.0)
    began = time.monotonic()
    pending = asked.submit(texts("a"))
    assert time.monotonic() - began < 0.2
    pending.result()
    assert time.monotonic() - began < 0.9
