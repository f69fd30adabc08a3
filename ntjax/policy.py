"""The weights of a stage: those it trains, those it only reads, and the reference it is held against.

A weight is trained whole, or frozen, or frozen with an adapter around it. Adapters make the frozen weights the
reference as well: the same arrays without them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from ntjax import lora
from ntjax.config import ModelConfig
from ntjax.elsewhere import whole
from ntjax.errors import BadData, ConfigError
from ntjax.hf.folder import HARMLESS, Quantise, load_params, open_weights
from ntjax.hf.peft import load_adapter
from ntjax.layout import Layout, placing
from ntjax.lora import Plan
from ntjax.models import Model
from ntjax.params import Params, Specs, initial, unused, weight
from ntjax.quantised import EightBit, FourBit, Kind, quantise_4bit, quantise_8bit
from ntjax.step import Join, union
from ntjax.targets import Where
from ntjax.weights import dense

VALUE, VALUE_FILE = "value", "value_head.safetensors"
LANGUAGE_HEAD = r"^lm_head\.weight$"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Policy:
    """`join(frozen, trainable, key)` are the model's weights; `specs` declare the trainable ones."""

    trainable: Params
    frozen: Params
    specs: Specs
    plan: Plan | None = None
    start: Params | None = None  # the adapters' first values, where PiSSA took them out of the base

    @property
    def join(self) -> Join:
        """(frozen, trainable, dropout key or None) -> the model's weights, and the value head where there is one."""
        join = self.plan.join if self.plan else union
        if VALUE not in self.specs:
            return join

        def with_head(frozen: Params, trainable: Params, key: jax.Array | None = None) -> Params:
            return {**join(frozen, trainable, key), VALUE: trainable[VALUE]}

        return with_head


def adapters(
    settings: ModelConfig,
    specs: Specs,
    folder: Path | None,
    *,
    where: Where = lambda setting: None,
    frozen: Collection[str] = (),
    dropout: bool = True,
) -> tuple[Plan | None, tuple[Plan, Params] | None]:
    """What is trained of adapters (None: weights themselves are), none of it at the paths `frozen`, with its `dropout`
    or without, and the adapter in the PEFT `folder`.

    Raises ConfigError at `where(setting)`: no module is a target, or the adapter to go on with isn't the one that
    settings describe.
    """
    adapter = None
    if folder is not None:
        adapter = load_adapter(folder, specs)
    if not settings.use_lora:
        return None, adapter
    plan = lora.plan(settings.lora_config, specs, where=where, frozen=frozen)
    if "head" in plan.ranks:
        raise ConfigError(
            "an adapter on lm_head would form whole logits",
            where=where("target_modules"),
            fix='leave it out, or train it whole: modules_to_save = ["lm_head"]',
        )
    if adapter is not None and not plan.has(adapter[0]):
        raise ConfigError(
            f"the adapter in {folder} has other ranks, scales or modules than [model.lora_config]",
            where=where("r"),
            fix="write the settings it was trained with, the stage's freeze included, or merge_adapter = true to "
            "start a new one on it",
        )
    return plan if dropout else replace(plan, rate=0.0), adapter


def load_policy(
    source: Path,
    model: Model,
    settings: ModelConfig,
    *,
    plan: Plan | None = None,
    adapter: tuple[Plan, Params] | None = None,
    seed: int = 0,
    layout: Layout | None = None,
    frozen: Collection[str] = (),
) -> Policy:
    """The weights in `source`, of which `plan` says what is trained: a new adapter, or `adapter` on.

    Without a plan all weights but those at the paths `frozen` are trained, with the adapter merged into them. What is
    frozen is held in `settings.dtype` or quantised, what is trained in `settings.param_dtype`.

    Raises what `hf.folder.load_params` raises.
    """
    key = jax.random.key(seed)
    if plan is None:
        held_in = dict.fromkeys(frozen, settings.dtype)
        params = load(source, model, settings.param_dtype, key, layout, dtypes=held_in)
        if adapter:
            joined = adapter[0].join(params, adapter[1])
            for path, w in joined.items():
                params[path] = jax.device_put(dense(w, params[path].dtype), params[path].sharding)
        kept = {path: params.pop(path) for path in model.specs if path in frozen}
        return Policy(params, kept, {path: model.specs[path] for path in params})
    held = load(source, model, settings.dtype, key, layout, quantiser(settings, model.specs))
    trained = jnp.dtype(settings.param_dtype)
    base, trainable = plan.initial(held, model.specs, jax.random.fold_in(key, 1), trained)
    start = None
    if adapter:
        trainable |= {path: array.astype(trained) for path, array in adapter[1].items()}
    elif plan.changes_base:
        start = jax.tree.map(jnp.copy, trainable)
    # A weight that is trained in every layer has nothing left to freeze.
    base = {path: w for path, w in base.items() if not (path in plan.whole and plan.whole[path].all())}
    return Policy(trainable, base, plan.specs(model.specs), plan, start)


def with_values(policy: Policy, embed: int, source: Path) -> Policy:
    """The policy with a head of values on its last hidden states, trained with it: the one in `source`, which an
    earlier stage left there, else zeros, so that values start without an opinion and leave the policy as it is."""
    sizes = {"embed": embed, "values": 1}
    spec = weight(sizes, "embed -> values", "v_head.weight", init="zeros").get_metadata()["spec"]
    head = initial({VALUE: spec}, jax.random.key(0))[VALUE]
    if (source / VALUE_FILE).exists():
        head = load_file(source / VALUE_FILE)[spec.hf]
        if head.shape != spec.shape:
            raise BadData(
                f"{spec.hf} has the shape {head.shape}, not {spec.shape}",
                where=str(source / VALUE_FILE),
                fix="remove it to start with values of zero",
            )
    trainable = {**policy.trainable, VALUE: jnp.asarray(head)}
    return replace(policy, trainable=trainable, specs={**policy.specs, VALUE: spec})


def reference(policy: Policy, *, continued: bool, dtype: str) -> Params:
    """The weights as they are before the first step, for comparison while training goes on.

    A new adapter changes nothing yet, so the frozen weights are the reference; one that is `continued`, or that PiSSA
    took out of the base, is copied. Weights trained as a whole are copied too, matrices in `dtype`; frozen ones never
    are.
    """
    if policy.plan is None:

        def copied(path: str, w: jax.Array) -> jax.Array:
            held = dtype if policy.specs[path].is_matrix else w.dtype
            return jax.device_put(jnp.array(whole(w), held, copy=True), w.sharding)

        own = {path: copied(path, w) for path, w in policy.trainable.items() if path != VALUE}
        return policy.frozen | own
    now = jax.tree.map(jnp.copy, policy.trainable)
    now.pop(VALUE, None)
    if continued or not policy.plan.starts_at_nothing:
        return policy.plan.join(policy.frozen, now, None)
    return replace(policy.plan, ranks={}, scales={}).join(policy.frozen, now, None)


class Size(NamedTuple):
    """Weights and the bytes that hold them."""

    weights: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.weights:,} weights in {self.bytes / 1e6:,.1f} MB"


def size(params: Params) -> Size:
    """Of all weights together; a quantised one counts the weights it stands for."""
    weights = sum(math.prod(w.shape) for w in params.values())
    return Size(weights, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))


def is_quantised(w: Any) -> bool:
    """Whether a weight is held in 4 or 8 bits."""
    return isinstance(w, FourBit | EightBit)


def quantisable(specs: Specs) -> set[str]:
    """Paths of the linear maps inside layers, a vision tower's too, as bitsandbytes' integration in transformers takes
    them; heads, embeddings, norms and projectors stay as they are, and what nothing reads."""
    return {path for path, spec in specs.items() if spec.linear and spec.stacked} - unused(specs)


def quantiser(settings: ModelConfig, specs: Specs) -> Quantise | None:
    """How weights are quantised on their way in; None: they are not."""
    if not (settings.load_in_4bit or settings.load_in_8bit):
        return None
    chosen = {path: len(specs[path].inputs) for path in quantisable(specs)}

    def quantise(path: str, tensor: np.ndarray) -> Any:
        if path not in chosen:
            return None
        if settings.load_in_8bit:
            return quantise_8bit(tensor, chosen[path])
        bnb = settings.bnb_config
        kind: Kind = "nf4" if bnb.quant_type == "nf4" else "fp4"
        return quantise_4bit(tensor, kind, bnb.use_double_quant, tensor.shape)

    return quantise


def load(
    source: Path,
    model: Model,
    dtype: str,
    key: jax.Array,
    layout: Layout | None = None,
    quantise: Quantise | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> Params:
    """The model's weights from a folder, in `dtype` or that which `dtypes` has for their path. A language model that
    becomes a scoring one is given a new head of scores, N(0, 0.02) as transformers draws it, and loses its own."""
    weights, specs, ignore = open_weights(source), model.specs, list(HARMLESS)
    drawn: Params = {}
    if model.config.labels and "score.weight" not in weights.names():
        drawn = initial({"score": specs["score"]}, key, jnp.dtype((dtypes or {}).get("score", dtype)))
        specs = {path: spec for path, spec in specs.items() if path != "score"}
        ignore.append(LANGUAGE_HEAD)
        log.info("%s has no score.weight: it starts from random numbers", source)
    lie = placing(layout, specs) if layout else {}
    params = load_params(weights, specs, dtype=dtype, dtypes=dtypes, ignore=ignore, quantise=quantise, **lie)
    return {**params, **(layout.put(drawn, model.specs) if layout else drawn)}
