"""A process that calls one reward function.

It answers requests one by one, each answer under the request's number and as JSON: nothing that user code made is
unpickled by the trainer. What the function prints goes to the parent's ear, and what it forks ends when the function
does.
"""

from __future__ import annotations

import json
import os
import select
import signal
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ntjax.errors import UserError
from ntjax.rewards.contract import Answer, blame, call, find, label, taken

CHECKED = 2  # rows of a first call


def main(reads: int, writes: int, name: str, folder: str, where: str | None) -> None:
    """Finds the function, then serves until the other end is closed."""
    threading.Thread(target=_leave_with_parent, args=(reads,), daemon=True).start()
    requests, answers = Connection(reads, writable=False), Connection(writes, readable=False)
    try:
        function = find(name, Path(folder), where)
    except UserError as error:
        told = [type(error).__name__, error.message, error.where, error.fix]
        answers.send_bytes(_line(0, {"error": told}))
        return
    answers.send_bytes(_line(0, {"label": label(function)}))
    names, mine = taken(function), os.getpid()
    while True:
        try:
            number, kind, given = requests.recv()
        except EOFError:
            return
        answer = _served(number, function, names, kind, given)
        if os.getpid() != mine:  # a child that the function forked and never ended
            os._exit(0)
        answers.send_bytes(answer)


def _served(number: int, function: Any, names: Mapping[str, Any], kind: str, given: Any) -> bytes:
    try:
        if kind == "state":
            kept = function.state_dict() if hasattr(function, "state_dict") else None
            return _line(number, {"state": kept}, strict=True)
        return _line(number, {"answer": vars(_answer(function, names, kind, given))})
    except (Exception, SystemExit) as error:
        return _line(number, {"answer": {"wrong": blame(error)}})


def _answer(function: Any, names: Mapping[str, Any], kind: str, given: Any) -> Answer:
    remembers = hasattr(function, "state_dict")
    if kind == "load":
        function.load_state_dict(given)
        return Answer()
    if kind == "check":
        before = function.state_dict() if remembers else None
        answer = call(function, names, given.first(CHECKED))
        if remembers:
            function.load_state_dict(before)
        return answer
    return call(function, names, given)


def _line(number: int, said: dict[str, Any], *, strict: bool = False) -> bytes:
    return json.dumps({"number": number, **said}, default=None if strict else _plain).encode()


def _plain(value: Any) -> Any:
    """What a function logs, as JSON can hold it: arrays as lists, anything else as its text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _leave_with_parent(reads: int) -> None:
    """Ends this process and what it started when the trainer is gone, whatever the function is at."""
    requests = select.poll()
    requests.register(reads, 0)
    requests.poll()
    os.killpg(0, signal.SIGKILL)
