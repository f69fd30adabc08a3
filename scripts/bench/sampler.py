"""Drawing completions on a CPU, beside transformers' `generate` on the same prompts: the table `sampler` of
docs/benchmarks.md.

    python scripts/bench/sampler.py [--rounds N] [--only ROW ...] [--toy]

SmolLM2-135M, fp32, temperature 1, log-probs kept by ntjax alone; a step is all completions of a row, its tokens are
those drawn up to the one that ends a completion. Mixed lengths: a completion ends at a token that is drawn about every
40 tokens, or more often with three of them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cpu import model_of
from harness import Row, main, measured

ROOT = Path(__file__).parents[2]
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
COMMON, RARE = (".", ",", "\n"), (".",)  # texts of a token of SmolLM2 that end a completion


class Draws(NamedTuple):
    """`rows` completions of at most `new` tokens, a `group` of each prompt, which end at the tokens `ends`; `slots` are
    drawn at a time."""

    rows: int
    new: int
    slots: int
    ends: tuple[str, ...] = ()
    group: int = 1


def small(draws: Draws) -> Draws:
    """The same for a check."""
    return draws._replace(rows=draws.rows // 4, slots=draws.slots // 4, new=draws.new // 8, group=1)


def prompts(folder: Path, draws: Draws) -> tuple[list[list[int]], list[int]]:
    """The ids of each prompt, and of the tokens that end a completion."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    turns = [[{"role": "user", "content": question}] for question in QUESTIONS]
    ids = [tokenizer.apply_chat_template(t, add_generation_prompt=True, return_dict=False) for t in turns]
    ends = [tokenizer.encode(text, add_special_tokens=False)[0] for text in draws.ends]
    return [ids[n % len(ids)] for n in range(draws.rows // draws.group)], ends


def runs(draws: Draws, draw: Callable[[], list[int]], warm: Callable[[], Any]) -> dict[str, Any]:
    """Measures `draw`, which returns the tokens of each completion, after `warm`."""
    began = time.perf_counter()
    warm()
    first, seconds, cpu, tokens = time.perf_counter() - began, [], [], []
    for _ in range(1 if draws.rows > draws.slots else 2):
        wall, used = time.perf_counter(), time.process_time()
        tokens.append(sum(draw()))
        seconds.append(time.perf_counter() - wall)
        cpu.append(time.process_time() - used)
    return measured(seconds, cpu, tokens=tokens, first_s=first)


def ntjax(draws: Draws, args: argparse.Namespace, *, refill: bool = True) -> dict[str, Any]:
    """ntjax's sampler; without `refill` in batches that wait for their longest completion."""

    from ntjax.data.prompts import Prompt
    from ntjax.hf.files import read_config
    from ntjax.hf.folder import load_params
    from ntjax.models import build
    from ntjax.sampler import Sampler, Sampling

    draws, folder = small(draws) if args.toy else draws, model_of(args)
    ids, ends = prompts(folder, draws)
    asked, model = [Prompt(one) for one in ids], build(read_config(folder))
    params = load_params(folder, model.specs, dtype="float32")
    sampler = Sampler(model, Sampling(draws.new, stop_ids=tuple(ends)), slots=draws.slots)
    many = len(asked) if refill else draws.slots
    parts = [asked[at : at + many] for at in range(0, len(asked), many)]

    def draw() -> list[int]:
        return [len(c.tokens) for part in parts for c in sampler(params, part, group=draws.group)]

    return runs(draws, draw, warm=draw)


def transformers(draws: Draws, args: argparse.Namespace) -> dict[str, Any]:
    """`generate` in batches of as many rows as ntjax has slots, prompts padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM

    draws, folder = small(draws) if args.toy else draws, model_of(args)
    ids, ends = prompts(folder, draws)
    chosen = [one for one in ids for _ in range(draws.group)]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    never = model.config.vocab_size - 1  # without an end `generate` takes the model's own
    options: dict[str, Any] = {"eos_token_id": ends or [never], "pad_token_id": 0}
    options |= {"do_sample": True, "top_k": 0, "temperature": 1.0}

    def batch(rows: list[list[int]], new: int = draws.new) -> list[int]:
        longest = max(map(len, rows))
        tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        with torch.no_grad():
            drawn = model.generate(tokens, attention_mask=mask, max_new_tokens=new, **options)[:, longest:]
        ended = torch.isin(drawn, torch.tensor(options["eos_token_id"])).int()
        return (ended.cumsum(1) - ended == 0).sum(1).tolist()

    parts = [chosen[at : at + draws.slots] for at in range(0, len(chosen), draws.slots)]
    return runs(draws, lambda: [n for part in parts for n in batch(part)], warm=lambda: batch(parts[0], 2))


def beside(name: str, what: str, draws: Draws, asked: str = "") -> Row:
    """ntjax and transformers."""
    return Row(
        name, what, {"ntjax": partial(ntjax, draws), "transformers": partial(transformers, draws)}, asked
    )


MANY = Draws(64, 128, 8, RARE)
ROWS = [
    beside("8", "batch 8, 64 tokens each", Draws(8, 64, 8)),
    beside("8-mixed", "batch 8, 1 to 64 tokens", Draws(8, 64, 8, COMMON)),
    beside("16", "batch 16, 64 tokens each", Draws(16, 64, 16)),
    beside("16-mixed", "batch 16, 1 to 64 tokens", Draws(16, 64, 16, COMMON)),
    beside("group", "4 prompts x 8, 64 tokens each", Draws(32, 64, 32, group=8)),
    beside("64", "64 prompts, 1 to 128 tokens, 16 at a time", MANY._replace(slots=16), "3"),
    Row(
        "refill",
        "64 prompts, 1 to 128 tokens, 8 at a time",
        {"ntjax": partial(ntjax, MANY), "ntjax, no slot refilled": partial(ntjax, MANY, refill=False)},
    ),
]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "smollm2-135m-instruct")
    kept = Path(tempfile.gettempdir()) / "ntjax-bench-compiled"  # a round compiles, the others find it there
    environment = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "JAX_COMPILATION_CACHE_DIR": str(kept)}
    environment |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    main("sampler", ROWS, parser, ("jax", "torch", "transformers"), **environment)
