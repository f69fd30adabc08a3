"""Rewards that misbehave: each gets its documented answer, and the next call is right."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ntjax.errors import ConfigError, UserCodeError
from ntjax.rewards import Batch, Rewards

MISBEHAVING = '''
import math, os, re, sys, time

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

async def later(prompts, completions, **kwargs):
    import asyncio
    await asyncio.sleep(0)
    return [2.0 for _ in completions]

def trl(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **kwargs):
    log_extra("right", answer)
    log_metric("mean_length", sum(map(len, completion_ids)) / len(completion_ids))
    assert set(kwargs) == {"level"}
    return [float(turns[0]["content"] == a) + trainer_state.global_step for turns, a in zip(completions, answer)]

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
    "nan": r"row 0: its reward is nan",
    "inf": r"row 1: its reward is inf",
    "text": r"returned '1\.0'; allowed is a list of 2 numbers",
    "texts": r"row 0: its reward is '3\.0'",
    "short": r"returned 1 rewards for 2 completions",
    "scalar": r"returned 1\.0; allowed",
    "nothing": r"returned None; allowed",
    "exits": r"ended with exit code 3; it printed last: about to leave",
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
    asked = rewards("trl", "good", "later")
    assert asked.labels == ["trl", "good", "later"]
    batch = Batch(
        prompts=[[{"role": "user", "content": "?"}]] * 2,
        completions=[[{"role": "assistant", "content": text}] for text in ("5", "66")],
        completion_ids=[[1], [1, 2]],
        columns={"answer": ["5", "6"], "level": [1, 2]},
        state={"global_step": 10},
    )
    asked.check(batch)
    found = asked.submit(batch).result()
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


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mine.py:absent", "no function absent"),
        ("mine.py:neither", r"takes text, target"),
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
