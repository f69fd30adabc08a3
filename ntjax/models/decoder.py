"""What every decoder-only language model shares: embed, a scan over stacked blocks, norm, head, cache.

A family is one file beside this one with a `Block` and a `from_hf`. Modules are abstract: they declare weights and
never hold them. `Model` binds a flat dict of arrays to the modules inside a pure function.

Axes: B batch, T time, S cache slots, D embed, K key/value heads, h head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx, struct

from ntjax.ops.attention import Tokens
from ntjax.ops.norms import rms_norm
from ntjax.ops.rope import Rope, rotations
from ntjax.params import Params, Specs, weight


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
    remat: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        """Axis name -> size."""
        names = ("vocab", "embed", "mlp", "layers", "heads", "kv_heads", "head_dim", "labels")
        return {name: getattr(self, name) for name in names}


@struct.dataclass
class Cache:
    """Keys and values of the tokens so far. All rows write slot `filled` next: prompts are padded on the left."""

    k: jax.Array  # [layers, B, S, K, h]
    v: jax.Array  # [layers, B, S, K, h]
    tokens: Tokens  # [B, S] each; segment 0 where nothing was written
    filled: jax.Array  # [] int32


class Block(Protocol):
    """One layer: x [B, T, D] -> x, and what it wrote to its slice of the cache."""

    def __call__(
        self, x: jax.Array, context: Context, cache: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, Any]: ...


class Context(struct.PyTreeNode):
    """What all layers share: the angles of each token, where queries and keys stand, the cache slot to write."""

    rotation: tuple[jax.Array, jax.Array]
    queries: Tokens
    keys: Tokens
    slot: jax.Array | None = None


class Decoder(nnx.Module):
    """tokens -> hidden states, from a family's block."""

    def __init__(self, config: DecoderConfig, block: nnx.Module):
        sizes = config.sizes
        self.config = config
        self.embed = weight(sizes, "vocab embed", "model.embed_tokens.weight")
        self.blocks = block
        self.norm = weight(sizes, "embed", "model.norm.weight", init="ones")
        if config.labels:
            self.score = weight(sizes, "embed -> labels", "score.weight")
        elif not config.tied:
            self.head = weight(sizes, "embed -> vocab", "lm_head.weight")

    def __call__(self, ids: jax.Array, tokens: Tokens, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        config = self.config
        x = self.embed.get_value()[ids].astype(config.dtype)
        slot = None
        keys = tokens
        if cache is not None:
            slot = cache.filled
            keys = jax.tree.map(
                lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, slot)), cache.tokens, tokens
            )
        context = Context(rotations(config.rope, tokens), tokens, keys, slot)
        graph, layers = nnx.split(self.blocks)

        def layer(x: jax.Array, scanned: tuple[Any, Any]) -> tuple[jax.Array, Any]:
            return nnx.merge(graph, scanned[0])(x, context, scanned[1])

        body = jax.checkpoint(layer, prevent_cse=False) if config.remat else layer
        x, written = jax.lax.scan(body, x, (layers, None if cache is None else (cache.k, cache.v)))
        if cache is not None:
            k, v = written
            cache = Cache(k, v, keys, cache.filled + ids.shape[1])
        return rms_norm(x, self.norm.get_value(), config.eps), cache


@dataclass(frozen=True)
class Model:
    """A model without its weights: a graph and declarations. Hashable, so a jitted function may close over it.

    `hf` is the config.json it came from, with transformers' defaults filled in.
    """

    config: DecoderConfig
    graph: nnx.GraphDef
    specs: Specs = field(hash=False, compare=False)
    hf: dict[str, Any] = field(hash=False, compare=False)

    @classmethod
    def of(cls, decoder: Decoder, hf: dict[str, Any]) -> Model:
        """The model that `decoder` declares."""
        graph, state = nnx.split(decoder)
        specs = {
            ".".join(map(str, path)): param.get_metadata()["spec"] for path, param in nnx.to_flat_state(state)
        }
        return cls(decoder.config, graph, specs, hf)

    def bind(self, params: Params) -> Decoder:
        """The module with these weights in it."""
        leaves = [(tuple(path.split(".")), nnx.Param(params[path])) for path in sorted(self.specs)]
        return nnx.merge(self.graph, nnx.from_flat_state(leaves))

    def hidden(
        self, params: Params, ids: jax.Array, tokens: Tokens, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Normalised last hidden states [B, T, D] of ids [B, T] int32, and the cache with these tokens in it.

        Embedding look-up clamps ids that are out of range silently: they are checked on the host.
        """
        return self.bind(params)(ids, tokens, cache)

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

    def cache(self, batch: int, slots: int) -> Cache:
        """An empty cache for `batch` rows of up to `slots` tokens."""
        config = self.config
        shape = (config.layers, batch, slots, config.kv_heads, config.head_dim)
        empty = jnp.zeros((batch, slots), jnp.int32)
        return Cache(
            jnp.zeros(shape, config.dtype),
            jnp.zeros(shape, config.dtype),
            Tokens(empty, empty),
            jnp.zeros((), jnp.int32),
        )
