"""How far a stage is: a bar where someone watches, a line per logging step where a file does."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar


class Progress:
    """Shows a stage of `total` steps that goes on from step `start`, on stderr, if it is `shown`."""

    def __init__(
        self,
        stage: str,
        total: int,
        start: int = 0,
        *,
        shown: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.stage, self.total, self.start, self.shown = stage, total, start, shown
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        self._began = self._clock()
        if self.shown and self._stream.isatty():
            columns = (
                "{task.description}",
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Bar(*columns, console=Console(file=self._stream))
            self._task = self._bar.add_task(self.stage, total=self.total, completed=self.start, text="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, record: Mapping[str, float] | None = None) -> None:
        """Step `step` is done; with a record, its loss and speed are shown."""
        text = " ".join([*_facts(record), f"eta {duration(self._remaining(step))}"]) if record else None
        if self._bar is None:
            if text is not None:
                self.note(f"{self.stage} {step}/{self.total} {text}")
        elif text is None:
            self._bar.update(self._task, completed=step)
        else:
            self._bar.update(self._task, completed=step, text=text)

    def note(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        if not self.shown:
            return
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False)

    def _remaining(self, step: int) -> float:
        """Seconds left at the pace so far."""
        return (self._clock() - self._began) / max(step - self.start, 1) * (self.total - step)


def duration(seconds: float) -> str:
    """12s, 3m12s, 2h05m, 1d02h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def _facts(record: Mapping[str, float]) -> list[str]:
    formats = {
        "loss": "loss {:.4g}",
        "eval_loss": "eval_loss {:.4g}",
        "reward": "reward {:.4g}",
        "learning_rate": "lr {:.2g}",
        "tokens_per_second": "{:.0f} tok/s",
    }
    return [text.format(record[key]) for key, text in formats.items() if key in record]
