"""A judge's columns: in the order of the config, under names of their own."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np

from ntjax.judge import Judge
from ntjax.rewards import Batch

BATCH = Batch(["p", "q"], ["a", "b"], [[1], [2]])


def functions(*labels: str) -> Any:
    """Functions whose scores are 10, 11 for the first, 20, 21 for the second, and so on."""
    scores = np.array([[10.0 * (n + 1) + row for n in range(len(labels))] for row in range(2)])

    def submit(batch: Batch) -> Future[Any]:
        found: Future[Any] = Future()
        found.set_result(SimpleNamespace(scores=scores, extra={}, metrics={}, failures=[]))
        return found

    return SimpleNamespace(labels=list(labels), submit=submit)


class Model:
    """Scores 1, 2."""

    def __init__(self, label: str):
        self.label = label

    def __call__(self, prompts: Any, completions: Any) -> np.ndarray:
        return np.array([1.0, 2.0], np.float32)


def test_columns_are_in_the_order_of_their_weights() -> None:
    """A model before a function: reward_weights go by the config, not by what a reward is."""
    judge = Judge(functions("numeric"), [Model("judge")], order=[1, 0])  # type: ignore[list-item]
    verdict = judge.submit(BATCH)()
    assert verdict.labels == judge.labels == ("judge", "numeric")
    np.testing.assert_array_equal(verdict.scores, [[1, 10], [2, 11]])
    np.testing.assert_allclose(verdict.totals([0.5, 2.0]), [20.5, 23])


def test_what_nears_the_limit_is_punished_in_the_last_column() -> None:
    judge = Judge(functions("a", "b"), [Model("c")], (4, 2), order=[0, 2, 1])  # type: ignore[list-item]
    assert judge.labels == ("a", "c", "b", "soft_overlong_punishment")
    np.testing.assert_array_equal(judge.submit(BATCH)().scores[0, :3], [10, 1, 20])


def test_rewards_of_one_name_are_told_apart() -> None:
    judge = Judge(functions("format", "format"), [Model("format")])  # type: ignore[list-item]
    assert judge.labels == ("format", "format_2", "format_3")
    assert set(judge.submit(BATCH)().metrics) >= {f"rewards/{label}/mean" for label in judge.labels}
