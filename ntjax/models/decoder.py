"""What every decoder-only language model shares: embed, a scan over stacked blocks, norm, head, cache.

Decoding loops over the layers too, with their cache carried along and written in place; on CPU it takes them one by one
(`Model.parts`).

A family is one file beside this one with a `Block` and a `from_hf`. Modules are abstract: they declare weights and
never hold them. `Model` binds a flat dict of arrays to the modules inside a pure function.

Axes: B batch, T time, P prompts, R rows that go on from them, S columns of a row's own cache, L layers,
D embed, K key/value heads, h head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx, struct

from ntjax.layout import Layout
from ntjax.models.vision.pictures import Pictures, Vision
from ntjax.ops.attention import Kept, Tokens
from ntjax.ops.logprobs import Likelihood, TokenLogprobs, likelihood, token_logprobs
from ntjax.ops.norms import rms_norm
from ntjax.ops.remat import rematerialised
from ntjax.ops.rope import Rope, rotations
from ntjax.parallel import over_rows
from ntjax.params import Params, Specs, weight
from ntjax.weights import whole


@dataclass(frozen=True)
class DecoderConfig:
    """The numbers of a decoder, under this house's names; `hf` has them under Hugging Face's."""

    vocab: int
    embed: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    eps: float
    tied: bool
    activation: str = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    labels: int = 0  # above 0: a head of scores instead of one of tokens
    window: int | None = None
    attention: str = "xla"  # a kernel of ops/attention
    dtype: str = "float32"  # of activations and of matmuls; weights are cast to it where they are used
    remat: str | tuple[str, ...] = "none"  # see ops/remat
    prefix: str = "model."  # of the Hugging Face names
    vision: Vision | None = None  # what a family that sees has beside the language model

    @property
    def sizes(self) -> dict[str, int]:
        """Axis name -> size."""
        names = ("vocab", "embed", "mlp", "layers", "heads", "kv_heads", "head_dim", "labels")
        return {name: getattr(self, name) for name in names}

    @property
    def layer(self) -> str:
        """What the Hugging Face names of a layer begin with."""
        return self.prefix + "layers.{layers}."


@struct.dataclass
class Cache:
    """Keys and values of prompts, and of the tokens that rows wrote after them.

    All rows write column `at` next, and after the last column the first: a row that has not written S tokens loses
    none. A column whose segment is 0 isn't seen.
    """

    layers: tuple[Kept, ...]  # one each, or all as one stack
    prompts: Tokens  # [P, T] each
    own: Tokens  # [R, S] each
    at: jax.Array  # [] int32
    shift: jax.Array  # [R] int32: how far rotations are ahead of positions, after pictures (below 0: behind)


class Block(Protocol):
    """One layer: x [B, T, D] -> x, and its keys and values, or the cache with them in it."""

    def __call__(self, x: jax.Array, context: Context, cache: Kept | None) -> tuple[jax.Array, Any]: ...


class Context(struct.PyTreeNode):
    """What all layers share: each token's angles and place; whether keys and values are kept; whether other devices
    have other tokens of the rows; and, with a cache, the places of prompts and of what was written after them, and
    the column to write."""

    rotation: tuple[jax.Array, jax.Array]
    tokens: Tokens
    keep: bool = struct.field(pytree_node=False, default=False)
    parted: bool = struct.field(pytree_node=False, default=False)
    before: tuple[Tokens, Tokens] | None = None
    at: jax.Array | None = None


class Decoder(nnx.Module):
    """tokens -> hidden states, from a family's block."""

    def __init__(self, config: DecoderConfig, block: nnx.Module):
        sizes = config.sizes
        self.config = config
        self.embed = weight(sizes, "vocab embed", config.prefix + "embed_tokens.weight")
        self.blocks = block
        self.norm = weight(sizes, "embed", config.prefix + "norm.weight", init="ones")
        if config.labels:
            self.score = weight(sizes, "embed -> labels", "score.weight")
        elif not config.tied:
            self.head = weight(sizes, "embed -> vocab", "lm_head.weight")

    def embedded(self, ids: jax.Array, pictures: Pictures | None) -> jax.Array:
        """What the first layer reads [B, T, D]: words, and in families that see, pictures among them."""
        return whole(self.embed.get_value())[ids].astype(self.config.dtype)

    def __call__(
        self,
        ids: jax.Array,
        tokens: Tokens,
        pictures: Pictures | None = None,
        *,
        keep: bool = False,
        parted: bool = False,
    ) -> tuple[jax.Array, Any]:
        config = self.config
        x = self.embedded(ids, pictures)
        turned = rotations(config.rope, tokens, pictures.places if pictures else None)
        context = Context(turned, tokens, keep, parted)
        graph, layers = nnx.split(self.blocks)

        def layer(x: jax.Array, weights: Any) -> tuple[jax.Array, Any]:
            return nnx.merge(graph, weights)(x, context, None)

        x, kept = jax.lax.scan(rematerialised(layer, config.remat), x, layers)
        return rms_norm(x, self.norm.get_value(), config.eps), kept

    def decode(
        self, layers: Sequence[Any], ids: jax.Array, tokens: Tokens, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """The next token of every row: ids [R, 1] -> hidden states [R, 1, D]."""
        config = self.config
        x = self.embed.get_value()[ids].astype(config.dtype)
        at = cache.at % cache.own.segments.shape[1]
        own = jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice(x, y, (0, at)), cache.own, tokens)
        shifted = Tokens(tokens.positions + cache.shift[:, None], tokens.segments)
        context = Context(rotations(config.rope, shifted), tokens, before=(cache.prompts, own), at=at)
        written = []
        for weights, kept in zip(layers, cache.layers, strict=True):
            x, kept = self._continued(x, weights, context, kept)
            written.append(kept)
        cache = Cache(tuple(written), cache.prompts, own, cache.at + 1, cache.shift)
        return rms_norm(x, self.norm.get_value(), config.eps), cache

    def _continued(self, x: jax.Array, weights: Any, context: Context, kept: Kept) -> tuple[jax.Array, Kept]:
        """x [R, 1, D] after a layer, or after a stack of them, and their cache."""
        graph, _ = nnx.split(self.blocks)
        if not kept.stacked:
            return nnx.merge(graph, weights)(x, context, kept)

        def layer(carry: tuple[jax.Array, Any], given: tuple[jax.Array, Any]) -> tuple[Any, None]:
            (x, own), (number, weights) = carry, given
            x, written = nnx.merge(graph, weights)(x, context, Kept(kept.prompt, own, number))
            return (x, written.own), None

        each = jnp.arange(len(kept.own[0])), weights
        (x, own), _ = jax.lax.scan(layer, (x, kept.own), each)
        return x, Kept(kept.prompt, own)


@dataclass(frozen=True)
class Model:
    """A model without its weights: a graph and declarations. Hashable, so a jitted function may close over it.

    `hf` is the config.json it came from, with transformers' defaults filled in; `layout` says how its weights lie on
    several devices, None that there is one. `looped` says whether decoding loops over the layers, None that it does
    so unless they are on CPU.
    """

    config: DecoderConfig
    graph: nnx.GraphDef
    specs: Specs = field(hash=False, compare=False)
    hf: dict[str, Any] = field(hash=False, compare=False)
    layout: Layout | None = None
    looped: bool | None = None

    @classmethod
    def of(cls, decoder: Decoder, hf: dict[str, Any], layout: Layout | None = None) -> Model:
        """The model that `decoder` declares."""
        graph, state = nnx.split(decoder)
        specs = {
            ".".join(map(str, path)): param.get_metadata()["spec"] for path, param in nnx.to_flat_state(state)
        }
        return cls(decoder.config, graph, specs, hf, layout)

    def bind(self, params: Params) -> Decoder:
        """The module with these weights in it."""
        leaves = [(tuple(path.split(".")), nnx.Param(params[path])) for path in sorted(self.specs)]
        return nnx.merge(self.graph, nnx.from_flat_state(leaves))

    def hidden(
        self, params: Params, ids: jax.Array, tokens: Tokens, pictures: Pictures | None = None
    ) -> jax.Array:
        """Normalised last hidden states [B, T, D] of ids [B, T] int32, some of which stand for pictures.

        Embedding look-up clamps ids that are out of range silently: they are checked on the host.
        """
        layout = self.layout
        if layout is None:
            return self.bind(params)(ids, tokens, pictures)[0]

        def hidden(params: Params, ids: jax.Array, tokens: Tokens, at: Any = None, units: Any = None) -> Any:
            seen = None if units is None else Pictures(at[0], units, at[1])
            with _on(layout):
                return self.bind(params)(ids, tokens, seen, parted=layout.sequence > 1)[0]

        params = {path: params[path] for path in self.specs}
        if pictures is None:
            return over_rows(layout, hidden, params, self.specs, ids, tokens)
        at = pictures.index, pictures.places
        return over_rows(layout, hidden, params, self.specs, ids, tokens, at, units=pictures.units)

    def logprobs(
        self, params: Params, hidden: jax.Array, targets: jax.Array, wanted: jax.Array
    ) -> TokenLogprobs:
        """`token_logprobs` under the head of tokens: hidden [B, T, D], targets [B, T] int32, which of them are
        `wanted` [B, T] bool -> [B, T] each."""
        return self._under_head(token_logprobs, params, hidden, targets, wanted)

    def likelihood(
        self, params: Params, hidden: jax.Array, targets: jax.Array, wanted: jax.Array
    ) -> Likelihood:
        """Sums of `logprobs` over the tokens that are wanted, with a cheaper gradient."""

        def sums(*given: jax.Array) -> Likelihood:
            return jax.tree.map(lambda x: x.reshape(1, 1), likelihood(*given))  # of a device's own tokens

        return jax.tree.map(jnp.sum, self._under_head(sums, params, hidden, targets, wanted))

    def _under_head(self, function: Callable[..., Any], params: Params, hidden: jax.Array, *of: Any) -> Any:
        """`function(hidden, head, *of)`, on each device of its own rows and tokens."""
        if self.layout is None:
            return function(hidden, self.head(params), *of)
        name = "embed" if self.config.tied else "head"

        def own(params: Params, hidden: jax.Array, *of: Any) -> Any:
            return function(hidden, whole(params[name]), *of)

        return over_rows(self.layout, own, {name: params[name]}, self.specs, hidden, *of)

    def prefill(
        self, params: Params, ids: jax.Array, tokens: Tokens, pictures: Pictures | None = None
    ) -> tuple[jax.Array, list[Any]]:
        """`hidden`, and the keys and values of each of the `parts`: [B, K, T, h], or [L, B, K, T, h]."""
        with _on(self.layout):
            hidden, kept = self.bind(params)(ids, tokens, pictures, keep=True)
        return hidden, self._parted(kept)

    @property
    def parts(self) -> list[Any]:
        """The layers as decoding takes them, as indices into their stack: all at once, or one by one.

        A TPU's matmuls read a layer's weights where they lie in a stack (a GPU's are taken to: not measured). For a
        CPU's they would be copied out of it at every token.
        """
        looped = _platform(self.layout) != "cpu" if self.looped is None else self.looped
        return [slice(None)] if looped else list(range(self.config.layers))

    def _parted(self, stack: Any) -> list[Any]:
        return [jax.tree.map(lambda x, part=part: x[part], stack) for part in self.parts]

    def layers(self, params: Params) -> list[Any]:
        """The weights of each of the `parts`, for `decode`: what is copied is copied once, not at every token."""
        return self._parted(nnx.split(self.bind(params).blocks)[1])

    def decode(
        self, params: Params, layers: Sequence[Any], ids: jax.Array, tokens: Tokens, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Hidden states [R, 1, D] of every row's next token [R, 1], and the cache with it."""
        return self.bind(params).decode(layers, ids, tokens, cache)

    def head(self, params: Params) -> jax.Array:
        """The output embedding [V, D], or the scores' head [labels, D]."""
        if self.config.labels:
            return params["score"]
        return params["embed" if self.config.tied else "head"]

    def exported(self, pad_id: int) -> dict[str, Any]:
        """The config.json of this model's folder; its weights are written as they are computed with, not quantised.

        transformers takes a sequence's score at the last token that isn't `pad_id`.
        """
        config = {key: value for key, value in self.hf.items() if key != "quantization_config"}
        return {**config, "pad_token_id": pad_id} if self.config.labels else config

    def cache(self, prompts: int, prompt_time: int, rows: int, columns: int) -> Cache:
        """An empty cache of `prompts`, and of `rows`, a whole number of them a prompt, of up to `columns` tokens."""
        config = self.config

        def empty(count: int, time: int) -> tuple[jax.Array, jax.Array]:
            shape = (config.layers, count, config.kv_heads, time, config.head_dim)
            return jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)

        def nowhere(*shape: int) -> Tokens:
            return Tokens(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32))

        layers = self._parted(Kept(empty(prompts, prompt_time), empty(rows, columns)))
        places = nowhere(prompts, prompt_time), nowhere(rows, columns)
        return Cache(tuple(layers), *places, jnp.zeros((), jnp.int32), jnp.zeros(rows, jnp.int32))


def _on(layout: Layout | None) -> AbstractContextManager[Any]:
    """Lets kernels that XLA can't split know what mesh they run on, where no `shard_map` says so."""
    if layout is None or layout.mesh.size == 1 or not jax.sharding.get_abstract_mesh().empty:
        return nullcontext()
    return jax.sharding.use_abstract_mesh(layout.mesh.abstract_mesh)


def _platform(layout: Layout | None) -> str:
    """Of the devices that programs are for."""
    return layout.mesh.devices.flat[0].platform if layout else jax.default_backend()
