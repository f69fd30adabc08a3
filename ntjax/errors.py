"""The ways a run can end, and the exit code of each.

Every error a user can cause is a `UserError`: it names the place (file and line, or file and row),
the value, what is allowed and one fix, and it is printed without a traceback unless `--debug` is given.
Anything else that escapes is a bug of ours and exits 70.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence


class UserError(Exception):
    """An error with an exit code and a message meant to be read.

    `where` is the place at fault ("run.toml:12" or "train.jsonl:1817"), `fix` is one thing to do about it.
    """

    exit_code = 70

    def __init__(self, message: str, *, where: str | None = None, fix: str | None = None):
        self.message, self.where, self.fix = message, where, fix
        super().__init__(message)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        fix = f"\n  fix: {self.fix}" if self.fix else ""
        return f"{place}{self.message}{fix}"


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, impossible, given twice, or asks for what isn't built."""

    exit_code = 78


class InputMissing(UserError):
    """A file, model, data set, split or column isn't where the config says."""

    exit_code = 66


class BadData(UserError):
    """A row or a weight file can't be used."""

    exit_code = 65


class Refused(UserError):
    """Doing this would be unsafe: pickled weights, remote code, paths that leave their folder."""

    exit_code = 77


class UserCodeError(UserError):
    """A function of the user's (formatting, reward) raised or returned the wrong thing."""

    exit_code = 70


class CheckpointError(UserError):
    """A checkpoint can't be written or read."""

    exit_code = 74


class Diverged(UserError):
    """Too many non-finite steps in a row."""

    exit_code = 79


class Preempted(UserError):
    """A signal asked the run to stop; its state is saved. 75 for SIGTERM, 130 for Ctrl-C."""

    exit_code = 75

    def __init__(self, message: str, *, interrupted: bool = False, fix: str | None = None):
        super().__init__(message, fix=fix)
        if interrupted:
            self.exit_code = 130


class PeerLost(UserError):
    """Another process of the run is gone or stuck."""

    exit_code = 76


# What XLA and its transports say when another process went away.
LOST = re.compile(
    r"gloo|nccl|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|connection|heartbeat|coordination", re.I
)
process: int | None = None  # the number of this process in a run of several


def line(error: UserError) -> str:
    """The error as it is printed, by which process."""
    return f"{'' if process is None else f'[process {process}] '}ntjax: {error}"


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Calls `main(argv)` and leaves the process with the exit code of what happened.

    `os._exit` on failure: an exception must not wait for checkpoint threads that wait for other hosts.
    """
    argv = sys.argv[1:] if argv is None else argv
    if sys.path[0] in ("", os.getcwd()):
        # `python -m` puts the working folder first: a tomllib.py there would take the place of Python's.
        sys.path.append(sys.path.pop(0))
    try:
        main(argv)
    except UserError as error:
        if "--debug" in argv:
            traceback.print_exc()
        _leave(error.exit_code, line(error))
    except SystemExit as error:
        if process is not None:
            _leave(70, line(UserError(f"left by sys.exit({error.code!r}) before the run was over")))
        # argparse leaves with 2 for a wrong command line, with 0 after --help.
        sys.exit(78 if error.code == 2 else error.code)
    except KeyboardInterrupt:
        _leave(130, line(UserError("interrupted before anything was there to save")))
    except Exception as error:
        if process is not None and type(error).__name__ == "JaxRuntimeError" and LOST.search(str(error)):
            reason = str(error).splitlines()[0]
            lost = PeerLost(f"another process is gone: {reason}", fix="start again with --resume auto")
            _leave(lost.exit_code, line(lost))
        traceback.print_exc()
        bug = f"this is a bug in ntjax or in code it was given: {type(error).__name__}: {error}"
        _leave(70, line(UserError(bug)))


def _leave(code: int, message: str) -> None:
    print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
