"""The report of a run that is under way, written by the process that trains."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ntjax import __version__, reporting
from ntjax.reporting.run import ENVIRONMENT

if TYPE_CHECKING:
    from ntjax.layout import Layout

SHARE = 0.01  # of the time that may go into reports
log = logging.getLogger(__name__)


class Live:
    """Writes the report of the run in `folder`, of several processes in the first one. What fails is warned of once."""

    def __init__(self, folder: Path, *, first: bool):
        self.folder, self.first = folder, first
        self._warned = False
        self._ready = 0.0  # when enough time has passed since the report before

    def begin(self, layout: Layout) -> None:
        """A stage begins: notes what runs, and on what."""
        if self.first:
            self._try(lambda: self._note(layout))

    def update(self, *, ended: bool = False) -> None:
        """Writes the report if that takes a hundredth of the time since the last, or at a stage's end."""
        began = time.perf_counter()
        if self.first and (ended or began >= self._ready):
            self._try(lambda: reporting.write(self.folder))
            now = time.perf_counter()
            self._ready = now + (now - began) / SHARE

    def _note(self, layout: Layout) -> None:
        import jax
        import jaxlib

        devices = jax.devices()
        noted = {
            "ntjax": __version__,
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores a host",
            "platform": devices[0].platform,
            "device": devices[0].device_kind,
            "devices": len(devices),
            "processes": jax.process_count(),
            "layout": str(layout),
            "mesh": ", ".join(f"{axis} {size}" for axis, size in layout.mesh.shape.items()),
        }
        (self.folder / ENVIRONMENT).write_text(json.dumps(noted, indent=1) + "\n")

    def _try(self, write: Callable[[], object]) -> None:
        try:
            write()
        except Exception as error:  # a lost report never ends a run
            if not self._warned:
                log.warning(
                    "the report can't be written, training goes on: %s: %s", type(error).__name__, error
                )
            self._warned = True
