"""`python -m ntjax.inspect`: the tokens of a stage as its loss sees them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ntjax import errors
from ntjax.errors import ConfigError

PARTS = ("chosen", "rejected")


def main(argv: Sequence[str]) -> None:
    """Parses the command line and prints rows."""
    parser = argparse.ArgumentParser(
        "ntjax inspect", description="Shows which tokens of a stage are learned."
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--stage", help="name or type; the first by default")
    parser.add_argument("--rows", type=int, default=3, help="how many rows, from the start of the file")
    parser.add_argument(
        "--json",
        action="store_true",
        help='{"tokens", "text", "mask", "truncated"} a line, of pairs "part" too',
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_intermixed_args(argv)

    from ntjax.config import dataset_for, load_config, refuse_unbuilt

    config = load_config(args.config, args.overrides)
    refuse_unbuilt(config)
    wanted = args.stage or config.stages[0].stage_name
    named = [stage for stage in config.stages if wanted in (stage.stage_type, stage.stage_name)]
    named = named or [stage for stage in config.stages if stage.stage_name == f"{wanted}_stage"]
    if not named:
        names = ", ".join(stage.stage_name for stage in config.stages)
        raise ConfigError(f"there is no stage {wanted!r}", where="--stage", fix=f"the config has {names}")

    from ntjax.hf.files import read_config
    from ntjax.hf.tokenizer import load_tokenizer
    from ntjax.pipeline import find_start
    from ntjax.prepare import encoded_rows

    folder = find_start(config, named[0], config.model.model_name_or_path).source
    tokenizer: Any = load_tokenizer(folder)
    name, dataset = dataset_for(config, named[0])
    if dataset.streaming:  # the first rows are all that is looked at
        read = replace(dataset, streaming=False, num_samples=args.rows)
        config = replace(config, datasets={**config.datasets, name: read})
    encoded, _ = encoded_rows(config, named[0], tokenizer, read_config(folder)["vocab_size"])
    assert encoded is not None
    for index in range(min(args.rows, len(encoded))):
        documents = encoded.example(index).documents
        for part, document in zip(PARTS if len(documents) > 1 else [None], documents, strict=True):
            show(document, tokenizer, part, as_json=args.json)
    if not args.json:
        print(encoded.report())


def show(example: Any, tokenizer: Any, part: str | None = None, *, as_json: bool) -> None:
    """A document: learned tokens in green and the others dim on a terminal, learned ones in [[ ]] elsewhere.

    `part` says which of a pair it is.
    """
    tokens = example.tokens.tolist()
    mask = [bool(m) for m in example.mask]
    if as_json:
        text = [tokenizer.decode([token]) for token in tokens]
        row = {"tokens": tokens, "text": text, "mask": mask, "truncated": bool(example.truncated)}
        print(json.dumps(({"part": part} if part else {}) | row, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout)
    if part:
        console.print(f"{part}:", style="bold", highlight=False)
    line = Text()
    for learned, run in _runs(tokens, mask):
        text = tokenizer.decode(run)
        plain = text if console.is_terminal else f"[[{text}]]" if learned else text
        line.append(plain, "bold green" if learned else "dim")
    console.print(line, soft_wrap=True)
    cut = ", truncated" if example.truncated else ""
    console.print(f"-- {len(tokens)} tokens, {sum(mask)} learned{cut}\n", style="dim", highlight=False)


def _runs(tokens: list[int], mask: list[bool]) -> list[tuple[bool, list[int]]]:
    """Neighbouring tokens that are alike, together."""
    runs: list[tuple[bool, list[int]]] = []
    for token, learned in zip(tokens, mask, strict=True):
        if not runs or runs[-1][0] != learned:
            runs.append((learned, []))
        runs[-1][1].append(token)
    return runs


if __name__ == "__main__":
    errors.run(main)
