"""Rewards: functions of people's own or ready-made, called in processes of their own."""

from ntjax.rewards.contract import Batch
from ntjax.rewards.pool import Pending, Rewards, Scored

__all__ = ["Batch", "Pending", "Rewards", "Scored"]
