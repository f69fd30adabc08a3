"""SIGTERM and Ctrl-C ask a run to stop at the next step; asked twice, it leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


class StopRequest:
    """While entered, the first signal sets `requested`; the second ends the process with 75 or 130.

    Only the main thread of a process gets signals: entered in another one, it never asks.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: the handler was not Python's (jax.distributed's is C++) and can't be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if self.requested is not None:
            os._exit(EXIT_CODES[received])
        self.requested = received
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"ntjax: {received.name}: stopping after this step, again to stop now\n".encode())
