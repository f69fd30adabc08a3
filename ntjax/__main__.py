"""`ntjax NAME ...`, the same as `python -m ntjax.NAME ...`."""

from __future__ import annotations

import difflib
import importlib
import sys

from ntjax import __version__, errors

COMMANDS = {
    "train": "runs the stages of a config",
    "plan": "says beforehand whether every stage fits, and how fast it will be",
    "launch": "runs a command in several processes of this machine, as one run",
    "inspect": "shows the tokens of a stage as the loss sees them",
    "generate": "samples from a model",
    "export": "turns a checkpoint into a Hugging Face folder",
    "import": "turns GGUF, Flax or safetensors weights into a Hugging Face folder",
}


def main() -> None:
    """Runs the command named first on the command line."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:10}{text}" for name, text in COMMANDS.items()]
        print("\n".join([f"ntjax {__version__}. Commands (each has --help):", *lines]))
        return
    if arguments[0] == "--version":
        print(__version__)
        return
    if arguments[0] not in COMMANDS:
        close = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        print(
            f"ntjax: there is no command {arguments[0]!r}{hint} There are: {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        sys.exit(78)
    errors.run(importlib.import_module(f"ntjax.{arguments[0]}").main, arguments[1:])


if __name__ == "__main__":
    main()
