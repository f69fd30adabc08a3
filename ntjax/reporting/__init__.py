"""What a run did, as one HTML file: read from its folder, drawn without a script, complete in itself."""

from __future__ import annotations

from pathlib import Path

NAME = "report.html"


def write(folder: Path, out: Path | None = None) -> Path:
    """Writes the report of the run or the stage in `folder` into it, or to `out`, and returns where it is.

    Raises InputMissing for a folder that is neither, BadData for a file in it that can't be read, OSError where the
    report can't be written.
    """
    from ntjax.reporting.page import page
    from ntjax.reporting.run import read_run

    run = read_run(folder)
    path = run.folder / NAME if out is None else out
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(page(run).encode(errors="replace"))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path
