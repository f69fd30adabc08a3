"""A process that calls one reward function.

It answers requests one by one, each answer under the request's number. What the function prints goes to the parent's
ear, and what it forks ends when the function does.
"""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ntjax.errors import UserError
from ntjax.rewards.contract import Answer, call, find, label

CHECKED = 2  # rows of a first call


def main(reads: int, writes: int, name: str, folder: str, where: str | None) -> None:
    """Finds the function, then serves until the other end is closed."""
    requests, answers = Connection(reads, writable=False), Connection(writes, readable=False)
    try:
        function = find(name, Path(folder), where)
    except UserError as error:
        answers.send((0, error))
        return
    answers.send((0, label(function)))
    mine = os.getpid()
    while True:
        try:
            number, kind, given = requests.recv()
        except EOFError:
            return
        answer = _serve(function, kind, given, Path(folder))
        if os.getpid() != mine:  # a child that the function forked and never ended
            os._exit(0)
        answers.send((number, answer))


def _serve(function: Any, kind: str, given: Any, folder: Path) -> Any:
    remembers = hasattr(function, "state_dict")
    if kind == "state":
        return function.state_dict() if remembers else None
    if kind == "load":
        function.load_state_dict(given)
        return Answer()
    if kind == "check":
        before = function.state_dict() if remembers else None
        answer = call(function, given.first(CHECKED), folder)
        if remembers:
            function.load_state_dict(before)
        return answer
    return call(function, given, folder)
