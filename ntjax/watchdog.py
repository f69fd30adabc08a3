"""A limit on how long a run of several processes may be in one phase.

A process that hangs takes all others with it: they wait in a collective for ever, alive, so that no heartbeat is
missed. Each phase of a run has a limit; `arm` begins one. Past its limit the process prints where its threads are and
leaves with 76, by `os._exit`: anything more polite would wait for the others.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ntjax import errors

EXTRA = 10  # seconds until faulthandler ends a process that Python's threads can't, and by which a limit is coarser


class _Watch:
    """What is armed: a phase and when it must be over. `limits` is empty until the watchdog is started."""

    def __init__(self) -> None:
        self.limits: Mapping[str, float] = {}
        self.phase, self.deadline = "", float("inf")
        self.changed = threading.Condition()


_watch = _Watch()


def start(limits: Mapping[str, float]) -> None:
    """From now on a phase may take its limit of `limits` (seconds)."""
    beginning = not _watch.limits
    _watch.limits = dict(limits)
    if beginning:
        threading.Thread(target=_run, name="watchdog", daemon=True).start()


def arm(phase: str) -> None:
    """The phase before is over in time, and `phase` begins. Does nothing unless the watchdog was started."""
    if not _watch.limits:
        return
    limit = _watch.limits[phase]
    with _watch.changed:
        _watch.phase, _watch.deadline = phase, time.monotonic() + limit
        _watch.changed.notify()
    # Code that never lets go of the interpreter would stop the thread as well; this one is C.
    faulthandler.dump_traceback_later(limit + EXTRA, exit=True)


def disarm() -> None:
    """Nothing is limited until the next phase."""
    if not _watch.limits:
        return
    with _watch.changed:
        _watch.deadline = float("inf")
        _watch.changed.notify()
    faulthandler.cancel_dump_traceback_later()


@contextmanager
def during(phase: str) -> Iterator[None]:
    """`phase` within the one that was armed, which then begins again."""
    before = _watch.phase
    arm(phase)
    yield
    if before:
        arm(before)


def _run() -> None:
    with _watch.changed:
        while True:
            left = _watch.deadline - time.monotonic()
            if left <= 0:
                _bite(_watch.phase, _watch.limits[_watch.phase])
            _watch.changed.wait(min(left, threading.TIMEOUT_MAX))


def _bite(phase: str, limit: float) -> None:
    faulthandler.dump_traceback(all_threads=True)
    lost = errors.PeerLost(
        f"{phase} took more than {limit:g} s: another process is gone or stuck, or this one is",
        fix=f"start again with --resume auto; if nothing hung, raise timeouts.{phase}",
    )
    print(errors.line(lost), file=sys.stderr, flush=True)
    os._exit(lost.exit_code)
