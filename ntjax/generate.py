"""`python -m ntjax.generate`: the rollout sampler, for people."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ntjax import errors
from ntjax.errors import BadData, ConfigError, InputMissing

BATCH, SLOTS = 64, 8  # prompts of a file that are taken at once, completions that are decoded together


def main(argv: Sequence[str]) -> None:
    """Parses the command line and prints completions."""
    parser = argparse.ArgumentParser("ntjax generate", description="Samples from a model folder.")
    parser.add_argument("--model", required=True, help="a Hugging Face folder or repository")
    parser.add_argument("--adapter", help="a PEFT adapter folder; --model is the model it was trained on")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="one prompt: a user's turn if the model has a chat template")
    source.add_argument(
        "--prompts", metavar="FILE.jsonl", help='rows with "prompt" (text or messages) or "messages"'
    )
    source.add_argument("--chat", action="store_true", help="talk to it; an empty line or Ctrl-D ends")
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
    speaker = Speaker(args)
    if args.chat:
        speaker.chat()
        return
    prompts = [args.prompt] if args.prompt is not None else list(_read_prompts(Path(args.prompts)))
    for start in range(0, len(prompts), BATCH):
        speaker.answer(prompts[start : start + BATCH], start)


class Speaker:
    """A loaded model and how to draw from it."""

    def __init__(self, args: argparse.Namespace):
        import jax

        from ntjax.hf.files import read_config
        from ntjax.hf.folder import load_params
        from ntjax.hf.hub import locate
        from ntjax.hf.peft import load_adapter
        from ntjax.hf.tokenizer import load_tokenizer, stop_ids
        from ntjax.models import build
        from ntjax.sampler import Sampler, Sampling

        folder = locate(args.model)
        self.args = args
        self.model = build(read_config(folder), dtype=args.dtype, attention="auto")
        self.tokenizer: Any = load_tokenizer(folder)
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        self.params = load_params(
            folder, self.model.specs, dtype=args.dtype, sharding=lambda path, shapes: place
        )
        if args.adapter:
            plan, adapter = load_adapter(locate(args.adapter), self.model.specs)
            self.params = plan.join(self.params, adapter)
        sampling = Sampling(
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            stop_ids=tuple(stop_ids(folder, self.tokenizer)),
            stop_strings=tuple(args.stop),
        )
        self.sampler = Sampler(self.model, sampling, slots=SLOTS, tokenizer=self.tokenizer)

    def complete(self, prompts: Sequence[Any], first_row: int = 0) -> list[Any]:
        """Completions of prompts, each text or messages, the first of them row `first_row` of a file."""
        from ntjax.data.prompts import Prompt

        group = self.args.num_completions
        drawing = {"group": group, "seed": self.args.seed, "first_row": first_row * group}
        return self.sampler(self.params, [Prompt(self._tokens(prompt)) for prompt in prompts], **drawing)

    def answer(self, prompts: Sequence[Any], first_row: int) -> None:
        """Prints the completion of each prompt."""
        each = [prompt for prompt in prompts for _ in range(self.args.num_completions)]
        for prompt, completion in zip(each, self.complete(prompts, first_row), strict=True):
            text = self.tokenizer.decode(completion.tokens, skip_special_tokens=True)
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
            text = self.tokenizer.decode(self.complete([turns])[0].tokens, skip_special_tokens=True)
            turns.append({"role": "assistant", "content": text})
            print(text, flush=True)

    def _tokens(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            if self.args.raw or self.tokenizer.chat_template is None:
                ids = self.tokenizer(prompt)["input_ids"]
                if not ids:
                    raise BadData(
                        "an empty prompt has no token to go on from", fix="give at least one character"
                    )
                return ids
            prompt = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)


def _read_prompts(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise InputMissing(f"there is no file {path}", where="--prompts")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield row["prompt"] if "prompt" in row else row["messages"]
        except (json.JSONDecodeError, TypeError, KeyError):
            raise BadData(
                f"not a row with a prompt: {line[:60]}",
                where=f"{path}:{number}",
                fix='write {"prompt": "..."}',
            ) from None


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    errors.run(main)
