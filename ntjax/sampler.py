"""Sampling from the trainer's own weights: compiled prefill and decoding over one static cache.

A slot holds a prompt and the rows that go on from it, which share its keys and values. Slots decode together, some
tokens at a time; the host then looks who is done, hands out what is complete and fills the slots that are free with
the next prompts, so nobody waits for the longest. A row's draws depend on the seed and its number alone.

Axes: P slots, G rows of a slot, R = P * G, T prompt time, S columns of a row's cache, N prompts put in at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from ntjax.draw import Sampling, draw
from ntjax.layout import MANUAL
from ntjax.models import Cache, Model
from ntjax.ops.attention import Kept, Tokens
from ntjax.params import Params
from ntjax.weights import einsum

__all__ = ["Completion", "Prompt", "Sampler", "Sampling"]

BUCKET = 32  # prompt and completion lengths are rounded up to this times a power of two: few programs
STEPS = 32  # tokens that are decoded before the host looks, or fewer: until a quarter of the slots can be refilled
READ = 2**14  # tokens of prompts that are read at once


class Prompt(Protocol):
    """What is gone on from."""

    @property
    def tokens(self) -> Sequence[int]:
        """Its ids, at least one."""


@dataclass(frozen=True)
class Completion:
    """`tokens` drawn after a prompt, the one that stops it included, and `logprobs` of each under the softmax of the
    logits over the temperature, before any penalty or cut. `finished` is "stop" or "length"."""

    tokens: list[int]
    logprobs: list[float]
    finished: str


@struct.dataclass
class State:
    """All slots: what decoding changes, and donates."""

    cache: Cache
    last: jax.Array  # [R, D] the hidden state that the next token is drawn from
    position: jax.Array  # [R] of the next token
    keys: jax.Array  # [R] of random numbers
    count: jax.Array  # [R] tokens drawn
    done: jax.Array  # [R] bool
    tokens: jax.Array  # [R, S]
    logprobs: jax.Array  # [R, S]
    seen: jax.Array | None  # [R, V] bool, where tokens are penalised for it


class Told(NamedTuple):
    """What the host looks at."""

    length: Any
    done: Any
    tokens: Any
    logprobs: Any


class Sampler:
    """(weights, prompts) -> completions, by programs that are compiled once for a length of prompts.

    `slots` rows decode at a time, split over the devices of the model's layout; a group of rows shares its prompt's
    cache. A tokenizer is needed for stop strings.
    """

    def __init__(
        self,
        model: Model,
        sampling: Sampling,
        *,
        slots: int = 64,
        tokenizer: Any = None,
    ):
        assert tokenizer is not None or not sampling.stop_strings
        self.model, self.sampling, self.slots = model, sampling, slots
        self.tokenizer = tokenizer

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
        layout = self.model.layout
        devices = layout.rows * layout.sequence if layout else 1
        longest = max(len(prompt.tokens) for prompt in prompts)
        shape = Shape.of(
            self.slots, group, len(prompts), longest, self.sampling.max_new_tokens, devices=devices
        )
        slots, time = shape.slots, shape.time
        compiled = programs(self.model, self.sampling, shape)
        state = compiled.empty(params)
        waiting = iter(enumerate(prompts))
        held: list[int | None] = [None] * slots  # the prompt in each slot
        found: dict[int, list[Completion]] = {}
        while len(found) < len(prompts):
            free = [slot for slot, number in enumerate(held) if number is None]
            taken = [(slot, *next_) for slot, next_ in zip(free, waiting, strict=False)]
            most = max(READ // time, devices)
            for part in (taken[at : at + most] for at in range(0, len(taken), most)):
                rows = [first_row + number * group for _, number, _ in part]
                count = shape.read(len(part), devices)
                state = compiled.fill(params, state, *_padded(part, rows, count, slots, time), seed)
            held = _with(held, taken)
            # While prompts wait, a quarter of the slots; then all.
            enough = max(1, slots // 4) if len(found) + slots < len(prompts) else slots
            state, told = compiled.decode(params, state, enough)
            read = Told(*map(np.array, jax.device_get(told)))
            state = self._stopped(state, read, held, group)
            for slot, number in enumerate(held):
                rows_ = slice(slot * group, (slot + 1) * group)
                if number is not None and read.done[rows_].all():
                    found[number] = [self._completion(read, row) for row in range(rows_.start, rows_.stop)]
                    held[slot] = None
            if progress is not None:
                progress(len(found) * group)
        return [completion for number in range(len(prompts)) for completion in found[number]]

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


class Shape(NamedTuple):
    """What programs are compiled for: `slots` prompts of up to `time` tokens, and after each a `group` of rows of up to
    `columns`."""

    slots: int
    group: int
    time: int
    columns: int

    @classmethod
    def of(cls, rows: int, group: int, prompts: int, longest: int, tokens: int, *, devices: int) -> Shape:
        """For `prompts` of which the longest has so many tokens, `rows` at most at a time, split over devices."""
        slots = _doubled(min(max(rows // group, 1), prompts), devices)
        return cls(slots, group, _doubled(longest, BUCKET), _doubled(tokens, BUCKET))

    def read(self, prompts: int, devices: int) -> int:
        """For how many prompts the program is that reads so many at once."""
        return min(self.slots, _doubled(min(prompts, max(READ // self.time, devices)), devices))


class Programs(NamedTuple):
    """What is compiled for one shape."""

    empty: Callable[..., State]
    fill: Callable[..., State]
    decode: Callable[..., tuple[State, Any]]


@lru_cache(maxsize=16)
def programs(model: Model, sampling: Sampling, shape: Shape) -> Programs:
    """Those that fill slots and decode them."""
    slots, group, time, columns = shape
    rows, layout = slots * group, model.layout

    def placed(tree: Any, spec: PartitionSpec) -> Any:
        if layout is None:
            return tree
        return jax.tree.map(
            lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, spec)), tree
        )

    def split(state: State) -> State:
        """Slots and rows over the devices, and their keys and values as the heads are."""
        whole, parted = PartitionSpec(), PartitionSpec(MANUAL)
        cache = state.cache
        heads = PartitionSpec(MANUAL, layout.axis("kv_heads") if layout else None)
        at, layers = placed(cache.at, whole), placed(cache.layers, heads)
        cache, rest = cache.replace(at=None, layers=None), state.replace(cache=None)  # type: ignore[attr-defined]
        cache, rest = placed(cache, parted), placed(rest, parted)
        return rest.replace(cache=cache.replace(at=at, layers=layers))

    def empty(params: Params) -> State:
        seen = None
        if sampling.repetition_penalty != 1:
            seen = jnp.zeros((rows, model.config.vocab), bool)
        return split(
            State(
                cache=model.cache(slots, time, rows, columns),
                last=jnp.zeros((rows, model.config.embed), model.config.dtype),
                position=jnp.zeros(rows, jnp.int32),
                keys=jax.vmap(jax.random.key)(jnp.zeros(rows, jnp.uint32)),
                count=jnp.zeros(rows, jnp.int32),
                done=jnp.ones(rows, bool),
                tokens=jnp.zeros((rows, columns), jnp.int32),
                logprobs=jnp.zeros((rows, columns)),
                seen=seen,
            )
        )

    @partial(jax.jit, donate_argnums=1)
    def fill(
        params: Params,
        state: State,
        ids: jax.Array,  # [N, T] padded on the right
        lengths: jax.Array,  # [N]
        into: jax.Array,  # [N] slots; one past the last for none
        numbers: jax.Array,  # [N] of each prompt's first row
        seed: jax.Array,
    ) -> State:
        ids, lengths = placed((ids, lengths), PartitionSpec(MANUAL))
        places = jnp.broadcast_to(jnp.arange(time), ids.shape)
        at = Tokens(places, (places < lengths[:, None]).astype(jnp.int32))
        hidden, kept = model.prefill(params, ids, at)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        each = (into[:, None] * group + jnp.arange(group)).reshape(-1)  # rows of these slots
        draws = (numbers[:, None] + jnp.arange(group)).reshape(-1)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), draws)

        def put(old: jax.Array, where: jax.Array, new: Any) -> jax.Array:
            return old.at[where].set(new, mode="drop")

        def of_group(x: jax.Array) -> jax.Array:
            return jnp.repeat(x, group, axis=0)

        cache = state.cache
        layers = tuple(
            Kept(jax.tree.map(lambda old, new: put(old, into, new), old.prompt, new), old.own)
            for old, new in zip(cache.layers, kept, strict=True)
        )
        cache = Cache(
            layers,
            jax.tree.map(lambda old, new: put(old, into, new), cache.prompts, at),
            Tokens(cache.own.positions, put(cache.own.segments, each, 0)),
            cache.at,
        )
        seen = state.seen
        if seen is not None:
            said = jnp.zeros((len(ids), model.config.vocab), bool)
            said = said.at[jnp.arange(len(ids))[:, None], jnp.where(at.segments > 0, ids, ids[:, :1])].set(
                True
            )
            seen = put(seen, each, of_group(said))
        return split(
            state.replace(  # type: ignore[attr-defined]
                cache=cache,
                last=put(state.last, each, of_group(last)),
                position=put(state.position, each, of_group(lengths)),
                keys=put(state.keys, each, keys),
                count=put(state.count, each, 0),
                done=put(state.done, each, False),
                seen=seen,
            )
        )

    @partial(jax.jit, donate_argnums=1)
    def decode(params: Params, state: State, enough: jax.Array) -> tuple[State, Any]:
        head, layers = model.head(params), model.layers(params)
        stops = jnp.asarray(sampling.stop_ids or (-1,))
        numbers = jnp.arange(rows)

        def body(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
            step, now = carry
            logits = einsum("BTD,VD->BTV", now.last[:, None], head)[:, 0].astype(jnp.float32)
            keys = jax.vmap(jax.random.fold_in)(now.keys, now.count)
            token = draw(logits, jax.vmap(jax.random.uniform)(keys), sampling, now.seen)
            live = ~now.done
            column = jnp.where(live, now.count, columns)  # past the end: dropped
            count = now.count + live
            ended = jnp.any(token.ids[:, None] == stops, axis=-1) | (count >= sampling.max_new_tokens)
            at = Tokens(now.position[:, None], live[:, None].astype(jnp.int32))
            hidden, cache = model.decode(params, layers, token.ids[:, None], at, now.cache)
            seen = now.seen
            if seen is not None:
                seen = seen.at[numbers, token.ids].set(True)
            return step + 1, split(
                State(
                    cache=cache,
                    last=hidden[:, 0],
                    position=now.position + live,
                    keys=now.keys,
                    count=count,
                    done=now.done | ended,
                    tokens=now.tokens.at[numbers, column].set(token.ids, mode="drop"),
                    logprobs=now.logprobs.at[numbers, column].set(token.logprobs, mode="drop"),
                    seen=seen,
                )
            )

        def goes_on(carry: tuple[jax.Array, State]) -> jax.Array:
            free = carry[1].done.reshape(slots, group).all(axis=1).sum()
            return (carry[0] < STEPS) & (free < enough)

        _, state = jax.lax.while_loop(goes_on, body, (jnp.zeros((), jnp.int32), state))
        told = Told(state.count, state.done, state.tokens, state.logprobs)
        return state, placed(told, PartitionSpec())

    return Programs(jax.jit(empty), fill, decode)


def _padded(
    part: Sequence[tuple[int, int, Prompt]], rows: Sequence[int], count: int, slots: int, time: int
) -> tuple[np.ndarray, ...]:
    """Arrays for `fill`, of `count` prompts: those past the last go nowhere."""
    ids = np.zeros((count, time), np.int32)
    lengths, into = np.ones(count, np.int32), np.full(count, slots, np.int32)
    numbers = np.zeros(count, np.int32)
    for place, (slot, _, prompt) in enumerate(part):
        tokens = prompt.tokens
        ids[place, : len(tokens)], lengths[place] = tokens, len(tokens)
        into[place], numbers[place] = slot, rows[place]
    return ids, lengths, into, numbers


def _with(held: Sequence[int | None], taken: Sequence[tuple[int, int, Prompt]]) -> list[int | None]:
    now = {slot: number for slot, number, _ in taken}
    return [now.get(slot, number) for slot, number in enumerate(held)]


def _doubled(length: int, bucket: int) -> int:
    """`bucket` times the least power of two that holds `length`."""
    return bucket << max(0, -(-length // bucket) - 1).bit_length()
