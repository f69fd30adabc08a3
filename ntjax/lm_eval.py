"""`python -m ntjax.lm_eval`: EleutherAI's lm-evaluation-harness on ntjax's models.

    python -m ntjax.lm_eval --model DIR --tasks hellaswag,gsm8k [what `lm_eval run` takes]

Once this module is imported, the harness knows the model as "ntjax": lm_eval.simple_evaluate(model="ntjax",
model_args={"pretrained": DIR}). Tokens, windows and stop sequences are those of its model "hf".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ntjax import errors
from ntjax.errors import ConfigError

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError('the harness is not installed: pip install "ntjax[lm-eval]"') from error

from ntjax.api import load
from ntjax.data.batch import Example, collate
from ntjax.data.prompts import Prompt
from ntjax.data.sizes import rounded
from ntjax.hf.tokenizer import pad_id

MOST = 256  # tokens of an answer where a task doesn't say
DRAWN = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}  # what a task may say of drawing
Request = tuple[Any, list[int], list[int]]  # (what was asked, tokens before, tokens that are scored)


@register_model("ntjax")
class NtjaxLM(TemplateLM):
    """A model for the harness; `pretrained`, `adapter`, `dtype` and `mesh` are `ntjax.load`'s.

    Contexts of more than `max_length` tokens (by default what config.json says) lose their beginning.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        adapter: str | None = None,
        dtype: str = "float32",
        mesh: dict[str, int] | None = None,
        max_length: int | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        self.model = load(pretrained, adapter=adapter, dtype=dtype, mesh=mesh)
        self.tokenizer = self.model.tokenizer
        text = self.model.model.hf.get("text_config", self.model.model.hf)
        self.max_length = int(max_length or text["max_position_embeddings"])
        groups = self.model.layout.rows
        self.rows = -(-(8 if batch_size == "auto" else int(batch_size)) // groups) * groups

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that nothing comes before."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text, special ones added as the tokenizer does, but not a second first one."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, every token of it predicted once (nats)."""
        windows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            parts = [(None, *make_disjoint_window(window)) for window in rolling]
            windows += parts
            owners += [number] * len(parts)
        sums = [0.0] * len(requests)
        for number, (logp, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += logp
        return sums

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[tuple[float, bool]]:
        """Of each request: the log-probability of the tokens that are scored, and whether all are the likeliest."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        lengths = [len(before) + len(scored) for _, before, scored in requests]
        order = sorted(range(len(requests)), key=lambda number: -lengths[number])
        for first in range(0, len(order), self.rows):
            chosen = order[first : first + self.rows]
            examples = [self._example(*requests[number][1:]) for number in chosen]
            for number, told in zip(chosen, self._scored(examples), strict=True):
                found[number] = told
        return found

    def _example(self, before: Sequence[int], scored: Sequence[int]) -> Example:
        """The tokens, of which the last is only predicted."""
        tokens = np.array([*before, *scored][-(self.max_length + 1) :], np.int32)
        return Example(tokens, np.arange(len(tokens)) >= len(tokens) - len(scored))

    def _scored(self, examples: Sequence[Example]) -> Iterator[tuple[float, bool]]:
        length = rounded(max(len(example.tokens) for example in examples), self.max_length + 1)
        slots = [[example] for example in examples] + [[]] * (self.rows - len(examples))
        batch = collate(slots, length, pad_id(self.tokenizer))
        logp, correct = map(np.asarray, self.model.scores(self.model.placed(batch), learned=True))
        for row in range(len(examples)):
            mask = batch["mask"][row]
            yield float(logp[row][mask].sum(dtype=np.float64)), bool(correct[row][mask].all())

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model goes on with after each context, up to a stop sequence of its request."""
        found = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(number)
        end = self.tokenizer.decode(self.eot_token_id)
        for numbers in alike.values():
            asked = normalize_gen_kwargs(requests[numbers[0]].args[1], MOST)
            most, until = asked["max_gen_toks"], handle_stop_sequences(list(asked["until"]), end)
            if most >= self.max_length:
                raise ConfigError(
                    f"the task draws {most} tokens, and the model reads {self.max_length}",
                    fix="give a larger max_length, or max_gen_toks in --gen_kwargs",
                )
            contexts = [
                self.tok_encode(requests[number].args[0])[-(self.max_length - most) :] for number in numbers
            ]
            drawn = _drawn(asked) | {"max_new_tokens": most, "stop_strings": tuple(until)}
            prompts = [Prompt(tokens) for tokens in contexts]
            completions = self.model.complete(prompts, slots=self.rows // self.model.layout.rows, **drawn)
            for number, completion in zip(numbers, completions, strict=True):
                found[number] = postprocess_generated_text(self.model.text(completion), until, None)
                self.cache_hook.add_partial("generate_until", requests[number].args, found[number])
        return found

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as a prompt; without a prompt for the answer, the last turn is gone on with."""
        whole = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **whole))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's."""
        return str(self.tokenizer.chat_template) if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """The model's folder."""
        return str(self.model.folder).replace("/", "__")


def _drawn(asked: dict[str, Any]) -> dict[str, Any]:
    """How to draw, as the harness's own models understand a task."""
    known = {"until", "max_gen_toks", "do_sample", *DRAWN}
    if strange := sorted(set(asked) - known):
        raise ConfigError(
            f"the task asks for {', '.join(strange)}", fix=f"there are {', '.join(sorted(known))}"
        )
    drawn = {name: asked[name] for name in DRAWN & set(asked)}
    return drawn | {"temperature": drawn.get("temperature", 1.0) if asked["do_sample"] else 0.0}


def main(argv: Sequence[str]) -> None:
    """The harness's own command line, on a model of ntjax."""
    parser = argparse.ArgumentParser(
        "ntjax lm_eval", description="All other options are those of `lm_eval run`.", allow_abbrev=False
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face folder or repository")
    parser.add_argument("--adapter", metavar="DIR", help="a PEFT adapter folder")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--max-length", type=int, metavar="N")
    parser.add_argument("--tasks", required=True, metavar="NAME,NAME")
    args, rest = parser.parse_known_args(argv)
    given = {
        "pretrained": args.model,
        "adapter": args.adapter,
        "dtype": args.dtype,
        "max_length": args.max_length,
    }
    told = ",".join(f"{name}={value}" for name, value in given.items() if value is not None)

    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", "run", "--model", "ntjax", "--model_args", told, "--tasks", args.tasks, *rest]
    cli_evaluate()


if __name__ == "__main__":
    errors.run(main)
