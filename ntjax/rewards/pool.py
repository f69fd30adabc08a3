"""Reward functions in processes of their own, each with a time limit that holds.

A signal or a thread can't stop a function that hangs in C: its process is killed, with all that it started, and the
next call has a new one. Calls run beside one another and beside the device.

Axes: N completions, F functions.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from ntjax import errors
from ntjax.errors import ConfigError, UserCodeError
from ntjax.rewards.contract import Answer, Batch

KEPT = 64  # pieces of 1 kB of what a function prints
START = 120.0  # seconds for a process to import what its function needs
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """`scores` [N, F] float64, NaN where a function abstained or failed; what functions logged; what went wrong."""

    scores: np.ndarray
    extra: dict[str, list[Any]]
    metrics: dict[str, list[float]]
    failures: list[str]


class Worker:
    """The process of one function; `saved` is what it goes on from when it has to be started anew."""

    def __init__(self, name: str, folder: Path, where: str | None):
        self.name, self.folder, self.where = name, folder, where
        self.saved: Any = None
        self.number = 0
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward")
        self.start()

    def start(self) -> None:
        """Starts the process, which finds the function; `label` waits for that."""
        ours, theirs = os.pipe(), os.pipe()
        code = f"import sys; sys.path[:] = {sys.path!r}; from ntjax.rewards.worker import main; "
        code += f"main({ours[0]}, {theirs[1]}, {self.name!r}, {str(self.folder)!r}, {self.where!r})"
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(ours[0], theirs[1]),
            env={**os.environ, "JAX_PLATFORMS": "cpu"},  # the accelerator is the trainer's
            start_new_session=True,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self.requests = Connection(ours[1], readable=False)
        self.answers = Connection(theirs[0], writable=False)
        # Read all the time: a full pipe would stop a function that prints.
        self.printed: deque[bytes] = deque(maxlen=KEPT)
        self.ear = threading.Thread(target=_listen, args=(self.process.stdout, self.printed), daemon=True)
        self.ear.start()
        self.found, self.runs = False, True

    def label(self) -> str:
        """The function's name, once it is found; raises what finding it raised."""
        told = self._told(0, START)
        if isinstance(told, Answer):
            raise UserCodeError(f"{self.name}: {told.wrong}", where=self.where)
        if "error" in told:
            kind, message, where, fix = told["error"]
            raise getattr(errors, kind)(message, where=where, fix=fix)
        self.found = True
        return str(told["label"])

    def submit(self, kind: str, given: Any, timeout: float) -> Future[Any]:
        """`ask`, after what was asked before and beside the caller."""
        return self.thread.submit(self.ask, kind, given, timeout)

    def ask(self, kind: str, given: Any, timeout: float) -> Any:
        """The function's answer, or its state; an `Answer` that says what went wrong where there is none in time."""
        if self.runs and self.process.poll() is not None:
            self.kill()
        if not self.runs:
            self.start()
        if not self.found:
            self.label()
            loaded = self._asked("load", self.saved, timeout) if self.saved is not None else Answer()
            if loaded.wrong:
                return loaded
        return self._asked(kind, given, timeout)

    def kill(self) -> None:
        """Ends the process and all that it started."""
        if not self.runs:
            return
        self.runs = False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.ear.join(1)
        self.requests.close()
        self.answers.close()

    def close(self) -> None:
        """Ends the process for good."""
        self.thread.shutdown(wait=False, cancel_futures=True)
        self.kill()

    def _asked(self, kind: str, given: Any, timeout: float) -> Any:
        self.number += 1
        try:
            self.requests.send((self.number, kind, given))
        except OSError:
            return self._ended()
        told = self._told(self.number, timeout)
        if isinstance(told, Answer):
            return told
        return told["state"] if "state" in told else Answer(**told["answer"])

    def _told(self, number: int, timeout: float) -> Any:
        """What the process says to the request of this number; an `Answer` where it says nothing."""
        try:
            if not self.answers.poll(timeout):
                self.kill()
                return Answer(wrong=f"it took longer than {timeout:g} s", late=True)
            told = json.loads(self.answers.recv_bytes())
        except (EOFError, OSError):
            return self._ended()
        assert told["number"] == number, f"an answer to call {told['number']}, not {number}"
        return told

    def _ended(self) -> Answer:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)  # its own end, rather than the one it is put to
        self.kill()
        code = self.process.returncode
        how = f"exit code {code}" if code >= 0 else f"{signal.Signals(-code).name}"
        last = b"".join(self.printed).decode(errors="replace").strip().splitlines()[-3:]
        said = f"; it printed last: {' | '.join(last)}" if last else ""
        return Answer(wrong=f"its process ended with {how}{said}")


class Pending:
    """A batch that functions are at work on."""

    def __init__(self, rewards: Rewards, batch: Batch, futures: Sequence[Future[Any]]):
        self._rewards, self._batch, self._futures = rewards, batch, futures

    def result(self) -> Scored:
        """Waits for all. Raises UserCodeError for what a function did wrong, as `on_error` and the budget say."""
        answers = [future.result() for future in self._futures]
        return self._rewards.scored(answers, len(self._batch.prompts))


class Rewards:
    """Reward functions by name (see `contract.find`), seen from a config in `folder`. `close` them in the end.

    A call has `timeout` seconds. One that hangs counts for nothing: its rows are NaN. What a function raises or gives
    back wrong ends the run, or with `on_error` "mask" counts for nothing as well. More than `budget` such calls
    end the run in any case.

    Raises ConfigError or UserCodeError where a function can't be found, at `where`.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        *,
        where: str | None = None,
        timeout: float = 60.0,
        on_error: str = "raise",
        budget: int = 10,
    ):
        self.where, self.timeout, self.on_error, self.budget = where, timeout, on_error, budget
        self.failed = 0
        self.workers = [Worker(name, folder, where) for name in names]
        try:
            self.labels = [worker.label() for worker in self.workers]
        except BaseException:
            self.close()
            raise

    def check(self, batch: Batch) -> None:
        """Calls every function on the first rows of a batch; raises UserCodeError for what goes wrong, ConfigError
        where a function takes what the data don't have.

        A function that remembers (`state_dict`, `load_state_dict`) forgets this call.
        """
        for label, answer in zip(self.labels, self._ask("check", batch), strict=True):
            if answer.wrong:
                self.close()
                kind = ConfigError if answer.astray else UserCodeError
                raise kind(f"reward {label}, tried out on two rows: {answer.wrong}", where=self.where)

    def submit(self, batch: Batch) -> Pending:
        """Sets all functions to work on a batch, each on the whole of it."""
        return Pending(self, batch, [worker.submit("call", batch, self.timeout) for worker in self.workers])

    def scored(self, answers: Sequence[Answer], count: int) -> Scored:
        """Answers as arrays, or the error they are."""
        columns: list[list[float]] = []
        extra: dict[str, list[Any]] = {}
        metrics: dict[str, list[float]] = {}
        failures: list[str] = []
        for label, answer in zip(self.labels, answers, strict=True):
            columns.append(answer.scores if not answer.wrong else [np.nan] * count)
            extra |= answer.extra
            for name, values in answer.metrics.items():
                metrics.setdefault(name, []).extend(values)
            if answer.wrong:
                failures.append(f"reward {label}: {answer.wrong}")
                self._count(failures[-1], fatal=self.on_error == "raise" and not answer.late)
        return Scored(np.array(columns, np.float64).T, extra, metrics, failures)

    def state(self) -> dict[str, Any]:
        """What the functions remember, by name: plain JSON. Raises UserCodeError where it can't be had."""
        for worker, told in zip(self.workers, self._ask("state", None), strict=True):
            if isinstance(told, Answer):
                raise self._lost(f"{worker.name} was asked for its state_dict: {told.wrong}")
            worker.saved = told
        return {worker.name: worker.saved for worker in self.workers if worker.saved is not None}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Functions go on from what they remembered. Raises UserCodeError where one doesn't take it."""
        for worker in self.workers:
            if worker.name in state:
                worker.saved = state[worker.name]
                told = worker.submit("load", worker.saved, self.timeout).result()
                if told.wrong:
                    raise self._lost(f"{worker.name} was given its state_dict: {told.wrong}")

    def close(self) -> None:
        """Ends the processes."""
        for worker in self.workers:
            worker.close()

    def _ask(self, kind: str, given: Any) -> list[Any]:
        futures = [worker.submit(kind, given, self.timeout) for worker in self.workers]
        return [future.result() for future in futures]

    def _count(self, failure: str, *, fatal: bool) -> None:
        self.failed += 1
        if not fatal and self.failed <= self.budget:
            log.warning("warning: %s; its rows count for nothing", failure)
            return
        self.close()
        often = f" (call {self.failed} that failed; {self.budget} may)" if self.failed > 1 else ""
        raise UserCodeError(
            f"{failure}{often}",
            where=self.where,
            fix='mend the function; reward_errors = "mask" passes over what it can\'t judge, '
            "reward_timeout gives it more time",
        )

    def _lost(self, message: str) -> UserCodeError:
        self.close()
        return UserCodeError(message, where=self.where, fix="mend it, or take state_dict away")


def _listen(stream: Any, printed: deque[bytes]) -> None:
    """Keeps the end of what a process prints."""
    with stream:
        while piece := stream.read1(1024):
            printed.append(piece)
