"""`python -m ntjax.inspect`: the tokens of a stage as its loss sees them, and what would spoil its training."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ntjax import errors
from ntjax.errors import BadData, ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from ntjax.config import Config
    from ntjax.data.batch import Example
    from ntjax.inspection import Inspected
    from ntjax.stages.base import StageConfig

PARTS = ("chosen", "rejected")
# Kind of tokens -> how they look on a terminal, and around what elsewhere.
STYLES = {
    "learned": "bold green",
    "masked": "dim",
    "image": "cyan",
    "cut": "red strike",
    "padding": "bright_black",
}
PLAIN = {"learned": "[[{}]]", "masked": "{}", "image": "{}", "cut": "~~{}~~", "padding": "{}"}
CUT = 12  # tokens shown of what was cut off
ROWS = 8  # rows shown of a step

EXAMPLE = """\
exit code 65, after the rows, where training would do harm: no end token is learned, nothing is learned at all, the chat
template is of another model or shows prompts otherwise once answers follow.

example:
  ntjax inspect --config sft.toml --stage all --rows 1 datasets.sft.max_length=256
"""


def main(argv: Sequence[str]) -> None:
    """Prints rows of one stage or of all, then raises BadData with what would spoil their training."""
    args = _parser().parse_intermixed_args(argv)

    from ntjax.config import load_config, refuse_unbuilt

    config = load_config(args.config, args.overrides)
    refuse_unbuilt(config)
    stages = chosen(config, args.stage)

    from ntjax import inspection

    found: list[BadData] = []
    notes: dict[str, None] = {}  # each once, whatever the stages that it is of
    for stage in stages:
        seen = looked_at(config, stage, args.rows)
        title = stage.stage_name if len(stages) > 1 else None
        _print_json(seen, args.rows, title) if args.json else _print(seen, args.rows, title)
        found += inspection.complaints(seen)
        notes |= dict.fromkeys(inspection.notes(seen))
    if not args.json:
        _print_notes(list(notes))
    if len(found) == 1:
        raise found[0]
    if found:
        raise BadData(f"{len(found)} problems\n" + "\n".join(map(str, found)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "ntjax inspect",
        description="Shows which tokens of a stage are learned, and finds what would spoil its training.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="TOML, YAML, JSON or .py file, as of train")
    parser.add_argument("--stage", help="name or type, or all; the first by default")
    parser.add_argument("--rows", type=int, default=3, help="how many rows, from the start of the file")
    parser.add_argument(
        "--json",
        action="store_true",
        help='{"tokens", "text", "mask", "truncated"} a line, of pairs "part" too',
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any setting, by dotted path")
    return parser


def chosen(config: Config, wanted: str | None) -> list[StageConfig]:
    """The stages that `--stage` means."""
    if wanted == "all":
        return list(config.stages)
    wanted = wanted or config.stages[0].stage_name
    named = [stage for stage in config.stages if wanted in (stage.stage_type, stage.stage_name)]
    named = named or [stage for stage in config.stages if stage.stage_name == f"{wanted}_stage"]
    if not named:
        names = ", ".join(stage.stage_name for stage in config.stages)
        raise ConfigError(f"there is no stage {wanted!r}", where="--stage", fix=f"the config has {names}")
    return named[:1]


def looked_at(config: Config, stage: StageConfig, count: int) -> Inspected:
    """A stage's examples; of a stream those of its first `count` rows."""
    from ntjax.config import dataset_for
    from ntjax.data.rows import shown_rows
    from ntjax.feed import encoded_rows
    from ntjax.hf.files import read_config
    from ntjax.hf.tokenizer import stop_ids
    from ntjax.inspection import Inspected
    from ntjax.pipeline import find_start, goes_back_to
    from ntjax.prepare import words_of
    from ntjax.stages.rows import stage_rows

    folder = find_start(config, stage, goes_back_to(config, stage)).source
    hf = read_config(folder)
    tokenizer: Any
    tokenizer, vision = words_of(config, folder, hf)
    name, dataset = dataset_for(config, stage)
    if dataset.streaming:
        dataset = replace(dataset, streaming=False, num_samples=count)
        config = replace(config, datasets={**config.datasets, name: dataset})
    vocab = hf.get("text_config", hf)["vocab_size"]
    examples: Any
    examples, _ = encoded_rows(config, stage, tokenizer, vocab, vision)
    assert stage.seed is not None
    rows, _ = stage_rows(config, dataset, stage.seed)
    assert rows is not None
    stops = frozenset(stop_ids(folder, tokenizer))
    return Inspected(stage, dataset, shown_rows(rows, dataset, vision), examples, tokenizer, stops, vision)


def _console() -> Console:
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, soft_wrap=True)


def _print_json(seen: Inspected, count: int, title: str | None) -> None:
    """Prints the first `count` examples of a stage for programs, a document a line."""
    head = {"stage": title} if title else {}
    for index in range(min(count, len(seen.examples))):
        for part, document in _parts(seen, index):
            print(json.dumps(head | _row(seen, document, part), ensure_ascii=False))


def _print(seen: Inspected, count: int, title: str | None) -> None:
    """Prints the first `count` examples of a stage, and how all of them come to its steps."""
    console = _console()
    if title:
        console.print(f"{title}:", style=_style(console, "bold"))
    for index in range(min(count, len(seen.examples))):
        for side, (part, document) in enumerate(_parts(seen, index)):
            show(console, seen, document, part, _cut_off(seen, index, side, document), seen.where(index))
        if seen.stage.rolls_out:
            said = f"rewards get: {_columns(seen, index)}\n"
            console.print(said, style=_style(console, "dim"), markup=False)
    for line in laid_out(seen, console):
        console.print(line)
    console.print(f"{seen.examples.report()}\n", markup=False)


def _print_notes(notes: Sequence[str]) -> None:
    """Prints what the looks mean, and what is worth knowing."""
    console = _console()
    console.print(_legend(console))
    for note in notes:
        console.print(f"note: {note}", style=_style(console, "yellow"), markup=False)


def _parts(seen: Inspected, index: int) -> list[tuple[str | None, Example]]:
    """The documents of an example, and of a pair which is which."""
    documents = seen.examples.example(index).documents
    return list(zip(PARTS if len(documents) > 1 else [None], documents, strict=True))


def _row(seen: Inspected, document: Example, part: str | None) -> dict[str, Any]:
    """A document for programs."""
    tokens = document.tokens.tolist()
    row: dict[str, Any] = {"part": part} if part else {}
    row |= {
        "tokens": tokens,
        "text": [seen.tokenizer.decode([token]) for token in tokens],
        "mask": [bool(learned) for learned in document.mask],
        "truncated": bool(document.truncated),
    }
    if document.pictures:
        row["image"] = [token == seen.vision.image_id for token in tokens]
    return row


def show(
    console: Console, seen: Inspected, document: Example, part: str | None, cut: Sequence[int], where: str
) -> None:
    """Prints a document, by kind of token; `cut` are the first tokens after it that were cut off."""
    from rich.text import Text

    tokens, image = document.tokens.tolist(), seen.vision.image_id if seen.vision else -1
    kinds = [
        "image" if token == image else "learned" if mine else "masked"
        for token, mine in zip(tokens, document.mask, strict=True)
    ]
    if part:
        console.print(f"{part}:", style=_style(console, "bold"))
    line = Text()
    for kind, run in _runs(tokens, kinds):
        line.append_text(
            _dyed(console, kind, _text(seen, run) if kind != "image" else f"<{len(run)} image tokens>")
        )
    if cut:
        line.append_text(_dyed(console, "cut", f"{_text(seen, cut)} ..."))
    console.print(line)
    said = f"{len(tokens)} tokens, {int(document.mask.sum())} learned"
    if document.pictures:
        sizes = ", ".join(f"{width} x {height}" for width, height in (p.size for p in document.pictures))
        said += f", {kinds.count('image')} of images ({sizes} pixels)"
    said += ", truncated" if document.truncated else ""
    console.print(f"-- {said} ({where})\n", style=_style(console, "dim"), markup=False)


def _text(seen: Inspected, tokens: Sequence[int]) -> str:
    """What tokens stand for, special ones by their names."""
    return seen.tokenizer.decode(tokens) or " ".join(seen.tokenizer.convert_ids_to_tokens(tokens))


def _runs(tokens: Sequence[int], kinds: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    """Neighbouring tokens that are alike, together."""
    from itertools import groupby

    for kind, run in groupby(zip(kinds, tokens, strict=True), key=lambda pair: pair[0]):
        yield kind, [token for _, token in run]


def _plain(console: Console) -> bool:
    """Whether colours can't be told apart: no terminal, or NO_COLOR."""
    return console.no_color or console.color_system is None


def _style(console: Console, style: str) -> str:
    return "" if _plain(console) else style


def _dyed(console: Console, kind: str, text: str) -> Any:
    from rich.text import Text

    return Text(PLAIN[kind].format(text)) if _plain(console) else Text(text, STYLES[kind])


def _legend(console: Console) -> Any:
    """What the looks mean."""
    from rich.text import Text

    words = {"learned": "learned", "masked": "read, not learned", "image": "<image tokens>", "cut": "cut off"}
    return Text("legend: ").append_text(
        Text(" | ").join(_dyed(console, kind, word) for kind, word in words.items())
    )


def _cut_off(seen: Inspected, index: int, side: int, document: Example) -> list[int]:
    """The first tokens of a document that were cut off at its end: its row is encoded again, with room for them."""
    from ntjax.data.rows import Picked

    source = seen.source(index)
    if not document.truncated or source is None or seen.dataset.formatting_func is not None:
        return []
    roomy: Any = replace(seen.stage, max_length=sys.maxsize)  # type: ignore[call-arg]
    data = replace(seen.dataset, max_length=None, preprocessing_num_workers=None)
    vocab = int(max(seen.tokenizer.get_vocab().values())) + 1
    whole = roomy.encode(Picked(seen.rows, [source]), seen.tokenizer, data, None, vocab, seen.vision)
    tokens, length = whole.example(0).documents[side].tokens.tolist(), len(document.tokens)
    kept_start = tokens[:length] == document.tokens.tolist()
    return tokens[length : length + CUT] if kept_start else []


def _columns(seen: Inspected, index: int) -> str:
    """What rewards are given of a prompt's row beside the prompt and the completion."""
    from ntjax.config.settings import shown

    columns = seen.examples.kept[index].columns  # type: ignore[union-attr]
    return (
        ", ".join(f"{name} = {shown(value)}" for name, value in columns.items()) or "no column but the prompt"
    )


def laid_out(seen: Inspected, console: Console) -> Iterator[Any]:
    """How the first step's examples lie in rows, on one device; answers that share a prompt have it each. No device is
    started, so that rows are an accelerator's, and CPUs' fit closer."""
    stage, what = seen.stage, "pairs" if seen.paired else "docs"
    if stage.rolls_out:
        return
    from rich.text import Text

    from ntjax.data.loader import Plan

    plan = Plan(
        seen.examples.lengths,
        stage.row_length,
        stage.per_device_train_batch_size,
        stage.gradient_accumulation_steps,
        shuffle=seen.dataset.shuffle,
        seed=stage.seed or 0,
        packing=stage.packs,
        in_order=stage.packs_in_order,
        fills=stage.fills and seen.vision is None,
    )
    laid = plan.laid(0)
    rows = [slot for microbatch in laid.slots for slot in microbatch]
    shape = f"{len(laid.slots)} x {len(laid.slots[0])} rows of {laid.length} tokens"
    yield f"the first step on one device: {shape} (CPUs fit closer)"
    for number, slot in enumerate(rows[:ROWS], 1):
        filled = int(sum(seen.examples.lengths[index] for index in slot))
        said = Text(f"  row {number}: {what} {len(slot)}, {filled} of {laid.length} tokens")
        yield said.append_text(_dyed(console, "padding", f", {laid.length - filled} of padding"))
    if len(rows) > ROWS:
        yield f"  and {len(rows) - ROWS} more"


if __name__ == "__main__":
    errors.run(main)
