"""Cases of a test, of which the default run takes a few."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some(cases: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """All cases, those that aren't `kept` marked as more of the same."""
    return [case if case in kept else pytest.param(case, marks=pytest.mark.more) for case in cases]
