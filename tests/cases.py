"""Cases of a test, of which the default run takes a few."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some(cases: Iterable[Any], kept: Collection[Any], slow: Collection[Any] = ()) -> list[Any]:
    """All cases, the `slow` ones left to CI and those that are neither they nor `kept` marked as more of the same."""

    def marked(case: Any) -> Any:
        if case in kept:
            return case
        return pytest.param(case, marks=pytest.mark.slow if case in slow else pytest.mark.more)

    return [marked(case) for case in cases]
