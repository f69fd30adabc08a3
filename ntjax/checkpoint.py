"""Checkpoints of a stage: folders `checkpoint-500` beside the stage's other files, which are never touched.

    checkpoint-500/state/     the leaves of the state, named by their path: "params/blocks.attn.q"
    checkpoint-500/record/    what the run adds, and what is needed to know the leaves again

Both are written to a temporary folder that is renamed when complete: what is named `checkpoint-N` is whole.
Orbax holds this under kill -9, but it doesn't see damage done later and casts dtypes silently: hence the
record. Nothing on disk changes before the first `save` or `discard_after`: a running stage can be read.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ntjax.errors import CheckpointError
from ntjax.leaves import describe, first_line, load
from ntjax.record import (
    Best,
    DamageError,
    best_step,
    checkpoint_folder,
    read_meta,
    retained,
    saved_metrics,
    saved_steps,
)

__all__ = ["MAX_FAILED_SAVES", "Checkpoints", "read_meta", "saved_steps"]

MAX_FAILED_SAVES = 3
log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints in `folder`: the latest `keep` (None: all) and the best one by metric are kept."""

    def __init__(self, folder: Path, *, keep: int | None = None, best: Best | None = None):
        self.folder = folder.absolute()
        self.keep, self.mode = keep, best
        self._manager: Any = None  # orbax's, opened by the first save
        self._saving: int | None = None
        self._failed_saves = 0
        self._damaged: list[int] = []

    def steps(self) -> list[int]:
        """Steps that are saved, oldest first."""
        return saved_steps(self.folder)

    def latest(self) -> int | None:
        """The newest saved step."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The saved step with the best finite metric."""
        return best_step(saved_metrics(self.folder), self.mode)

    def save(self, step: int, state: Any, meta: Mapping[str, Any], metric: float | None = None) -> None:
        """Starts writing `state` and `meta` as one; the arrays may be donated as soon as this returns.

        A step already saved is left as it is. A save that fails is given up with a warning and the next one
        tried as usual; the third failure in a row raises `CheckpointError`.
        """
        self.wait()
        if self._manager is None:
            self._open()
        if step in self.steps():
            return
        import orbax.checkpoint as ocp

        stored, record = describe(state, meta, metric)
        items = ocp.args.Composite(state=ocp.args.StandardSave(stored), record=ocp.args.JsonSave(record))
        self._saving = step
        try:
            self._manager.save(step, args=items, force=True)
        except OSError as error:
            self._give_up(error)

    def wait(self) -> None:
        """Blocks until the save under way is on disk; `latest()` says whether it is."""
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # orbax reports a full disk under many names
            self._give_up(error)
        else:
            self._saving, self._failed_saves = None, 0

    def close(self) -> None:
        """Waits, then ends orbax's threads; a save that isn't waited for is lost when Python exits."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def discard_after(self, step: int) -> None:
        """Deletes the checkpoints later than `step`: training goes on from there and writes its own."""
        self.close()
        self._open()
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def restore(self, abstract: Any, step: int | None = None) -> tuple[int, Any, dict[str, Any]]:
        """(step, state, meta) of the newest checkpoint that is intact, or of `step`.

        `abstract` is the state with `jax.ShapeDtypeStruct` leaves; the mesh may be another than at the save.
        Damaged checkpoints are passed over with a warning, and set aside as `damaged-N` at the next save.
        Raises `CheckpointError` if none is intact, or if the one that is holds other leaves.
        """
        from ntjax import hosts

        self.close()
        steps = hosts.of_first(self.steps) if step is None else [step]
        for candidate in reversed(steps):
            try:
                state, meta = load(self.folder, candidate, abstract)
            except DamageError as error:
                log.warning("%s can't be used: %s", checkpoint_folder(self.folder, candidate), error)
                self._damaged += [candidate] if step is None else []
            else:
                return candidate, state, meta
        self._damaged = []
        tried = ", ".join(f"checkpoint-{n}" for n in steps) or "there is none"
        raise CheckpointError(
            f"no checkpoint can be restored ({tried})",
            where=str(self.folder),
            fix="put the folder back from a backup, or train into another output_dir",
        )

    def _open(self) -> None:
        """Sets damaged checkpoints aside, removes what killed saves left, and opens orbax's manager."""
        import jax
        import orbax.checkpoint as ocp

        from ntjax import hosts

        self.folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            for leftover in self.folder.glob("checkpoint-*.orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover)
            for step in self._damaged:
                aside = self.folder / f"damaged-{step}"
                shutil.rmtree(aside, ignore_errors=True)
                checkpoint_folder(self.folder, step).rename(aside)
        hosts.sync("the checkpoints' folder is tidy")
        self._damaged = []
        options = ocp.CheckpointManagerOptions(
            step_name_format=_Names(),
            preservation_policy=_Retention(self.folder, self.keep, self.mode),
            lightweight_initialize=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def _give_up(self, error: Exception) -> None:
        """Forgets the save under way; the manager is opened anew because it lost count of what is on disk."""
        step, self._saving, self._manager = self._saving, None, None
        self._failed_saves += 1
        import jax

        reason = first_line(error)
        # Several processes don't go on by themselves: some of them may have saved.
        if self._failed_saves == (MAX_FAILED_SAVES if jax.process_count() == 1 else 1):
            raise CheckpointError(
                f"{self._failed_saves} saves in a row failed, the last at step {step}: {reason}",
                where=str(self.folder),
                fix="free disk space or lower save_total_limit, then resume",
            ) from error
        log.warning("checkpoint-%s could not be saved, training goes on without it: %s", step, reason)
        self._open()


class _Names:
    """How orbax names and finds a step: `checkpoint-500`."""

    def build_name(self, step: int) -> str:
        return f"checkpoint-{step}"

    def find_all(self, base_path: Any) -> list[Any]:
        return [self.find_step(base_path, step) for step in saved_steps(Path(base_path))]

    def find_step(self, base_path: Any, step: int) -> Any:
        import orbax.checkpoint as ocp

        return ocp.path.step.Metadata(step=step, path=base_path / self.build_name(step))


class _Retention:
    """`retained` as orbax asks for it: when a save starts; it deletes when that save is complete."""

    def __init__(self, folder: Path, keep: int | None, mode: Best | None):
        self.folder, self.keep, self.mode = folder, keep, mode

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        metrics = saved_metrics(self.folder) if self.mode else {}
        kept = retained({info.step: metrics.get(info.step) for info in checkpoints}, self.keep, self.mode)
        return [info.step in kept for info in checkpoints]
