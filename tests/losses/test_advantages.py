"""Rewards to advantages, with small numbers worked by hand; TRL's own code sees them in test_grpo_against_trl."""

from __future__ import annotations

import numpy as np
import pytest

from ntjax.losses.advantages import EPS, gae, group_advantages, overlong_penalty, whiten
from ntjax.metrics import finish

NONE = np.nan
ONE = np.ones(1)


def column(*scores: float) -> np.ndarray:
    """Of a single reward."""
    return np.array(scores)[:, None]


def test_a_group_s_rewards_less_their_mean_over_their_deviation() -> None:
    """1, 2, 3: mean 2, deviation 1; 5, 5, 5: none."""
    found = group_advantages(column(1, 2, 3, 5, 5, 5), ONE, 3, "group")
    away = 1 / (1 + EPS)
    np.testing.assert_allclose(found.advantages, [-away, 0, away, 0, 0, 0])
    np.testing.assert_array_equal(found.rewards, [1, 2, 3, 5, 5, 5])
    metrics = finish(found.metrics)
    assert metrics["reward"] == pytest.approx(3.5)
    assert metrics["reward_std"] == pytest.approx(np.std([1, 2, 3, 5, 5, 5], ddof=1))
    assert metrics["frac_reward_zero_std"] == 0.5


def test_scaled_by_the_batch_or_not_at_all() -> None:
    """0, 2 and 4, 8: means 1 and 6, the whole's deviation sqrt(35 / 3)."""
    scores, away = column(0, 2, 4, 8), np.array([-1, 1, -2, 2])
    np.testing.assert_allclose(group_advantages(scores, ONE, 2, "none").advantages, away)
    found = group_advantages(scores, ONE, 2, "batch")
    np.testing.assert_allclose(found.advantages, away / (np.sqrt(35 / 3) + EPS))
    assert finish(found.metrics)["frac_reward_zero_std"] == 0


def test_rewards_are_weighted_and_abstentions_count_nothing() -> None:
    """1 + 2 * 10; 3 alone; 2 * 20 alone; 0 + 0, which is a verdict."""
    scores = np.array([[1, 10], [3, NONE], [NONE, 20], [0, 0]])
    found = group_advantages(scores, np.array([1, 2]), 2, "none")
    np.testing.assert_array_equal(found.rewards, [21, 3, 40, 0])
    np.testing.assert_array_equal(found.advantages, [9, -9, 20, -20])


def test_what_no_reward_judged_has_no_part() -> None:
    """The first group's mean is 2; the only one judged of the second has nothing to be compared with."""
    scores = column(1, 3, NONE, 7, NONE, NONE)
    found = group_advantages(scores, ONE, 3, "group")
    away = 1 / (np.sqrt(2) + EPS)
    np.testing.assert_allclose(found.advantages, [-away, away, 0, 0, 0, 0])
    np.testing.assert_array_equal(found.rewards, [1, 3, NONE, 7, NONE, NONE])
    metrics = finish(found.metrics)
    assert metrics["reward"] == pytest.approx(11 / 3)
    assert metrics["frac_reward_zero_std"] == 0


def test_nothing_judged_is_nothing_learned_and_nothing_logged() -> None:
    found = group_advantages(column(NONE, NONE), ONE, 2, "group")
    np.testing.assert_array_equal(found.advantages, [0, 0])
    assert finish(found.metrics) == {"frac_reward_zero_std": 0}


def test_a_group_of_one_has_no_spread() -> None:
    """As happens in an evaluation."""
    found = group_advantages(column(1, 4), ONE, 1, "group")
    np.testing.assert_array_equal(found.advantages, [0, 0])
    assert finish(found.metrics)["frac_reward_zero_std"] == 1


def test_each_reward_normalised_and_then_their_sum() -> None:
    """Two rewards of different sizes say the same of the first group and the opposite of the second."""
    scores = np.array([[0, 0], [2, 200], [0, 200], [2, 0]], float)
    found = group_advantages(scores, np.array([1, 3]), 2, "group", "normalize_then_sum")
    small, large = 1 / (np.sqrt(2) + EPS), 100 / (np.sqrt(2) * 100 + EPS)
    sums = np.array([-small - 3 * large, small + 3 * large, -small + 3 * large, small - 3 * large])
    np.testing.assert_allclose(found.advantages, sums / (sums.std(ddof=1) + EPS))
    np.testing.assert_array_equal(found.rewards, [0, 602, 600, 2])


def test_the_punishment_of_long_completions() -> None:
    """None up to 100 - 20 tokens, then a twentieth a token, and 1 at the limit."""
    found = overlong_penalty(np.array([1, 80, 81, 95, 100, 120]), 100, 20)
    np.testing.assert_allclose(found, [0, 0, -0.05, -0.75, -1, -1])
    assert not np.signbit(found[:2]).any()  # -0 would be written as such


def test_gae_by_hand() -> None:
    """gamma 0.5, lambda 0.5. The first row from its end:

    t = 2: 4 - 1 = 3; t = 1: 0 + 0.5 * 1 - 2 + 0.25 * 3 = -0.75; t = 0: 1 + 0.5 * 2 - 3 + 0.25 * -0.75 = -1.1875.
    The second ends after one token: 2 - 1, whatever lies behind it.
    """
    rewards = np.array([[1.0, 0, 4], [2, 9, 9]])
    values = np.array([[3.0, 2, 1], [1, 9, 9]])
    mask = np.array([[True, True, True], [True, False, False]])
    advantages, returns = gae(rewards, values, mask, 0.5, 0.5)
    np.testing.assert_allclose(advantages, np.array([[-1.1875, -0.75, 3], [1, 0, 0]]))
    np.testing.assert_allclose(returns, np.array([[1.8125, 1.25, 4], [2, 0, 0]]))


def test_gae_between_its_extremes() -> None:
    """lambda 0: errors of one step; lambda 1: what is earned from there on less what was expected (eq. 17, 18)."""
    rewards, values = np.array([[1.0, 2, 3]]), np.array([[5.0, 7, 11]])
    mask = np.ones((1, 3), np.bool_)
    np.testing.assert_allclose(gae(rewards, values, mask, 1.0, 0.0)[0], [[1 + 7 - 5, 2 + 11 - 7, 3 - 11]])
    np.testing.assert_allclose(gae(rewards, values, mask, 1.0, 1.0)[0], [[6 - 5, 5 - 7, 3 - 11]])
    np.testing.assert_allclose(gae(rewards, values, mask, 1.0, 1.0)[1], [[6, 5, 3]])


def test_whitened_by_hand() -> None:
    """1, 2, 3: mean 2, variance 2 / 2 with Bessel's correction; 100 isn't in the mask."""
    x, mask = np.array([[1.0, 2], [3, 100]]), np.array([[True, True], [True, False]])
    np.testing.assert_allclose(whiten(x, mask), np.array([[-1.0, 0], [1, 0]]), atol=1e-7)
    np.testing.assert_allclose(whiten(2 * x, mask, shift_mean=False), np.array([[3.0, 4], [5, 0]]), atol=1e-7)


def test_whitening_one_number_or_none_is_finite() -> None:
    for mask in (np.array([[True, False]]), np.array([[False, False]])):
        np.testing.assert_array_equal(whiten(np.array([[3.0, 4.0]]), mask), [[0, 0]])
