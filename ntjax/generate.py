"""`python -m ntjax.generate`: the rollout sampler, for people."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ntjax import errors
from ntjax.errors import BadData, ConfigError, InputMissing

BATCH = 64  # prompts of a file that are taken at once


def main(argv: Sequence[str]) -> None:
    """Parses the command line and prints completions."""
    parser = argparse.ArgumentParser("ntjax generate", description="Samples from a model folder.")
    parser.add_argument("--model", required=True, help="a Hugging Face folder or repository")
    parser.add_argument("--adapter", help="a PEFT adapter folder; --model is the model it was trained on")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="one prompt: a user's turn if the model has a chat template")
    source.add_argument(
        "--prompts",
        metavar="FILE.jsonl",
        help='rows with "prompt" (text or messages) or "messages", and "images" beside the file',
    )
    source.add_argument("--chat", action="store_true", help="talk to it; an empty line or Ctrl-D ends")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="shown with the (first) prompt"
    )
    parser.add_argument(
        "--raw", action="store_true", help="complete the text as it is, without the chat template"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token"
    )
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="text that ends a completion"
    )
    parser.add_argument(
        "--num-completions", type=int, default=1, metavar="N", help="completions of each prompt"
    )
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--json", action="store_true", help="one object a line: prompt, completion, tokens, logprobs"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    counted = min(args.max_new_tokens, args.num_completions) >= 1 and args.top_k >= 0
    if not (counted and args.temperature >= 0 and 0 < args.top_p <= 1 and 0 <= args.min_p <= 1) or (
        args.repetition_penalty <= 0
    ):
        raise ConfigError(
            f"can't draw {args.max_new_tokens} tokens {args.num_completions} times at temperature "
            f"{args.temperature}, top-k {args.top_k}, top-p {args.top_p}, min-p {args.min_p}, "
            f"repetition-penalty {args.repetition_penalty}",
            where="command line",
            fix="at least one token; temperature and top-k from 0; top-p above 0, at most 1; min-p from 0 to 1",
        )
    for image in args.image:
        if not Path(image).is_file():
            raise InputMissing(f"there is no file {image}", where="--image")
    args.image = [str(Path(image).absolute()) for image in args.image]
    speaker = Speaker(args)
    if args.chat:
        speaker.chat()
        return
    if args.prompt is None:
        asked = list(_read_prompts(Path(args.prompts)))
    else:
        asked = [Asked(args.prompt, args.image, "--prompt")]
    for start in range(0, len(asked), BATCH):
        speaker.answer(asked[start : start + BATCH], start)


class Asked(NamedTuple):
    """Text or messages, the images that go with it, and where it was asked."""

    said: Any
    images: Sequence[Any] = ()
    where: str = "prompt"


class Speaker:
    """A loaded model and how to draw from it."""

    def __init__(self, args: argparse.Namespace):
        from ntjax.api import load

        self.args, self.model = args, load(args.model, adapter=args.adapter, dtype=args.dtype)
        if args.image and self.model.vision is None:
            raise ConfigError(f"{self.model.folder} sees no images", where="--image", fix="leave it out")
        self.drawn: dict[str, Any] = {
            "max_new_tokens": args.max_new_tokens,
            "temperature": args.temperature,
            "top_k": args.top_k,
            "top_p": args.top_p,
            "min_p": args.min_p,
            "repetition_penalty": args.repetition_penalty,
            "stop_strings": tuple(args.stop),
        }

    def complete(self, asked: Sequence[Asked], first_row: int = 0) -> list[Any]:
        """Completions of prompts, the first of them row `first_row` of a file."""
        group, raw = self.args.num_completions, self.args.raw
        prompts = [self.model.prompt(one.said, list(one.images), raw=raw, where=one.where) for one in asked]
        numbered = {"num_completions": group, "seed": self.args.seed, "first_row": first_row * group}
        return self.model.complete(prompts, **numbered, **self.drawn)

    def answer(self, asked: Sequence[Asked], first_row: int) -> None:
        """Prints the completion of each prompt."""
        each = [one.said for one in asked for _ in range(self.args.num_completions)]
        for prompt, completion in zip(each, self.complete(asked, first_row), strict=True):
            text = self.model.text(completion)
            if self.args.json:
                row = {"prompt": prompt, "completion": text, **vars(completion)}
                print(json.dumps(row, ensure_ascii=False), flush=True)
            else:
                print(text, flush=True)

    def chat(self) -> None:
        """A conversation on the terminal."""
        turns: list[dict[str, str]] = []
        while True:
            try:
                said = input("> ")
            except EOFError:
                return
            if not said:
                return
            turns.append({"role": "user", "content": said})
            (completion,) = self.complete([Asked(turns, self.args.image, "--chat")])[:1]
            text = self.model.text(completion)
            turns.append({"role": "assistant", "content": text})
            print(text, flush=True)


def _read_prompts(path: Path) -> Iterator[Asked]:
    from ntjax.data.placeholders import with_paths

    if not path.is_file():
        raise InputMissing(f"there is no file {path}", where="--prompts")
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = with_paths(json.loads(line), path.parent.absolute(), None)
            images = row.get("images", row.get("image")) or []
            images = images if isinstance(images, list) else [images]
            yield Asked(row["prompt"] if "prompt" in row else row["messages"], images, f"{path}:{number}")
        except (json.JSONDecodeError, TypeError, KeyError):
            raise BadData(
                f"not a row with a prompt: {line[:60]}",
                where=f"{path}:{number}",
                fix='write {"prompt": "..."}',
            ) from None


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    errors.run(main)
