"""The programs of a stage on shapes alone: config.json and settings, no weights, no data, no tokenizer.

Rows are as long as the stage lets them be, completions are drawn to their full length, and reward models that aren't
there yet are taken to be of the policy's own shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ntjax.config import Config
from ntjax.errors import InputMissing
from ntjax.estimate import shapes
from ntjax.estimate.shapes import Shape, Weights, at
from ntjax.hf.files import read_config
from ntjax.hf.hub import locate
from ntjax.layout import Layout
from ntjax.loop import fetching, stage_step
from ntjax.marks import UNIT
from ntjax.memory import for_copies, held
from ntjax.mesh import MANUAL, ROWS, on_host, replicated
from ntjax.models import Model, build, is_scoring, scoring_config
from ntjax.models.vision.pictures import Pictures
from ntjax.params import Params
from ntjax.scorer import scores
from ntjax.slots import Programs as Sampler
from ntjax.slots import Prompts, formats, state_of
from ntjax.slots import Shape as Slots
from ntjax.slots import programs as sampler_programs
from ntjax.stages.base import StageConfig
from ntjax.stages.rollout import RolloutConfig
from ntjax.step import TrainState

STEPS = 1000  # of the schedule, which changes no program
TRAIN = "train"
SCORED = (
    "tokens",
    "segments",
    "positions",
    "mask",
    "start",
    "pairs",
    "picture_index",
    "places",
)  # of a batch, by the reference and the policy


@dataclass(frozen=True)
class Program:
    """A jitted function and the shapes it is called with.

    `held` is how many bytes of its arguments a device has, by kind, `beside` what else lies there meanwhile. A call is
    of `tokens` over all devices, and there are `calls` of it in an optimizer step.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    held: dict[str, int]
    beside: dict[str, int]
    tokens: int
    calls: float = 1.0


@dataclass(frozen=True)
class Programs:
    """Of one stage on one mesh. `hf` is the config.json it starts from, `memory` the bytes of a device, if known."""

    config: Config
    stage: StageConfig
    hf: dict[str, Any]
    layout: Layout
    memory: float | None = None

    def __iter__(self) -> Iterator[Program]:
        """All that the stage runs, the step that trains first."""
        model = self.model
        weights = shapes.weights(self.config, self.stage, model, self.layout)
        train = self.train(model, weights)
        yield train
        around = {**train.beside, **train.held}
        yield from self._scoring(model, weights, around)
        if isinstance(self.stage, RolloutConfig):
            yield from self._sampling(self.stage, model, weights, around)
            if self.stage.reward_model_path is not None:
                yield self._rewarding(self.stage, around)

    @cached_property
    def model(self) -> Model:
        """The stage's own."""
        config, stage, layout = self.config, self.stage, self.layout
        model = build(
            scoring_config(self.hf) if stage.scores else self.hf,
            dtype=config.compute_dtype(stage),
            remat=stage.remat or "none",
            labels=int(stage.scores),
            attention=config.model.attention,
            layout=layout,
        )
        layout.check(model.specs, lambda axis: config.where(f"mesh.{axis}"))
        return model

    def train(self, model: Model, weights: Weights) -> Program:
        """The step."""
        layout, stage = self.layout, self.stage
        step, optimizer = stage_step(stage, model, weights.specs, weights.join, layout, STEPS)
        opt_state = jax.eval_shape(optimizer.init, weights.trainable)
        places = layout.of_state(opt_state, weights.specs)
        if self.config.mesh.offload_optimizer:
            step, places = fetching(step, places), on_host(places)
        opt_state = jax.tree.map(at, opt_state, places)
        count: Any = Shape((), jnp.int32, sharding=replicated(layout.mesh))
        state = TrainState(count, weights.trainable, opt_state)
        batch = shapes.batch(stage, layout, model.config)
        if (reference := self.reference(weights)) is not None:
            batch |= shapes.rows_placed(jax.eval_shape(*self._scored(*reference, batch)), layout)
        function = jax.jit(
            step, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None)
        )
        kinds = {"weights": held(weights.trainable) + held(weights.frozen)}
        if not self.config.mesh.offload_optimizer:
            kinds["optimizer"] = held(opt_state)
        arguments = state, weights.frozen, batch
        return Program(TRAIN, function, arguments, kinds, self._beside(weights), batch["tokens"].size)

    def reference(self, weights: Weights) -> tuple[Model, Params] | None:
        """The model and the weights that the policy is held against, where the loss looks at them."""
        config, named = self.config, getattr(self.stage, "reference_model_path", None)
        hf = self._found(named)
        dtype = config.compute_dtype(self.stage)
        model = build(hf, dtype=dtype, attention=config.model.attention, layout=self.layout)
        if self.stage.reference_scores(model) is None:
            return None
        if named is None:
            return model, weights.reference
        params = shapes.matrices_in(model.specs, config.reference_dtype(self.stage))
        return model, shapes.placed(params, model.specs, self.layout)

    def _beside(self, weights: Weights) -> dict[str, int]:
        """What lies on a device through the whole stage, and isn't the step's."""
        stage, found = self.stage, {}
        reference = self.reference(weights)
        early = getattr(stage, "precompute_ref_log_probs", False)
        if reference is not None and not early and (own := held(_own(weights, reference[1]))):
            found["reference"] = own
        if isinstance(stage, RolloutConfig) and stage.reward_model_path is not None:
            found["reward model"] = held(self._reward_weights(stage)[1])
        return found

    def _scored(self, model: Model, params: Params, batch: dict[str, Any]) -> tuple[Any, Params, Any]:
        """The program that scores a step's rows, and what it is called with."""
        score = self.stage.reference_scores(model)
        assert score is not None
        rows = _scorable(batch)
        return jax.jit(lambda params, batch: jax.lax.map(partial(score, params), batch)), params, rows

    def _scoring(self, model: Model, weights: Weights, around: dict[str, int]) -> Iterator[Program]:
        """What the reference and the policy say of the rows before a step sees them."""
        stage, batch = self.stage, shapes.batch(self.stage, self.layout, model.config)
        calls = 1.0
        if isinstance(stage, RolloutConfig):
            shape = stage.geometry(self.layout.rows)
            calls = shape.parts / shape.steps
        reference = self.reference(weights)
        if reference is not None:
            function, params, rows = self._scored(*reference, batch)
            own = held(_own(weights, params))
            kinds = {"reference": own, "weights": held(params) - own}
            rest = {**around, "reference": 0, "weights": around["weights"] - kinds["weights"]}
            kinds, rest = (_there(sizes) for sizes in (kinds, rest))
            yield Program("reference", function, (params, rows), kinds, rest, batch["tokens"].size, calls)
        score = stage.policy_scores(model) if isinstance(stage, RolloutConfig) else None
        if score is not None:
            rows = _scorable(batch)

            def scored(trainable: Params, frozen: Params, batch: Any) -> Any:
                params = weights.join(frozen, trainable, None)
                return jax.lax.map(partial(score, params), batch)

            kinds, rest = {"weights": around["weights"]}, dict(around)
            del rest["weights"]
            arguments = weights.trainable, weights.frozen, rows
            yield Program("policy", jax.jit(scored), arguments, kinds, rest, batch["tokens"].size, calls)

    def _sampling(
        self, stage: RolloutConfig, model: Model, weights: Weights, around: dict[str, int]
    ) -> Iterator[Program]:
        """Reading prompts and writing completions, as `ntjax.sampler` does for a window."""
        layout = self.layout
        params = self._gathered(model, weights.model())
        shape, devices = stage.geometry(layout.rows), layout.rows * layout.sequence
        prompts = shape.completions // shape.group
        longest, tokens = stage.max_length, stage.completion_length
        size = Slots.of(stage.sampler_slots * devices, shape.group, prompts, longest, tokens, devices=devices)
        taken = sum(around.values()) + held(params) * layout.gathers
        compiled = self._sampler(stage, model, params, size, taken)
        state = jax.eval_shape(compiled.empty)
        state = jax.tree.map(at, state, formats(model, state))
        rows, whole = NamedSharding(layout.mesh, PartitionSpec(MANUAL)), replicated(layout.mesh)
        count, ints = size.most * devices, partial(Shape, dtype=jnp.int32)
        each, one = ints((count,), sharding=whole), ints((), sharding=whole)
        seen = shapes.pictures(model.config, (count, size.time), devices, size.most)
        pictures = jax.tree.map(lambda x: at(x, rows), jax.eval_shape(Pictures.of, seen))
        read = Prompts(ints((count, size.time), sharding=rows), each, each, each, pictures)
        own, layers = _copies(compiled, params)
        name = "sampler's weights" if layout.gathers else "weights"
        every = held(params) + held(own) + held(layers)

        def lying(used: Any) -> tuple[dict[str, int], dict[str, int]]:
            """What lies on a device, of a program's arguments and beside them, while it uses some of the weights."""
            kinds = {name: held(used), "cache": held(state)}
            rest = {kind: size for kind, size in around.items() if kind not in kinds}
            return kinds, _there(rest | {"other copies of weights": every - held(used)})

        filled = params | own
        calls = prompts / count / shape.steps
        given = filled, state, read, one
        yield Program("prefill", compiled.fill, given, *lying(filled), count * size.time, calls)
        written = stage.completion_length * -(-prompts // size.all_slots) / shape.steps
        rows_drawn = size.all_slots * shape.group
        apart = {path: w for path, w in filled.items() if layers is None or not path.startswith("blocks.")}
        given = filled, layers, state, one
        yield Program("decode", compiled.decode, given, *lying((apart, layers)), rows_drawn, written)

    def _sampler(
        self, stage: RolloutConfig, model: Model, params: Params, size: Slots, taken: int
    ) -> Sampler:
        """Its programs, with weights as `ntjax.sampler` will have them."""
        sampling = stage.sampling((2,))
        copied = stage.sampler_weights != "held"
        if stage.sampler_weights == "auto" and self.memory is not None:
            state = state_of(model, sampling, size)
            copied = for_copies(model, params, state, self.memory, taken)
        return sampler_programs(model, sampling, size, copied)

    def _gathered(self, model: Model, params: Params) -> Params:
        """As `Model.gathered` leaves them."""
        params = {path: params[path] for path in model.specs}
        if self.layout.gathers:
            params = {path: jax.eval_shape(partial(model.ready, path), w) for path, w in params.items()}
        return shapes.placed(params, model.specs, self.layout, parted=False)

    def _rewarding(self, stage: RolloutConfig, around: dict[str, int]) -> Program:
        """A reward model's scores of as many completions as it takes at a time."""
        model, params = self._reward_weights(stage)
        shape = stage.geometry(self.layout.rows)
        place = NamedSharding(self.layout.mesh, PartitionSpec(ROWS))
        tokens, lengths = (
            Shape(size, jnp.int32, sharding=place) for size in ((shape.rows, stage.row_length), (shape.rows,))
        )
        function = jax.jit(scores(model, 0), out_shardings=replicated(self.layout.mesh))
        rest = {kind: size for kind, size in around.items() if kind != "reward model"}
        kinds, calls = {"reward model": held(params)}, shape.completions / shape.rows / shape.steps
        return Program("reward", function, (params, tokens, lengths), kinds, rest, tokens.size, calls)

    def _reward_weights(self, stage: RolloutConfig) -> tuple[Model, Params]:
        config, dtype = self.config, self.config.compute_dtype(stage)
        hf = self._found(stage.reward_model_path)
        hf = hf if is_scoring(hf) else scoring_config(hf)
        model = build(hf, dtype=dtype, labels=1, attention=config.model.attention, layout=self.layout)
        params = {path: Shape(spec.shape, dtype) for path, spec in model.specs.items()}
        return model, shapes.placed(params, model.specs, self.layout)

    def _found(self, named: str | None) -> dict[str, Any]:
        """The config.json of a model that a setting names, the stage's own where it isn't there (yet)."""
        if named is not None and not named.startswith("stage:"):
            with suppress(InputMissing):
                return read_config(locate(named, folders=[self.config.path.parent], weights=False))
        return self.hf


def _copies(sampler: Sampler, params: Params) -> tuple[Params, Any]:
    """`Model.copies`, where it leaves them."""
    own, layers = jax.eval_shape(sampler.copies, params)
    if not own and layers is None:
        return own, layers
    places = sampler.copies.lower(params).compile().output_shardings  # type: ignore[attr-defined]
    return jax.tree.map(at, (own, layers), places)


def _own(weights: Weights, reference: Params) -> Params:
    """The part of a reference that isn't the policy's frozen weights themselves."""
    return {path: w for path, w in reference.items() if weights.frozen.get(path) is not w}


def _scorable(batch: dict[str, Any]) -> dict[str, Any]:
    """What the reference and the policy look at."""
    return {name: x for name, x in batch.items() if name in SCORED or name.startswith(UNIT)}


def _there(sizes: dict[str, int]) -> dict[str, int]:
    return {kind: size for kind, size in sizes.items() if size}


def untuned(config: Config, stage: StageConfig, *, remat: bool) -> tuple[Config, StageConfig]:
    """The same mathematics in one matmul each, as FLOPs are counted: attention with whole scores; without `remat`, no
    work done twice either."""
    plain = replace(config, model=replace(config.model, attention="xla"))
    return plain, stage if remat else replace(stage, remat="everything")
