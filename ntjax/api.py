"""ntjax from Python: a model, its losses and steps as functions, runs.

    model = ntjax.load("models/smollm2-135m-instruct")
    model.generate(["What is the capital of France?"], max_new_tokens=20)
    loss = ntjax.loss(model, "sft")
    run = ntjax.run("configs/sft_smollm2.toml", {"stages.sft.max_steps": 2})

All of it is what the commands are made of; nothing is computed here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ntjax import parts
from ntjax.config import MeshConfig
from ntjax.errors import ConfigError
from ntjax.hf.hub import locate
from ntjax.layout import Layout
from ntjax.loaded import LoadedModel
from ntjax.mesh import make_mesh, replicated
from ntjax.metrics import finish
from ntjax.params import Params, Specs
from ntjax.policy import adapters
from ntjax.runner import Run, run
from ntjax.step import Batch, Join, Step, TrainState, initial_state, union

__all__ = ["LoadedModel", "Run", "Stepper", "load", "loss", "run", "stepper"]


def load(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str = "float32",
    mesh: Mapping[str, int] | None = None,
) -> LoadedModel:
    """The model in a Hugging Face folder or repository, with the PEFT `adapter` around its weights if one is named.

    Weights are held and computed with in `dtype` ("float32", "bfloat16"), on the first device, or over a `mesh` of
    several, as in [mesh] of a config: {"data": 2} copies them to two, {"fsdp": -1} shares them out over all.

    Raises what reading a folder raises: InputMissing, BadData, Refused, ConfigError.
    """
    sizes = dict(mesh or {"data": 1})
    count = jax.device_count() if -1 in sizes.values() else math.prod(sizes.values())
    layout = Layout(make_mesh(sizes, jax.devices()[:count]), MeshConfig(**dict[str, Any](sizes)).zero)
    found = None if adapter is None else locate(str(adapter))
    return LoadedModel(locate(str(model)), adapter=found, dtype=dtype, layout=layout)


def loss(
    model: LoadedModel, stage: str = "sft", **settings: Any
) -> Callable[[Params, Batch], tuple[jax.Array, dict[str, jax.Array]]]:
    """The loss of a stage as a pure function, (params, batch) -> (loss, metrics), float32 [] each.

    It can be jitted and differentiated: jax.value_and_grad(loss, has_aux=True)(model.params, batch). Metrics have TRL's
    names; both are means over what the batch has. `settings` are the stage's: dpo_beta=0.2, bf16=True; those of rows,
    of the optimizer and of logs have no effect here.
    """
    config = model.settled(stage, settings)
    counted = config.stages[0].loss(model.as_in(config))

    def loss(params: Params, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        sums = counted(params, batch)
        means = {name: total / jnp.where(weight == 0, 1, weight) for name, (total, weight) in sums.items()}
        return means["loss"], means

    return loss


@dataclass(frozen=True)
class Stepper:
    """(state, batch) -> (state, metrics): one step of a stage, compiled. The state given is used up."""

    frozen: Params
    join: Join
    step: Step
    specs: Specs  # of what is trained

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, float]]:
        """The step that the trainer takes, with one microbatch; the metrics are means, `grad_norm` and `learning_rate`
        among them."""
        state, metrics = self.step(state, self.frozen, {name: array[None] for name, array in batch.items()})
        return state, finish(jax.device_get(metrics))

    def weights(self, state: TrainState) -> Params:
        """The model's weights after the steps taken, adapters around them: put them in `LoadedModel.params`."""
        return self.join(self.frozen, jax.tree.map(jnp.copy, state.params), None)


def stepper(
    model: LoadedModel,
    stage: str = "sft",
    *,
    steps: int,
    lora: Mapping[str, Any] | None = None,
    **settings: Any,
) -> tuple[TrainState, Stepper]:
    """The state before the first of `steps` (which the learning rate's schedule is for), and what takes them.

    All weights are trained, but for those that `freeze` names; with `lora` (PEFT's options: {"r": 8}) an adapter on
    them, whose arrays are state.params["PATH.lora_A"] and ["PATH.lora_B"]. `settings` are the stage's:
    learning_rate=1e-4, warmup_steps=0; those of rows and of logs have no effect here.
    """
    from ntjax.loop import stage_step

    config = model.settled(stage, {**settings, "max_steps": steps}, lora)
    options, layout, join = config.stages[0], model.layout, union
    assert options.seed is not None
    kept = parts.frozen(options.freeze, model.specs)
    plan, _ = adapters(
        config.model, model.specs, None, frozen=kept, dropout=not getattr(options, "disable_dropout", False)
    )
    if plan is None:
        specs = {path: spec for path, spec in model.specs.items() if path not in kept}
        _check_plain(model.params)
        frozen = {path: w for path, w in model.params.items() if path in kept}
        trained = {path: jnp.array(model.params[path], jnp.float32, copy=True) for path in specs}
    else:
        specs, join = plan.specs(model.specs), plan.join
        frozen, trained = plan.initial(model.params, model.specs, jax.random.key(options.seed), jnp.float32)
    step, optimizer = stage_step(options, model.as_in(config), specs, join, layout, steps)
    state = initial_state(layout.put(trained, specs), optimizer, lambda state: layout.of_state(state, specs))
    state = replace(state, step=jax.device_put(state.step, replicated(layout.mesh)))
    places = jax.tree.map(lambda x: x.sharding, state)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
    return state, Stepper(frozen, join, compiled, specs)


def _check_plain(params: Params) -> None:
    """Raises ConfigError where a weight isn't an array, which can't be trained as a whole."""
    if not all(isinstance(w, jax.Array) for w in params.values()):
        raise ConfigError(
            "weights that are quantised or have an adapter are frozen", fix="train lora on them"
        )
