"""Tokens a second of the sampler beside transformers' `generate` on the same prompts, and what refilling slots gains.

    python scripts/bench/sampler.py models/smollm2-135m-instruct

Both draw at temperature 1 in fp32 and keep log-probs; ratios are of runs next to one another, the median of the rounds.
Lengths are mixed: a row ends where a token that is drawn about every 40 tokens comes up.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # torch's idle threads would slow down what runs beside them

import jax
import torch
from transformers import AutoModelForCausalLM

from ntjax.data.prompts import Prompt
from ntjax.hf.files import read_config
from ntjax.hf.folder import load_params
from ntjax.hf.tokenizer import load_tokenizer
from ntjax.models import build
from ntjax.sampler import Sampler, Sampling

QUESTIONS = [
    "What is the capital of France?",
    "Write a sentence about the sea.",
    "What is 7 + 5? Answer with the number only, and then explain how you came to it in two sentences.",
    "Who wrote Hamlet?",
    "Explain to a child of six why the sky is blue in the morning and red in the evening, in a few words.",
    "Name three colours.",
    "Give me a recipe for pancakes.",
    "Translate 'good morning' into Spanish.",
]
NEW, LONG = 64, 128
COMMON = (30, 28, 198)  # ".", ",", "\n" of SmolLM2: rows that stop at them have lengths from 1 to NEW
END = (30,)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    tokenizer: Any = load_tokenizer(args.model)
    turns = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [tokenizer.apply_chat_template(t, add_generation_prompt=True, return_dict=False) for t in turns]
    model = build(read_config(args.model))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = load_params(args.model, model.specs, dtype="float32", sharding=lambda path: place)
    theirs = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)

    def ours(rows: int, stops: tuple[int, ...], slots: int, group: int = 1) -> Callable[[], int]:
        sampler = Sampler(model, Sampling(LONG if stops == END else NEW, stop_ids=stops), slots=slots)
        asked = [Prompt(prompts[i % 8]) for i in range(rows // group)]
        return lambda: sum(len(c.tokens) for c in sampler(params, asked, group=group))

    def transformers(rows: int, stops: tuple[int, ...]) -> Callable[[], int]:
        chosen = [prompts[i % 8] for i in range(rows)]
        longest = max(map(len, chosen))
        ids = torch.tensor([[2] * (longest - len(p)) + p for p in chosen])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in chosen])
        options: dict[str, Any] = {"eos_token_id": list(stops) or [49151], "pad_token_id": 2}
        options |= {"do_sample": True, "top_k": 0, "temperature": 1.0, "max_new_tokens": NEW}

        def run() -> int:
            with torch.no_grad():
                out = theirs.generate(ids, attention_mask=mask, **options)[:, longest:]
            ended = torch.isin(out, torch.tensor(options["eos_token_id"])).int()
            return int((ended.cumsum(1) - ended == 0).sum())

        return run

    print(f"{'':44}{'ntjax':>8}{'other':>8}{'ratio':>8}   tokens/s")
    for rows in (8, 16):
        for name, stops in (("64 tokens each", ()), ("mixed lengths", COMMON)):
            label = f"batch {rows}, {name}, transformers"
            compare(label, ours(rows, stops, rows), transformers(rows, stops), args.rounds)
    label = "4 prompts x 8, 64 tokens each, transformers"
    compare(label, ours(32, (), 32, group=8), transformers(32, ()), args.rounds)
    compare("64 rows, 1 to 128 tokens, 8 slots, no refill", ours(64, END, 8), batches(ours, 8), args.rounds)


def batches(ours: Callable[..., Callable[[], int]], slots: int) -> Callable[[], int]:
    """The same 64 rows in batches that wait for their longest."""
    one = ours(slots, END, slots)
    return lambda: sum(one() for _ in range(64 // slots))


def compare(label: str, one: Callable[[], int], other: Callable[[], int], rounds: int) -> None:
    """A line: medians of tokens a second, and of the ratio of neighbours."""
    one(), other()  # compiles, warms up
    speeds = [(speed(one), speed(other)) for _ in range(rounds)]
    mine, theirs = (statistics.median(column) for column in zip(*speeds, strict=True))
    ratio = statistics.median(a / b for a, b in speeds)
    print(f"{label:44}{mine:8.0f}{theirs:8.0f}{ratio:8.2f}", flush=True)


def speed(run: Callable[[], int]) -> float:
    """Tokens a second of one run."""
    began = time.perf_counter()
    return run() / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
