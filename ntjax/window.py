"""A window of completions on the host: who drew what, the arrays the model reads, and both as text for a checkpoint.

Axes: N completions, T time of prompt and completion, C time of completions.
"""

from __future__ import annotations

import base64
import io
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from ntjax.data.batch import Example
from ntjax.data.pooled import Pooling, pooled, room
from ntjax.data.prompts import Prompt, Prompts
from ntjax.judge import Verdict
from ntjax.metrics import Mean, Metrics
from ntjax.sampler import Completion
from ntjax.stages.rollout import Judged


@dataclass(frozen=True)
class Drawn:
    """Completions of some prompts, `group` of each, and what will be said of them."""

    numbers: list[int]  # the prompt of each completion
    completions: list[Completion]
    texts: list[str]
    verdict: Callable[[], Verdict]

    def picked(self, rows: Sequence[int], verdict: Verdict) -> Drawn:
        """Some of the completions, with the verdict on all."""
        return Drawn(
            [self.numbers[row] for row in rows],
            [self.completions[row] for row in rows],
            [self.texts[row] for row in rows],
            lambda: verdict.picked(rows),
        )

    @classmethod
    def of(cls, parts: Sequence[Drawn]) -> Drawn:
        """Those of several, one after the other."""
        return cls(
            [number for part in parts for number in part.numbers],
            [completion for part in parts for completion in part.completions],
            [text for part in parts for text in part.texts],
            lambda: reduce(operator.add, [part.verdict() for part in parts]),
        )


def window_arrays(
    prompts: Sequence[Prompt], completions: Sequence[Completion], prompt_time: int, time_: int, pad_id: int
) -> dict[str, np.ndarray]:
    """`tokens`, `segments`, `positions` [N, prompt_time + time_] with each prompt's completion right after it, and
    `start` [N]; `mask`, `sampler_logps` [N, time_] of completions; `stopped`, `lengths` [N]."""
    count, length = len(prompts), prompt_time + time_
    arrays = {
        "tokens": np.full((count, length), pad_id, np.int32),
        "segments": np.zeros((count, length), np.int32),
        "positions": np.zeros((count, length), np.int32),
        "start": np.zeros(count, np.int32),
        "mask": np.zeros((count, time_), np.bool_),
        "sampler_logps": np.zeros((count, time_), np.float32),
        "stopped": np.array([completion.finished == "stop" for completion in completions]),
        "lengths": np.array([len(completion.tokens) for completion in completions]),
    }
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        start, new = len(prompt.tokens), len(completion.tokens)
        arrays["tokens"][row, : start + new] = [*prompt.tokens, *completion.tokens]
        arrays["segments"][row, : start + new] = 1
        arrays["positions"][row, : start + new] = np.arange(start + new)
        arrays["start"][row] = start
        arrays["mask"][row, :new] = True
        arrays["sampler_logps"][row, :new] = completion.logprobs
    return arrays


def shown(
    batch: Mapping[str, np.ndarray],
    share: tuple[int, int],
    groups: int,
    prompts: Sequence[Prompt],
    vision: Pooling | None,
) -> dict[str, np.ndarray]:
    """A process's share of a batch [microbatches, rows, ...], whose rows are in so many groups over all processes.

    With `vision`, `prompt` [microbatches, rows] is replaced by the arrays of those prompts' pictures.
    """
    index, count = share

    def own(array: np.ndarray) -> np.ndarray:
        return np.split(array, count, axis=1)[index]

    if vision is None:
        return {name: own(array) for name, array in batch.items()}
    numbers, lengths = batch["prompt"], (batch["segments"] > 0).sum(axis=-1)
    mask = np.zeros(batch["tokens"].shape[-1], np.bool_)

    def line(at: tuple[int, int]) -> list[Example]:
        tokens = batch["tokens"][at][: lengths[at]]
        return [Example(tokens, mask[: len(tokens)], pictures=prompts[numbers[at]].pictures)]

    micros, rows = numbers.shape
    lines = [[line((micro, row)) for row in range(rows)] for micro in range(micros)]
    found = {name: own(array) for name, array in batch.items() if name != "prompt"}
    space = room(lines, groups, vision)
    if space is None:
        return found
    mine = slice(index * rows // count, (index + 1) * rows // count)
    each = [pooled(some[mine], len(mask), groups // count, space, vision) for some in lines]
    return found | {name: np.stack([arrays[name] for arrays in each]) for name in each[0]}


def lines_of(drawn: Drawn, verdict: Verdict, prompts: Prompts) -> list[dict[str, Any]]:
    """Completions with what their rewards say, an object each, for a file."""
    lines = []
    for row, number in enumerate(drawn.numbers):
        prompt, completion = prompts.kept[number], drawn.completions[row]
        scores = zip(verdict.labels, verdict.scores[row].tolist(), strict=True)
        lines.append(
            {
                "prompt": prompt.said,
                **({"images": [picture.name for picture in prompt.pictures]} if prompt.pictures else {}),
                "completion": drawn.texts[row],
                "rewards": {name: _finite(score) for name, score in scores},
                "tokens": len(completion.tokens),
                "finished": completion.finished,
                **({"extra": {k: v[row] for k, v in verdict.extra.items()}} if verdict.extra else {}),
            }
        )
    return lines


def told(drawn: Drawn, verdict: Verdict, judged: Judged, step: int, prompts: Prompts) -> list[dict[str, Any]]:
    """The lines of completions.jsonl that a window has."""
    each = zip(judged.rewards, judged.advantages, lines_of(drawn, verdict, prompts), strict=True)
    return [
        {"step": step, **line, "reward": _finite(reward), "advantage": _finite(advantage)}
        for reward, advantage, line in each
    ]


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def length_metrics(completions: Sequence[Completion]) -> Metrics:
    """TRL's metrics of the lengths of completions, in tokens."""
    lengths = np.array([len(completion.tokens) for completion in completions])
    stopped = np.array([completion.finished == "stop" for completion in completions])
    ended = lengths[stopped] if stopped.any() else np.zeros(1)
    one: dict[str, Callable[[np.ndarray], Any]] = {"mean": np.mean, "min": np.min, "max": np.max}
    named = {f"completions/{name}_length": f(lengths) for name, f in one.items()}
    named |= {f"completions/{name}_terminated_length": f(ended) for name, f in one.items()}
    named["completions/clipped_ratio"] = 1 - stopped.mean()
    return {name: Mean(float(value), 1.0) for name, value in named.items()}


def difference(arrays: Mapping[str, np.ndarray]) -> Metrics:
    """How far the trainer's log-probs are from the sampler's, where both are known before a step."""
    if "old_logps" not in arrays:
        return {}
    gap, mask = np.abs(arrays["old_logps"] - arrays["sampler_logps"]), arrays["mask"]
    return {
        "sampler/logprob_diff": Mean(float((gap * mask).sum()), float(mask.sum())),
        "sampler/logprob_diff_max": Mean(float((gap * mask).max()), 1.0),
    }


def packed(arrays: Mapping[str, np.ndarray]) -> str:
    """Arrays as text, for a checkpoint's JSON."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return base64.b64encode(buffer.getvalue()).decode()


def unpacked(packed: str | None) -> dict[str, np.ndarray]:
    if packed is None:
        return {}
    with np.load(io.BytesIO(base64.b64decode(packed))) as arrays:
        return dict(arrays)
