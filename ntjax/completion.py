"""`python -m ntjax.completion`: a script that makes a shell complete commands, flags and files.

The commands' own parsers are read for it, so that it is right as long as it is of the same version.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

from ntjax import errors

SHELLS = ("bash", "zsh", "fish")
PATHS = (
    *("config", "deepspeed", "prompts", "image", "out", "data", "vision", "tokenizer"),
    *("model", "adapter", "checkpoint", "resume", "output_dir", "run_dir"),
)

USE = """\
to use it, once:
  ntjax completion bash > ~/.local/share/bash-completion/completions/ntjax
  ntjax completion zsh > "${fpath[1]}/_ntjax"
  ntjax completion fish > ~/.config/fish/completions/ntjax.fish

example, for this shell alone:
  eval "$(ntjax completion bash)"
"""


class _Asked(Exception):
    """Carries the parser that would have printed its help."""

    def __init__(self, parser: argparse.ArgumentParser):
        super().__init__()
        self.parser = parser


def main(argv: Sequence[str]) -> None:
    """Prints the script."""
    parser = argparse.ArgumentParser(
        "ntjax completion",
        description="Prints a script that makes a shell complete commands, flags and files.",
        epilog=USE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell that is to complete")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)

    import shtab

    print(shtab.complete(whole(), args.shell))


def whole() -> argparse.ArgumentParser:
    """All commands as one parser."""
    import shtab

    from ntjax.__main__ import COMMANDS

    root = argparse.ArgumentParser("ntjax")
    root.add_argument("--version", action="store_true", help="print the version")
    commands = root.add_subparsers()
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
        parser = parser_of(name)
        for action in parser._actions:  # argparse has no other way to its own arguments
            if action.dest in PATHS:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        commands.choices[name] = parser
    return root


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a command: the one that prints, when it is asked for help."""

    def found(self: argparse.ArgumentParser, file: Any = None) -> None:
        raise _Asked(self)

    kept = argparse.ArgumentParser.print_help
    argparse.ArgumentParser.print_help = found  # type: ignore[method-assign]
    try:
        importlib.import_module(f"ntjax.{command}").main(["--help"])
    except _Asked as asked:
        return asked.parser
    finally:
        argparse.ArgumentParser.print_help = kept  # type: ignore[method-assign]
    raise AssertionError(f"ntjax {command} has no --help")


if __name__ == "__main__":
    errors.run(main)
