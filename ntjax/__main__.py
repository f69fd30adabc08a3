"""`ntjax NAME ...`, the same as `python -m ntjax.NAME ...`."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Iterator, Sequence

from ntjax import __version__, errors

COMMANDS = {
    "train": "runs the stages of a config",
    "plan": "says beforehand whether every stage fits, and how fast it will be",
    "launch": "runs a command in several processes of this machine, as one run",
    "inspect": "shows the tokens of a stage as the loss sees them",
    "report": "writes what a run did as one HTML file: curves, completions, config",
    "generate": "samples from a model",
    "eval": "loss on rows, or rewards of what a model answers",
    "export": "turns a checkpoint into a Hugging Face folder",
    "import": "turns GGUF, Flax or safetensors weights into a Hugging Face folder",
    "doctor": "says what of this machine a run can use, and what is missing",
    "init": "writes a short config to start from, with data it runs with",
    "schema": "prints the JSON Schema of a config, for editors",
    "completion": "prints a script that makes a shell complete commands",
}
GROUPS = {
    "to begin": ("doctor", "init", "inspect", "plan"),
    "to train": ("train", "launch"),
    "to look at results": ("report", "eval", "generate"),
    "to move weights": ("import", "export"),
    "to write and type less": ("schema", "completion"),
}
FIRST = {  # a command and what it is for, in the first five minutes
    "doctor": ("", "is everything here that a run needs?"),
    "init": ("sft", "a small config, and eight rows of data"),
    "inspect": ("--config sft.toml", "which tokens are learned"),
    "plan": ("--config sft.toml", "does it fit, and how long will it take?"),
    "train": ("--config sft.toml", "the run: a Hugging Face folder a stage"),
    "report": ("runs/llm/sft/latest", "curves and samples on one page"),
    "generate": ("--model runs/llm/sft/latest/sft_stage --chat", "talk to the result"),
}
EXAMPLES = {
    "train": "--config sft.toml stages.sft.learning_rate=1e-4 --output-dir /tmp/runs",
    "plan": "--config sft.toml --topology v5e:4x4 --auto",
    "launch": "--processes 2 --max-restarts 3 -- ntjax train --config sft.toml",
    "generate": '--model runs/llm/sft/latest/sft_stage --prompt "Where does the sun rise?"',
    "report": "runs/llm/sft/latest",
    "eval": "--model runs/llm/sft/latest/sft_stage --data data/sft.jsonl",
    "export": "--checkpoint runs/llm/sft/latest/sft_stage/checkpoint-500 --out exported",
    "import": "--model llama.gguf --out models/llama",
}


def main() -> None:
    """Runs the command named first on the command line."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print("\n".join(overview()))
        return
    if arguments[0] == "--version":
        print(__version__)
        return
    name, *rest = arguments
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        print(f"ntjax: there is no command {name!r}{hint} There are: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(78)
    if {"-h", "--help"} & set(rest[: rest.index("--")] if "--" in rest else rest):
        errors.run(explain, [name])
        return
    errors.run(importlib.import_module(f"ntjax.{name}").main, rest)


def overview() -> Iterator[str]:
    """What ntjax is, how to begin, and its commands."""
    yield f"ntjax {__version__} post-trains language and vision-language models in JAX: pretraining, SFT, reward"
    yield "models, DPO, PPO and GRPO in one config file, Hugging Face folders in and out."
    yield ""
    yield "The first five minutes:"
    for name, (arguments, purpose) in FIRST.items():
        if name in COMMANDS:
            yield f"  {f'ntjax {name} {arguments}':62}{purpose}"
    for title, names in GROUPS.items():
        yield ""
        yield f"Commands {title}:"
        yield from (f"  {name:12}{COMMANDS[name]}" for name in names if name in COMMANDS)
    yield ""
    yield "Each has --help with an example. README.md and docs/LLM_VLM_TRAINING_GUIDE.md of the source have the rest:"
    yield "data formats, all settings, resuming, several devices, exit codes, working offline."


def explain(command: Sequence[str]) -> None:
    """Prints a command's help, with an example at its end."""
    from ntjax.completion import parser_of

    (name,) = command
    parser = parser_of(name)
    parser.prog = f"ntjax {name}"
    if parser.epilog is None and name in EXAMPLES:
        parser.epilog = f"example:\n  ntjax {name} {EXAMPLES[name]}"
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.print_help()


if __name__ == "__main__":
    main()
