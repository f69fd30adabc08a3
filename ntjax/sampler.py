"""Sampling from the trainer's own weights, by the programs of `ntjax.slots`.

A slot holds a prompt and the rows that go on from it, which share its keys and values. Slots decode together, some
tokens at a time; the host then looks who is done, hands out what is complete and fills the slots that are free with
the next prompts, so nobody waits for the longest. A row's draws depend on the seed and its number alone.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from ntjax import hosts, memory
from ntjax.data.pooled import Document, Line, Pooling, pooled, room
from ntjax.draw import Sampling
from ntjax.models import Model
from ntjax.models.vision.pictures import Pictures
from ntjax.params import Params
from ntjax.slots import Prompts, Shape, State, Told, doubled, programs, state_of

__all__ = ["Completion", "Group", "Prompt", "Sampler", "Sampling"]


class Prompt(Protocol):
    """What is gone on from."""

    @property
    def tokens(self) -> Sequence[int]:
        """Its ids, at least one."""

    @property
    def documents(self) -> Sequence[Document]:
        """The same, with the pictures that it shows."""


@dataclass(frozen=True)
class Completion:
    """`tokens` drawn after a prompt, the one that stops it included, and `logprobs` of each under the softmax of the
    logits over the temperature, before any penalty or cut. `finished` is "stop" or "length"."""

    tokens: list[int]
    logprobs: list[float]
    finished: str


log = logging.getLogger(__name__)
Group = tuple[int, list[Completion]]  # a prompt's place, and its completions


class Sampler:
    """(weights, prompts) -> completions, by programs that are compiled once for a length of prompts.

    `slots` rows decode at a time, split over the devices of the model's layout; a group of rows shares its prompt's
    cache. A tokenizer is needed for stop strings, a `vision` for prompts that show pictures. `weights` are "copied" as
    products have them, once for all tokens, read as they are "held", or ("auto") copied where the devices have room.
    """

    def __init__(
        self,
        model: Model,
        sampling: Sampling,
        *,
        slots: int = 64,
        weights: str = "auto",
        tokenizer: Any = None,
        vision: Pooling | None = None,
    ):
        assert tokenizer is not None or not sampling.stop_strings
        self.model, self.sampling, self.slots = model, sampling, slots
        self.tokenizer, self.vision = tokenizer, vision
        self.weights, self._roomy = weights, dict[Shape, bool]()

    def __call__(
        self,
        params: Params,
        prompts: Sequence[Prompt],
        *,
        group: int = 1,
        seed: int = 0,
        first_row: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """`group` completions of each prompt, prompt by prompt, in rows numbered from `first_row`.

        `progress` is told how many are complete.
        """
        found: dict[int, list[Completion]] = {}
        drawn = self.groups(params, prompts, group=group, seed=seed, first_row=first_row)
        for number, completions in drawn:
            found[number] = completions
            if progress is not None:
                progress(len(found) * group)
        return [completion for number in range(len(prompts)) for completion in found[number]]

    def groups(
        self, params: Params, prompts: Sequence[Prompt], *, group: int, seed: int, first_row: int
    ) -> Iterator[Group]:
        """The same, prompts' places with their completions as they become complete: what is done with them, the devices
        decode on meanwhile."""
        layout = self.model.layout
        devices = layout.rows * layout.sequence if layout else 1
        longest = max(len(prompt.tokens) for prompt in prompts)
        shape = Shape.of(
            self.slots, group, len(prompts), longest, self.sampling.max_new_tokens, devices=devices
        )
        slots, first = shape.all_slots, first_row
        compiled = programs(self.model, self.sampling, shape, self._copies(params, shape))
        state, (own, layers) = compiled.empty(), compiled.copies(params)
        params = params | own
        waiting = iter(enumerate(prompts))
        held: list[int | None] = [None] * slots  # the prompt in each slot
        done = 0
        complete: list[Group] = []
        while done < len(prompts):
            free = _spread([slot for slot, number in enumerate(held) if number is None], shape)
            taken = [
                Taken(slot, first + number * group, prompt)
                for slot, (number, prompt) in zip(free, waiting, strict=False)
            ]
            for batch in _batches(taken, shape, self.vision):
                state = compiled.fill(params, state, batch, seed)
            for slot, row, _ in taken:
                held[slot] = (row - first) // group
            # While prompts wait, a quarter of the slots; then all.
            enough = max(1, slots // 4) if done + slots < len(prompts) else slots
            state, told = compiled.decode(params, layers, state, enough)
            yield from complete
            complete = []
            read = Told(*map(np.array, jax.device_get(told)))
            state = self._stopped(state, read, held, group)
            for slot, number in enumerate(held):
                rows_ = slice(slot * group, (slot + 1) * group)
                if number is not None and read.done[rows_].all():
                    rows = [self._completion(read, row) for row in range(rows_.start, rows_.stop)]
                    complete.append((number, rows))
                    done, held[slot] = done + 1, None
        del params, own, layers, state, told  # whoever judges the last of them may need the room
        yield from complete

    def _copies(self, params: Params, shape: Shape) -> bool:
        """Whether slots of a shape decode with copies of the weights."""
        if self.weights != "auto":
            return self.weights == "copied"
        if shape not in self._roomy:
            self._roomy[shape] = hosts.of_first(lambda: self._has_room(params, shape))
            if not self._roomy[shape]:
                log.info(
                    "no room for copies of the weights: completions are drawn from those that are held, slower"
                )
        return self._roomy[shape]

    def _has_room(self, params: Params, shape: Shape) -> bool:
        """Whether this process's devices have room for copies of the weights, beside what is there now."""
        layout = self.model.layout
        found = memory.now(layout.mesh.local_devices if layout else jax.local_devices()[:1])
        if found is None:  # XLA for CPUs makes such copies in any case, in every call
            return self.model.platform == "cpu"
        return memory.for_copies(self.model, params, state_of(self.model, self.sampling, shape), *found)

    def _stopped(self, state: State, read: Told, held: Sequence[int | None], group: int) -> State:
        """Rows whose text has come to a stop string are done, on the device too."""
        if not self.sampling.stop_strings:
            return state
        for row in range(len(held) * group):
            if held[row // group] is None:
                continue
            end = self._end(read.tokens[row, : read.length[row]].tolist())
            if end is not None:
                read.done[row], read.length[row] = True, end
        return state.replace(done=state.done | read.done)  # type: ignore[attr-defined]

    def _end(self, tokens: list[int]) -> int | None:
        """Tokens up to the one that completes the first stop string."""
        strings = self.sampling.stop_strings
        text = self.tokenizer.decode(tokens)
        if not any(stop in text for stop in strings):
            return None
        lengths = range(1, len(tokens) + 1)
        return next(n for n in lengths if any(stop in self.tokenizer.decode(tokens[:n]) for stop in strings))

    def _completion(self, read: Told, row: int) -> Completion:
        count = int(read.length[row])
        tokens = read.tokens[row, :count].tolist()
        stopped = bool(tokens) and tokens[-1] in self.sampling.stop_ids
        if self.sampling.stop_strings and not stopped:
            stopped = self._end(tokens) is not None
        return Completion(tokens, read.logprobs[row, :count].tolist(), "stop" if stopped else "length")


class Taken(NamedTuple):
    """A prompt with its slot, and the number of its first row."""

    slot: int
    row: int
    prompt: Prompt


def _spread(free: Sequence[int], shape: Shape) -> list[int]:
    """Free slots, one of each device before a second of any: the fewer are read on one device at once."""
    before: Counter[int] = Counter()
    order = []
    for slot in free:
        device = slot // shape.slots
        order.append((before[device], slot))
        before[device] += 1
    return [slot for _, slot in sorted(order)]


def _batches(taken: Sequence[Taken], shape: Shape, vision: Pooling | None = None) -> Iterator[Prompts]:
    """What `fill` reads at once: as many prompts of each device's as the one with most has, rounded up to few
    programs."""
    own: list[list[Taken]] = [[] for _ in range(shape.devices)]
    for one in taken:
        own[one.slot // shape.slots].append(one)
    for at in range(0, max(map(len, own)), shape.most):
        parts = [part[at : at + shape.most] for part in own]
        yield _padded(parts, doubled(max(map(len, parts))), shape, vision)


def _padded(parts: Sequence[Sequence[Taken]], count: int, shape: Shape, vision: Pooling | None) -> Prompts:
    """`count` places for each device's part."""
    ids = np.zeros((len(parts), count, shape.time), np.int32)
    lengths, into = np.ones(ids.shape[:2], np.int32), np.full(ids.shape[:2], shape.slots, np.int32)
    numbers = np.zeros(ids.shape[:2], np.int32)
    for device, part in enumerate(parts):
        for place, (slot, row, prompt) in enumerate(part):
            where, tokens = (device, place), prompt.tokens
            ids[device, place, : len(tokens)], lengths[where] = tokens, len(tokens)
            into[where], numbers[where] = slot % shape.slots, row
    pictures = None
    if vision is not None:
        lines = [[list(one.prompt.documents) for one in part] + [[]] * (count - len(part)) for part in parts]
        pictures = _shown([line for part in lines for line in part], shape, vision)
    return Prompts(ids.reshape(-1, shape.time), lengths.ravel(), into.ravel(), numbers.ravel(), pictures)


def _shown(lines: Sequence[Line], shape: Shape, vision: Pooling) -> Pictures | None:
    """The pictures of prompts, in a pool for each device."""
    space = room([lines], shape.devices, vision)
    return Pictures.of(pooled(lines, shape.time, shape.devices, space, vision)) if space else None  # type: ignore[arg-type]
