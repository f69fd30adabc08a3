"""A stage's weights, batches and optimizer as shapes with places: what training holds, with no array made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ntjax import lora, parts
from ntjax.config import Config
from ntjax.layout import Layout
from ntjax.marks import UNIT
from ntjax.mesh import ROWS
from ntjax.models import DecoderConfig, Model
from ntjax.params import Params, Spec, Specs, weight
from ntjax.policy import VALUE, quantisable, quantiser
from ntjax.quantised import BLOCK, NESTED, EightBit, FourBit, Kind
from ntjax.stages.base import StageConfig
from ntjax.stages.rollout import RolloutConfig
from ntjax.step import Join, union

Shape = jax.ShapeDtypeStruct
PAIRS = 8  # that a packed row holds; how many decides a few numbers a row


@dataclass(frozen=True)
class Weights:
    """Those a stage trains, those it reads, and how they make the model's (`ntjax.policy.Policy`)."""

    trainable: Params
    frozen: Params
    specs: Specs
    join: Join
    reference: Params  # what the policy is held against; of it the frozen weights are those above

    def model(self) -> Params:
        """The model's own, in which there may be adapters."""
        return jax.eval_shape(lambda a, b: self.join(a, b, None), self.frozen, self.trainable)


def weights(config: Config, stage: StageConfig, model: Model, layout: Layout) -> Weights:
    """The stage's weights before its first step."""
    settings, specs = config.model, model.specs
    sizes = {"embed": model.config.embed, "values": 1}
    value = weight(sizes, "embed -> values", "v_head.weight", init="zeros").get_metadata()["spec"]
    heads: Specs = {VALUE: value} if stage.values else {}
    where = parts.places(config, stage)
    still = parts.frozen(stage.freeze, specs, where)
    if not settings.use_lora:
        free = {path: spec for path, spec in specs.items() if path not in still}
        parts.factors(stage, specs, free, where)
        params = {path: Shape(spec.shape, settings.param_dtype) for path, spec in (free | heads).items()}
        kept = {path: Shape(specs[path].shape, settings.dtype) for path in specs if path in still}
        kept = placed(kept, specs, layout)
        reference = kept | placed(matrices_in(free, config.reference_dtype(stage)), free, layout)
        return Weights(placed(params, free | heads, layout), kept, free | heads, union, reference)
    plan = lora.plan(
        settings.lora_config,
        specs,
        where=lambda name: config.where(f"model.lora_config.{name}"),
        frozen=still,
    )
    parts.factors(stage, specs, plan.specs(specs), where)
    quantised = quantisable(specs) if quantiser(settings, specs) else set()
    frozen = {path: _frozen(config, spec, path in quantised) for path, spec in specs.items()}
    frozen = {path: jax.eval_shape(partial(layout.packed, specs[path]), w) for path, w in frozen.items()}
    frozen = {p: w for p, w in frozen.items() if not (p in plan.whole and plan.whole[p].all())}
    plain = {path: Shape(spec.shape, settings.dtype) for path, spec in specs.items()}
    start = replace(plan, start=True) if plan.changes_base else plan  # PiSSA's shapes are LoRA's
    dtype = jnp.dtype(settings.param_dtype)
    trained = jax.eval_shape(lambda base: start.initial(base, specs, jax.random.key(0), dtype)[1], plain)
    trained |= {path: Shape(spec.shape, settings.param_dtype) for path, spec in heads.items()}
    own = plan.specs(specs) | heads

    def join(frozen: Params, trainable: Params, key: Any = None) -> Params:
        return plan.join(frozen, trainable, key) | {path: trainable[path] for path in heads}

    held, adapters = placed(frozen, specs, layout), placed(trained, own, layout)
    copied = {path: adapters[path] for path in plan.whole}
    return Weights(adapters, held, own, join, held | copied)


def _frozen(config: Config, spec: Spec, quantised: bool) -> Any:
    """A frozen weight as it is held."""
    settings = config.model
    if not quantised:
        return Shape(spec.shape, settings.dtype)
    stack, matrix = spec.shape[: len(spec.stacked)], spec.shape[len(spec.stacked) :]
    if settings.load_in_8bit:
        lead = spec.shape[: len(spec.stacked) + len(spec.outputs)]
        return EightBit(Shape(spec.shape, jnp.int8), Shape(lead, jnp.float32), len(spec.inputs))
    double = settings.bnb_config.use_double_quant
    kind: Kind = "nf4" if settings.bnb_config.quant_type == "nf4" else "fp4"
    blocks = -(-int(np.prod(matrix)) // BLOCK)
    return FourBit(
        codes=Shape((*stack, blocks, BLOCK // 2), jnp.uint8),
        absmax=Shape((*stack, blocks), jnp.uint8 if double else jnp.float32),
        nested=Shape((*stack, -(-blocks // NESTED)), jnp.float32) if double else None,
        offset=Shape(stack, jnp.float32) if double else None,
        matrix=matrix,
        kind=kind,
    )


def batch(stage: StageConfig, layout: Layout, model: DecoderConfig) -> dict[str, Any]:
    """A step's rows [microbatches, rows, ...], as long as the stage lets them be, before any reference scores them. A
    model that sees is shown a picture in each."""
    rows, micros = stage.per_device_train_batch_size * layout.rows, stage.gradient_accumulation_steps
    time, ints = stage.row_length, jnp.int32
    fields: dict[str, tuple[tuple[int, ...], Any]]
    if isinstance(stage, RolloutConfig):
        fields = _window(stage, layout)
    else:
        pairs = (2,) if stage.stage_type in ("dpo", "reward") else ()
        shape = (micros, rows, *pairs, time)
        fields = {name: (shape, ints) for name in ("tokens", "segments", "positions")}
        fields["mask"] = shape, jnp.bool_
        if pairs:
            fields["pairs"] = (micros, rows, PAIRS if stage.packs else 1), jnp.bool_
    found = {name: Shape(*field) for name, field in fields.items()}
    micros, rows, *_ = found["tokens"].shape
    seen = pictures(model, found["tokens"].shape, layout.rows, rows // layout.rows)
    units = {name: Shape((micros, *x.shape), x.dtype) for name, x in seen.items() if name.startswith(UNIT)}
    return rows_placed({**found, **seen, **units}, layout)


def pictures(model: DecoderConfig, tokens: tuple[int, ...], groups: int, count: int) -> dict[str, Any]:
    """The arrays beside those of `tokens` that show so many pictures to each group of rows."""
    if model.vision is None:
        return {}
    found = {"picture_index": Shape(tokens, jnp.int32)}
    if model.rope.sections:
        found["places"] = Shape((*tokens, 3), jnp.int32)
    for name, one in model.vision.usual.items():
        found[UNIT + name] = Shape((groups, count * one.shape[0], *one.shape[1:]), one.dtype)
    return found


def _window(stage: RolloutConfig, layout: Layout) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Completions and what is known of them, as `ntjax.rollout` feeds them to a step."""
    shape, floats = stage.geometry(layout.rows), jnp.float32
    lead = (shape.accumulation, shape.rows)
    long, short = (*lead, stage.row_length), (*lead, stage.completion_length)
    fields: dict[str, tuple[tuple[int, ...], Any]]
    fields = {name: (long, jnp.int32) for name in ("tokens", "segments", "positions")}
    fields |= {"start": (lead, jnp.int32), "mask": (short, jnp.bool_)}
    if stage.values:
        fields |= {name: (short, floats) for name in ("old_logps", "old_values", "returns", "advantages")}
        return fields
    fields["advantages"] = lead, floats
    drew = "sampler_logps" if shape.steps == 1 and not stage.generate_ahead else "old_logps"
    fields[drew] = short, floats
    if shape.parts > 1:
        fields["items"] = lead, floats
    return fields


def rows_placed(arrays: Any, layout: Layout) -> Any:
    """Arrays [microbatches, rows, ...], rows split over the devices."""
    place = NamedSharding(layout.mesh, PartitionSpec(None, ROWS))
    return jax.tree.map(lambda x: at(x, place), arrays)


def matrices_in(specs: Specs, dtype: str) -> Params:
    """Weights whose matrices are held in `dtype`, as `ntjax.policy.reference` holds them."""
    return {path: Shape(spec.shape, dtype if spec.is_matrix else "float32") for path, spec in specs.items()}


def placed(params: Params, specs: Specs, layout: Layout, parted: bool | None = None) -> Params:
    """Weights where they lie between steps."""
    places = layout.shardings(params, specs, parted=parted)
    return {path: jax.tree.map(at, w, places[path]) for path, w in params.items()}


def at(x: Any, place: Any) -> Shape:
    """The shape in its place."""
    return Shape(x.shape, x.dtype, sharding=place)
