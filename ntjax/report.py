"""`python -m ntjax.report`: a run as one HTML file, curves and completions."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ntjax import errors
from ntjax.errors import ConfigError


def main(argv: Sequence[str]) -> None:
    """Parses the command line, writes the report and says where it is."""
    parser = argparse.ArgumentParser(
        "ntjax report", description="Writes what a run did, finished or not, as one HTML file."
    )
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", help="a run's folder, its `latest`, or a stage's folder"
    )
    parser.add_argument("--out", metavar="FILE", help="instead of RUN_DIR/report.html")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)

    from ntjax.reporting import write

    try:
        print(write(Path(args.run_dir), Path(args.out) if args.out else None))
    except OSError as error:
        raise ConfigError(
            f"the report can't be written: {error}",
            where="--out" if args.out else args.run_dir,
            fix="name a file in a folder that can be written with --out",
        ) from error


if __name__ == "__main__":
    errors.run(main)
