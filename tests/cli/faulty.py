"""`python -m tests.cli.faulty FAULT PROCESS STEP FILE ...`: ntjax.train, in which one process does something terrible.

When it does, it leaves FILE; where that is there, nothing happens any more.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from ntjax import errors, train
from ntjax.checkpoint import Checkpoints
from ntjax.loop import Loop

FAULTS = ("raise", "exit", "os_exit", "kill", "stop", "skip_save", "loop")


def fail(fault: str, note: Path) -> None:
    """Does it."""
    note.write_text(str(time.time()))
    if fault == "raise":
        raise OSError("the disk is on fire")
    if fault == "exit":
        sys.exit(0)
    if fault == "os_exit":
        os._exit(1)
    if fault in ("kill", "stop", "term"):
        os.kill(os.getpid(), getattr(signal, f"SIG{fault.upper()}"))
    while fault == "loop":
        pass


def spoil(fault: str, process: int, step: int, note: Path) -> None:
    """From now on, process `process` fails at that step."""
    import jax

    prepared, save = Loop.prepared, Checkpoints.save

    def failing(loop: Loop, batch: Any) -> Any:
        if jax.process_index() == process and loop.done == step:
            fail(fault, note)
        return prepared(loop, batch)

    def skipping(checkpoints: Checkpoints, at: int, *rest: Any) -> None:
        if jax.process_index() == process and at >= step:
            note.write_text(str(time.time()))
            return
        save(checkpoints, at, *rest)

    if fault == "skip_save":
        Checkpoints.save = skipping  # type: ignore[method-assign]
    else:
        Loop.prepared = failing  # type: ignore[method-assign]


if __name__ == "__main__":
    fault, process, step, note = sys.argv[1:5]
    if not Path(note).exists():
        spoil(fault, int(process), int(step), Path(note))
    errors.run(train.main, sys.argv[5:])
