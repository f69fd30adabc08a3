"""Rewards for data/sums.jsonl, written as for TRL: keyword arguments, the data's columns by name."""

import re


def last_number(prompts, completions, answer, **kwargs):
    """1 where the last whole number of a completion is the answer, else 0."""
    rewards = []
    for completion, right in zip(completions, answer, strict=True):
        text = completion[0]["content"] if isinstance(completion, list) else completion
        numbers = re.findall(r"-?\d+", text)
        rewards.append(1.0 if numbers and numbers[-1] == right else 0.0)
    return rewards
