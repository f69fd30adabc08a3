"""The sampler's slots on the devices: programs that read prompts into them and decode all of their rows over one cache.

Slots are dealt to the devices along `MANUAL`, as many to each. A prompt is read on the device that has its slot, and
written there: no other device hears of it.

Axes: P slots, G rows of a slot, R = P * G, T prompt time, S columns of a row's cache, N prompts read at once, L layers,
K key/value heads, h head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.layout import Format
from jax.experimental.layout import Layout as Order
from jax.sharding import PartitionSpec

from ntjax.compiling import for_decoding
from ntjax.draw import Sampling, draw
from ntjax.mesh import MANUAL, replicated
from ntjax.models import Cache, Model
from ntjax.models.vision.pictures import Pictures
from ntjax.ops.attention import Kept, Tokens
from ntjax.params import Params
from ntjax.weights import einsum

BUCKET = 32  # prompt and completion lengths are rounded up to this times a power of two: few programs
STEPS = 32  # tokens that are decoded before the host looks, or fewer: until a quarter of the slots can be refilled
READ = 2**14  # tokens of prompts that are read at once
# Platform -> the order in memory of keys and of values that rows wrote, [L, R, K, S, h] in a stack, else [R, K, S, h],
# where each query has keys of its own: as XLA reads them, else it would copy all of them before and after each call.
ORDERS = {
    "tpu": ((0, 3, 2, 1, 4), (0, 3, 2, 1, 4)),
    "gpu": ((1, 0, 2, 3), (1, 0, 3, 2)),
}


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


class Prompts(NamedTuple):
    """Those that are read at once, in equal parts of each device's. Padding goes `into` a slot past the last."""

    ids: Any  # [N, T] padded on the right
    lengths: Any  # [N]
    into: Any  # [N] slots, numbered on each device by themselves
    numbers: Any  # [N] of each prompt's first row
    pictures: Pictures | None = None  # a group for each device


class Entries(NamedTuple):
    """What prompts leave in their slots."""

    into: jax.Array  # [N]
    kept: list[tuple[jax.Array, jax.Array]]  # of each layer [N, K, T, h], or [L, N, K, T, h]
    at: Tokens  # [N, T]
    last: jax.Array  # [N, D]
    lengths: jax.Array  # [N]
    keys: jax.Array  # [N, G]
    shift: jax.Array  # [N]
    seen: jax.Array | None  # [N, V]


class Shape(NamedTuple):
    """What programs are compiled for: on each of the devices `slots` prompts of up to `time` tokens, and after each a
    `group` of rows of up to `columns`."""

    devices: int
    slots: int
    group: int
    time: int
    columns: int

    @classmethod
    def of(cls, rows: int, group: int, prompts: int, longest: int, tokens: int, *, devices: int) -> Shape:
        """For `prompts` of which the longest has so many tokens, `rows` at most at a time over all devices."""
        slots = doubled(-(-min(max(rows // group, 1), prompts) // devices))
        return cls(devices, slots, group, doubled(longest, BUCKET), doubled(tokens, BUCKET))

    @property
    def most(self) -> int:
        """How many prompts a device reads at once at most."""
        return min(self.slots, doubled(max(READ // self.time // self.devices, 1)))

    @property
    def all_slots(self) -> int:
        """Over all devices."""
        return self.devices * self.slots


class Programs(NamedTuple):
    """What is compiled for one shape."""

    empty: Callable[[], State]
    copies: Callable[[Params], tuple[Params, Any]]
    fill: Callable[[Params, State, Prompts, Any], State]
    decode: Callable[[Params, Any, State, Any], tuple[State, Told]]


def state_of(model: Model, sampling: Sampling, shape: Shape) -> State:
    """That of the slots, as shapes."""
    return jax.eval_shape(_Slots(model, sampling, shape).empty)


@lru_cache(maxsize=16)
def programs(model: Model, sampling: Sampling, shape: Shape, copied: bool) -> Programs:
    """Those that fill slots and decode them: with copies of the weights (`Model.copies`), or with the weights as they
    are held, layer after layer out of their stack."""
    model = model if copied else replace(model, looped=True)
    slots, layout = _Slots(model, sampling, shape), model.layout
    where, whole = None, None
    if layout is not None:
        where, whole = formats(model, jax.eval_shape(slots.empty)), replicated(layout.mesh)
    return Programs(
        jax.jit(slots.empty, out_shardings=where),
        jax.jit(model.copies) if copied else lambda params: ({}, None),
        jax.jit(slots.fill, donate_argnums=1, out_shardings=where),
        jax.jit(
            slots.decode,
            donate_argnums=2,
            out_shardings=(where, whole),
            compiler_options=for_decoding(model.platform),
        ),
    )


def formats(model: Model, state: State) -> State:
    """Where each array of a state lies on the devices of the model's layout, and in what order."""
    layout, config = model.layout, model.config
    assert layout is not None
    places = layout.placed(partitions(state, MANUAL, layout.axis("kv_heads")))
    orders = ORDERS.get(model.platform) if config.heads == config.kv_heads else None
    if orders is None or len(orders[0]) != state.cache.layers[0].own[0].ndim:
        return places
    k, v = map(Order, orders)
    layers = tuple(
        kept._replace(own=(Format(k, kept.own[0]), Format(v, kept.own[1]))) for kept in places.cache.layers
    )
    return places.replace(cache=places.cache.replace(layers=layers))


def partitions(state: State, axes: Sequence[str], heads: str | None = None) -> State:
    """How the arrays of a state are split: slots and rows over `axes`, keys and values over `heads` too."""
    split = jax.tree.map(lambda _: PartitionSpec(axes), state)
    layers = _partitions(state.cache.layers, axes, heads)
    return split.replace(cache=split.cache.replace(layers=layers, at=PartitionSpec()))


def _partitions(kept: Any, axes: Sequence[str], heads: str | None = None) -> Any:
    """Of keys and values [.., rows or prompts, K, time, h]."""
    return jax.tree.map(lambda x: PartitionSpec(*[None] * (x.ndim - 4), axes, heads), kept)


@dataclass(frozen=True)
class _Slots:
    """The functions that programs are compiled of."""

    model: Model
    sampling: Sampling
    shape: Shape

    def empty(self) -> State:
        """No prompt in any slot."""
        config, seen = self.model.config, None
        _, _, group, time, columns = self.shape
        rows = self.shape.all_slots * group
        if self.sampling.repetition_penalty != 1:
            seen = jnp.zeros((rows, config.vocab), bool)
        return State(
            cache=self.model.cache(self.shape.all_slots, time, rows, columns),
            last=jnp.zeros((rows, config.embed), config.dtype),
            position=jnp.zeros(rows, jnp.int32),
            keys=jax.vmap(jax.random.key)(jnp.zeros(rows, jnp.uint32)),
            count=jnp.zeros(rows, jnp.int32),
            done=jnp.ones(rows, bool),
            tokens=jnp.zeros((rows, columns), jnp.int32),
            logprobs=jnp.zeros((rows, columns)),
            seen=seen,
        )

    def fill(self, params: Params, state: State, prompts: Prompts, seed: jax.Array) -> State:
        """The state with prompts in their slots, whose rows draw from `seed` and their numbers."""
        ids, lengths, into, numbers, pictures = self._dealt(prompts)
        time = jnp.broadcast_to(jnp.arange(self.shape.time), ids.shape)
        at = Tokens(time, (time < lengths[:, None]).astype(jnp.int32))
        hidden, kept = self.model.prefill(params, ids, at, pictures)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        draws = numbers[:, None] + jnp.arange(self.shape.group)
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (None, 0))
        keys = fold(jax.random.key(seed), draws)
        seen = None if state.seen is None else self._said(ids, at)
        shift = jnp.zeros_like(lengths)
        if pictures is not None and pictures.places is not None:
            shift = jnp.max(pictures.places, axis=(1, 2)) + 1 - lengths
        entries = Entries(into, kept, at, last, lengths, keys, shift, seen)
        return self._by_device(state, entries)

    def _dealt(self, prompts: Prompts) -> Prompts:
        """The prompts on the devices that have their slots."""
        layout = self.model.layout
        if layout is None:
            return prompts
        return jax.lax.with_sharding_constraint(prompts, layout.placed(PartitionSpec(MANUAL)))

    def _said(self, ids: jax.Array, at: Tokens) -> jax.Array:
        """[N, V] bool: the words of each prompt."""
        rows = jnp.arange(len(ids))[:, None]
        said = jnp.zeros((len(ids), self.model.config.vocab), bool)
        return said.at[rows, jnp.where(at.segments > 0, ids, ids[:, :1])].set(True)

    def _by_device(self, state: State, entries: Entries) -> State:
        """`_entered` on each device by itself, with its own slots: XLA would send all prompts to all of them."""
        layout = self.model.layout
        axes = tuple(axis for axis in MANUAL if layout and layout.mesh.shape[axis] > 1)
        if layout is None or not axes:
            return self._entered(state, entries)
        parted, where = PartitionSpec(axes), partitions(state, axes)
        split = jax.tree.map(lambda _: parted, entries)
        split = split._replace(kept=_partitions(entries.kept, axes))
        enter = jax.shard_map(
            self._entered,
            mesh=layout.mesh,
            in_specs=(where, split),
            out_specs=where,
            axis_names=set(axes),
            check_vma=False,
        )
        return enter(state, entries)

    def _entered(self, state: State, new: Entries) -> State:
        group, cache = self.shape.group, state.cache
        rows = (new.into[:, None] * group + jnp.arange(group)).reshape(-1)  # of these slots

        def put(old: jax.Array, entry: Any) -> jax.Array:
            return old.at[new.into].set(entry, mode="drop")

        def put_kept(old: jax.Array, entry: jax.Array) -> jax.Array:
            return old.at[..., new.into, :, :, :].set(entry, mode="drop")

        def put_rows(old: jax.Array, entry: Any) -> jax.Array:
            return old.at[rows].set(entry, mode="drop")

        def put_groups(old: jax.Array, entry: Any) -> jax.Array:
            return put_rows(old, jnp.repeat(entry, group, axis=0))

        layers = tuple(
            Kept(jax.tree.map(put_kept, old.prompt, entry), old.own)
            for old, entry in zip(cache.layers, new.kept, strict=True)
        )
        own = cache.own._replace(segments=put_rows(cache.own.segments, 0))
        shift = put_groups(cache.shift, new.shift)
        cache = Cache(layers, jax.tree.map(put, cache.prompts, new.at), own, cache.at, shift)
        return state.replace(  # type: ignore[attr-defined]
            cache=cache,
            last=put_groups(state.last, new.last),
            position=put_groups(state.position, new.lengths),
            keys=put_rows(state.keys, new.keys.reshape(-1)),
            count=put_rows(state.count, 0),
            done=put_rows(state.done, False),
            seen=None if state.seen is None else put_groups(state.seen, new.seen),
        )

    def decode(self, params: Params, layers: Any, state: State, enough: jax.Array) -> tuple[State, Told]:
        """The state some tokens later, at most `STEPS`: when `enough` slots have nothing to draw. The weights are those
        that `copies` gave, over those that are held."""
        head, shape = self.model.head(params), self.shape
        layers = self.model.layers(params) if layers is None else layers

        def goes_on(carry: tuple[jax.Array, State]) -> jax.Array:
            free = carry[1].done.reshape(shape.all_slots, shape.group).all(axis=1).sum()
            return (carry[0] < STEPS) & (free < enough)

        def body(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
            return carry[0] + 1, self._step(params, head, layers, carry[1])

        _, state = jax.lax.while_loop(goes_on, body, (jnp.zeros((), jnp.int32), state))
        return state, Told(state.count, state.done, state.tokens, state.logprobs)

    def _step(self, params: Params, head: jax.Array, layers: Sequence[Any], now: State) -> State:
        """A token of every row that isn't done."""
        sampling, columns = self.sampling, self.shape.columns
        numbers, stops = jnp.arange(len(now.done)), jnp.asarray(sampling.stop_ids or (-1,))
        logits = einsum("BTD,VD->BTV", now.last[:, None], head)[:, 0].astype(jnp.float32)
        keys = jax.vmap(jax.random.fold_in)(now.keys, now.count)
        token = draw(logits, jax.vmap(jax.random.uniform)(keys), sampling, now.seen)
        live = ~now.done
        column = jnp.where(live, now.count, columns)  # past the end: dropped
        count = now.count + live
        ended = jnp.any(token.ids[:, None] == stops, axis=-1) | (count >= sampling.max_new_tokens)
        at = Tokens(now.position[:, None], live[:, None].astype(jnp.int32))
        hidden, cache = self.model.decode(params, layers, token.ids[:, None], at, now.cache)
        return State(
            cache=cache,
            last=hidden[:, 0],
            position=now.position + live,
            keys=now.keys,
            count=count,
            done=now.done | ended,
            tokens=now.tokens.at[numbers, column].set(token.ids, mode="drop"),
            logprobs=now.logprobs.at[numbers, column].set(token.logprobs, mode="drop"),
            seen=None if now.seen is None else now.seen.at[numbers, token.ids].set(True),
        )


def doubled(length: int, bucket: int = 1) -> int:
    """`bucket` times the least power of two that holds `length`."""
    return bucket << max(0, -(-length // bucket) - 1).bit_length()
