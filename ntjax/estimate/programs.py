"""The programs of a stage on shapes alone: config.json and settings, no weights, no data, no tokenizer.

Rows are as long as the stage lets them be, and a step holds as many as it is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ntjax import lora
from ntjax.config import Config
from ntjax.layout import MANUAL, Layout
from ntjax.mesh import HOST, ROWS, replicated
from ntjax.models import Model, build, scoring_config
from ntjax.params import Params, Specs, decays, weight
from ntjax.policy import VALUE, quantiser
from ntjax.quantised import BLOCK, NESTED, EightBit, FourBit
from ntjax.sampler import BUCKET, _doubled, _programs
from ntjax.stages.base import StageConfig
from ntjax.stages.rollout import RolloutConfig
from ntjax.step import TrainState, union
from ntjax.trainer import stage_step

STEPS = 1000  # of the schedule, which changes no program


@dataclass(frozen=True)
class Program:
    """A function and the shapes it is called with. `held` is how many bytes of its arguments a device has by kind;
    `tokens` are those of a call over all devices."""

    name: str
    function: Any  # as jax.jit gives it
    arguments: tuple[Any, ...]
    held: dict[str, int]
    tokens: int


@dataclass(frozen=True)
class Weights:
    """Shapes of a stage's weights, those it trains and those it reads, with where they lie."""

    trainable: Params
    frozen: Params
    specs: Specs
    join: Any


def programs(config: Config, stage: StageConfig, hf: dict[str, Any], layout: Layout) -> Iterator[Program]:
    """Everything that the stage compiles, the step that trains first."""
    dtype, attention = config.compute_dtype(stage), config.attention
    model = build(
        scoring_config(hf) if stage.scores else hf,
        dtype=dtype,
        remat=stage.remat or "none",
        labels=int(stage.scores),
        attention=attention,
        layout=layout,
    )
    layout.check(model.specs, lambda axis: config.where(f"mesh.{axis}"))
    weights = _weights(config, stage, model, layout)
    batch = _batch(stage, layout)
    yield _training(config, stage, model, weights, layout, batch)
    reference = _placed(_matrices_in(model.specs, dtype), model.specs, layout)
    score = stage.reference_scores(model)
    if score is not None:
        given = {
            k: v
            for k, v in batch.items()
            if k in ("tokens", "segments", "positions", "mask", "pairs", "start")
        }
        scored = jax.jit(lambda params, batch: jax.lax.map(lambda micro: score(params, micro), batch))
        yield Program("reference", scored, (reference, given), {"weights": _bytes(reference)}, _tokens(batch))
    if isinstance(stage, RolloutConfig):
        yield from _sampling(stage, model, weights, layout)
        if stage.reward_model_path is not None:
            yield _scoring(stage, hf, layout, dtype, attention)


def _training(
    config: Config, stage: StageConfig, model: Model, weights: Weights, layout: Layout, batch: Any
) -> Program:
    step, optimizer = stage_step(stage, model, weights.specs, weights.join, layout, STEPS)
    shapes = jax.eval_shape(optimizer.init, weights.trainable)
    places = layout.of_state(shapes, weights.specs)
    if config.mesh.offload_optimizer:
        near = places
        places = jax.tree.map(lambda place: place.with_memory_kind(HOST), places)
        inner = step

        def step(state: TrainState, frozen: Params, batch: Any) -> Any:
            return inner(replace(state, opt_state=jax.device_put(state.opt_state, near)), frozen, batch)

    opt_state = jax.tree.map(_at, shapes, places)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(layout.mesh))
    state = TrainState(count, weights.trainable, opt_state)
    back = jax.tree.map(lambda x: x.sharding, state)
    held = {
        "weights": _bytes(weights.trainable) + _bytes(weights.frozen),
        "optimizer": 0 if config.mesh.offload_optimizer else _bytes(opt_state),
    }
    function = jax.jit(step, donate_argnums=0, out_shardings=(back, None))
    return Program("train", function, (state, weights.frozen, batch), held, _tokens(batch))


def _sampling(stage: RolloutConfig, model: Model, weights: Weights, layout: Layout) -> Iterator[Program]:
    """Reading prompts and writing completions, as `ntjax.sampler` does with a window's worth of prompts."""
    params = _abstract(weights.join, weights.frozen, weights.trainable, None)
    joined = {path: params[path] for path in model.specs}
    whole = layout.zero >= 3
    dense = {
        path: w
        if not isinstance(w, jax.ShapeDtypeStruct) or not whole or w.ndim <= 2
        else jax.ShapeDtypeStruct(w.shape, model.config.dtype)
        for path, w in joined.items()
    }
    given = _placed(dense, model.specs, layout, parted=False)
    shape, devices = stage.geometry(layout.rows), layout.rows * layout.sequence
    slots = stage.sampler_slots * devices
    slots = _doubled(min(max(slots // shape.group, 1), shape.completions // shape.group), devices)
    time, columns = _doubled(stage.max_length, BUCKET), _doubled(stage.completion_length, BUCKET)
    compiled = _programs(model, stage.sampling((2,)), slots, shape.group, time, columns)
    rows = NamedSharding(layout.mesh, PartitionSpec(MANUAL))
    heads = NamedSharding(layout.mesh, PartitionSpec(MANUAL, layout.axis("kv_heads")))
    everywhere = replicated(layout.mesh)
    state = _abstract(compiled.empty, given)
    cache = state.cache
    layers = jax.tree.map(lambda x: _at(x, heads), cache.layers)
    at, rest = _at(cache.at, everywhere), cache.replace(at=None, layers=None)
    placed = jax.tree.map(lambda x: _at(x, rows), state.replace(cache=rest))
    state = placed.replace(cache=placed.cache.replace(at=at, layers=layers))
    held = {"weights": _bytes(given), "cache": _bytes(layers)}
    many = min(slots, _doubled(max(2**14 // time, devices), devices))
    ints = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    prompt = [ints((many, time), sharding=rows), *(ints((many,), sharding=everywhere) for _ in range(3))]
    one = ints((), sharding=everywhere)
    yield Program("prefill", compiled.fill, (given, state, *prompt, one), held, many * time)
    yield Program("decode", compiled.decode, (given, state, one), held, slots * shape.group)


def _scoring(stage: RolloutConfig, hf: dict[str, Any], layout: Layout, dtype: str, attention: str) -> Program:
    """A reward model of the policy's own shape."""
    from ntjax.scorer import _scores

    model = build(scoring_config(hf), dtype=dtype, labels=1, attention=attention, layout=layout)
    params = _placed(
        {p: jax.ShapeDtypeStruct(s.shape, dtype) for p, s in model.specs.items()}, model.specs, layout
    )
    count, time = stage.geometry(layout.rows).rows, stage.row_length
    rows = NamedSharding(layout.mesh, PartitionSpec(ROWS))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for shape in ((count, time), (count,))]
    function = jax.jit(_scores(model, 0), out_shardings=replicated(layout.mesh))
    return Program("reward", function, (params, *arrays), {"weights": _bytes(params)}, count * time)


def _weights(config: Config, stage: StageConfig, model: Model, layout: Layout) -> Weights:
    settings, specs = config.model, model.specs
    sizes = {"embed": model.config.embed, "values": 1}
    value = weight(sizes, "embed -> values", "v_head.weight", init="zeros").get_metadata()["spec"]
    heads = {VALUE: value} if stage.values else {}
    if not settings.use_lora:
        specs = specs | heads
        params = {
            path: jax.ShapeDtypeStruct(spec.shape, settings.param_dtype) for path, spec in specs.items()
        }
        return Weights(_placed(params, specs, layout), {}, specs, union)
    plan = lora.plan(
        settings.lora_config, specs, where=lambda name: config.where(f"model.lora_config.{name}")
    )
    quantised = quantiser(settings, specs) is not None
    held = {path: _frozen(config, path, spec, quantised) for path, spec in specs.items()}
    plain = {path: jax.ShapeDtypeStruct(spec.shape, settings.dtype) for path, spec in specs.items()}
    start = replace(plan, start=True) if plan.changes_base else plan
    trained = _abstract(
        lambda base: start.initial(base, specs, jax.random.key(0), jnp.dtype(settings.param_dtype))[1], plain
    )
    trained |= {path: jax.ShapeDtypeStruct(s.shape, settings.param_dtype) for path, s in heads.items()}
    own = plan.specs(specs) | heads

    def join(frozen: Params, trainable: Params, key: Any = None) -> Params:
        joined = plan.join(frozen, trainable, key)
        return {**joined, VALUE: trainable[VALUE]} if heads else joined

    held = {path: w for path, w in held.items() if not (path in plan.whole and plan.whole[path].all())}
    return Weights(_placed(trained, own, layout), _placed(held, specs, layout), own, join)


def _frozen(config: Config, path: str, spec: Any, quantised: bool) -> Any:
    """A frozen weight as it is held: the linear maps inside layers are what is quantised."""
    settings = config.model
    if not (quantised and spec.inputs and spec.stacked):
        return jax.ShapeDtypeStruct(spec.shape, settings.dtype)
    stack, matrix = spec.shape[: len(spec.stacked)], spec.shape[len(spec.stacked) :]
    shape = jax.ShapeDtypeStruct
    if settings.load_in_8bit:
        lead = spec.shape[: len(spec.stacked) + len(spec.outputs)]
        return EightBit(shape(spec.shape, jnp.int8), shape(lead, jnp.float32), len(spec.inputs))
    double, kind = settings.bnb_config.use_double_quant, settings.bnb_config.quant_type
    blocks = -(-int(np.prod(matrix)) // BLOCK)
    return FourBit(
        codes=shape((*stack, blocks, BLOCK // 2), jnp.uint8),
        absmax=shape((*stack, blocks), jnp.uint8 if double else jnp.float32),
        nested=shape((*stack, -(-blocks // NESTED)), jnp.float32) if double else None,
        offset=shape(stack, jnp.float32) if double else None,
        matrix=matrix,
        kind=kind,
    )


def _batch(stage: StageConfig, layout: Layout) -> dict[str, Any]:
    """A step's rows, [microbatches, rows, time] each, as the stage's loader and rollouts make them."""
    rows, micros, time = (
        stage.per_device_train_batch_size * layout.rows,
        stage.gradient_accumulation_steps,
        stage.row_length,
    )
    ints, floats, flags = jnp.int32, jnp.float32, jnp.bool_
    if isinstance(stage, RolloutConfig):
        shape = stage.geometry(layout.rows)
        rows, micros = shape.rows, shape.accumulation
        long, short = (micros, rows, time), (micros, rows, stage.completion_length)
        fields: dict[str, Any] = {name: (long, ints) for name in ("tokens", "segments", "positions")}
        fields |= {"start": (long[:2], ints), "mask": (short, flags), "sampler_logps": (short, floats)}
        several = stage.stage_type == "ppo"
        fields["advantages"] = (short if several else long[:2], floats)
        if several:
            fields |= {name: (short, floats) for name in ("old_logps", "old_values", "returns")}
        elif stage.geometry(1).steps > 1:
            fields["old_logps"] = (short, floats)
        if getattr(stage, "beta", 0) and not several:
            fields["ref_logps"] = (short, floats)
        if shape.parts > 1 and not several:
            fields["items"] = (long[:2], floats)
    elif stage.stage_type in ("dpo", "reward"):
        shape_ = (micros, rows, 2, time)
        fields = {name: (shape_, ints) for name in ("tokens", "segments", "positions")}
        fields |= {"mask": (shape_, flags)}
    else:
        fields = {name: ((micros, rows, time), ints) for name in ("tokens", "segments", "positions")}
        fields |= {"mask": ((micros, rows, time), flags)}
    place = NamedSharding(layout.mesh, PartitionSpec(None, ROWS))
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, (shape, dtype) in fields.items()
    }


def _matrices_in(specs: Specs, dtype: str) -> Params:
    return {p: jax.ShapeDtypeStruct(s.shape, dtype if decays(s) else "float32") for p, s in specs.items()}


def _placed(params: Params, specs: Specs, layout: Layout, parted: bool | None = None) -> Params:
    places = layout.shardings(params, specs, parted=parted)
    return {path: jax.tree.map(_at, w, places[path]) for path, w in params.items()}


def _at(x: Any, place: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def _abstract(function: Any, *arguments: Any) -> Any:
    return jax.eval_shape(function, *arguments)


def _bytes(tree: Any) -> int:
    """What a device holds of the arrays of a tree."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    )


def _tokens(batch: dict[str, Any]) -> int:
    return int(np.prod(batch["tokens"].shape))
