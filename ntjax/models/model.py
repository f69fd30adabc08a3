"""A model as everything else knows it: a graph without weights, and pure functions of its weights.

Axes: B batch, T time, P prompts, R rows that go on from them, S columns of a row's own cache, L layers,
D embed, K key/value heads, h head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ntjax.elsewhere import whole
from ntjax.layout import Layout
from ntjax.models.decoder import Cache, Decoder, DecoderConfig
from ntjax.models.vision.pictures import Pictures
from ntjax.ops.attention import Kept, Tokens
from ntjax.ops.logprobs import Likelihood, TokenLogprobs, likelihood, token_logprobs
from ntjax.parallel import over_rows
from ntjax.params import Params, Specs
from ntjax.weights import dequantised, flat, narrowed


@dataclass(frozen=True)
class Model:
    """A model without its weights: a graph and declarations. Hashable, so a jitted function may close over it.

    `hf` is the config.json it came from, with transformers' defaults filled in; `layout` says how its weights lie on
    several devices, None that there is one. `looped` says whether decoding loops over the layers, None that it does
    so on TPUs.
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
        name = self._head

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
    def platform(self) -> str:
        """Of the devices that programs are for."""
        return self.layout.platform if self.layout else jax.default_backend()

    @property
    def parts(self) -> list[Any]:
        """The layers as decoding takes them, as indices into their stack: all at once, or one by one.

        A TPU's matmuls read a layer's weights where they lie in a stack. For a CPU's and a GPU's they would be copied
        out of it at every token.
        """
        return [slice(None)] if self.stacked else list(range(self.config.layers))

    @property
    def stacked(self) -> bool:
        """Whether decoding takes the layers all at once."""
        return self.platform == "tpu" if self.looped is None else self.looped

    def _parted(self, stack: Any) -> list[Any]:
        return [jax.tree.map(lambda x, part=part: x[part], stack) for part in self.parts]

    def layers(self, params: Params) -> list[Any]:
        """The weights of each of the `parts`, for `decode`."""
        return self._parted(nnx.split(self.bind(params).blocks)[1])

    def gathered(self, params: Params) -> Params:
        """The model's own of the weights, with no part of them on devices that have other rows."""
        params = {path: params[path] for path in self.specs}
        return _gathering(self)(params) if self.layout is not None and self.layout.gathers else params

    def ready(self, path: str, w: Any) -> Any:
        """A weight as decoding multiplies by it: in the dtype that is computed in, in a stack as a matrix."""
        w = narrowed(w, self.specs[path], self.config.dtype)
        return flat(w, self.specs[path]) if self.stacked and path.startswith("blocks.") else w

    def copies(self, params: Params) -> tuple[Params, list[Any] | None]:
        """What is worth a copy before tokens are decoded, each of which reads all weights: those that are quantised or
        aren't `ready`, DoRA's aside, and the `layers` where they are taken one by one (else None)."""
        specs, dtype = self.specs, self.config.dtype
        read = [path for path in specs if path.startswith(("blocks.", "embed", "head"))]
        numbers = {path: dequantised(params[path], specs[path], dtype) for path in read}
        ready = {path: self.ready(path, w) for path, w in numbers.items()}
        layers = None if self.stacked else self.layers(params | ready)
        own = {path: w for path, w in ready.items() if w is not params[path]}
        if layers is not None:
            own = {path: w for path, w in own.items() if not path.startswith("blocks.")}
        return own, layers

    def decode(
        self, params: Params, layers: Sequence[Any], ids: jax.Array, tokens: Tokens, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Hidden states [R, 1, D] of every row's next token [R, 1], and the cache with it."""
        return self.bind(params).decode(layers, ids, tokens, cache)

    def head(self, params: Params) -> jax.Array:
        """The output embedding [V, D], or the scores' head [labels, D]."""
        if self.config.labels:
            return params["score"]
        return params[self._head]

    @property
    def _head(self) -> str:
        """What the head of tokens is called."""
        return "embed" if self.config.tied else "head"

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


@lru_cache(maxsize=8)
def _gathering(model: Model) -> Callable[[Params], Params]:
    """What `Model.gathered` runs, compiled once."""
    layout = model.layout
    assert layout is not None

    def gather(params: Params) -> Params:
        return layout.gathered({path: model.ready(path, whole(w)) for path, w in params.items()}, model.specs)

    return jax.jit(gather)


def _on(layout: Layout | None) -> AbstractContextManager[Any]:
    """Lets kernels that XLA can't split know what mesh they run on, where no `shard_map` says so."""
    if layout is None or layout.mesh.size == 1 or not jax.sharding.get_abstract_mesh().empty:
        return nullcontext()
    return jax.sharding.use_abstract_mesh(layout.mesh.abstract_mesh)
