"""What every decoder-only language model shares: embed, a scan over stacked blocks, norm, head, cache.

A family is one file beside this one with a `Block` and a `from_hf`. Modules are abstract: they declare weights and
never hold them; `ntjax.models.model` binds a flat dict of arrays to them.

Axes: B batch, T time, P prompts, R rows that go on from them, S columns of a row's own cache, L layers,
D embed, K key/value heads, h head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx, struct

from ntjax.elsewhere import whole
from ntjax.models.vision.pictures import Pictures, Vision
from ntjax.ops.attention import Kept, Tokens
from ntjax.ops.norms import rms_norm
from ntjax.ops.remat import rematerialised
from ntjax.ops.rope import Rope, rotations
from ntjax.params import weight


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
