"""8-bit moments against bitsandbytes' on the same numbers; where they lie, what they hold, how they come back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bitsandbytes.backends.cpu import ops
from bitsandbytes.functional import create_dynamic_map
from jax.sharding import NamedSharding

from ntjax import mesh as meshes
from ntjax import moments
from ntjax.checkpoint import Checkpoints
from ntjax.config import load_config
from ntjax.errors import ConfigError
from ntjax.layout import Layout
from ntjax.models import Model, build
from ntjax.moments import SIGNED, UNSIGNED, Dynamic, Moment, Moments
from ntjax.optim import direction
from ntjax.params import Params, Specs, initial
from ntjax.stages.base import StageConfig
from ntjax.step import TrainState, initial_state
from tests.cases import some
from tests.estimate.test_shapes import STAGES as STAGES_OF_PLANS
from tests.estimate.test_shapes import config_of, folder, programs  # noqa: F401
from tests.test_layout import MESHES, STAGES, Train, check, train  # noqa: F401
from tests.torch_reference import TINY, stacked, torch_model

RATE = 0.01
# Tensors of a whole number of blocks, and with a rest; rows that are none; vectors too small for 8 bits.
HF = {**TINY, "model_type": "qwen2", "hidden_size": 72, "intermediate_size": 200, "vocab_size": 300}


def settings(optimizer: str, **changes: Any) -> StageConfig:
    return StageConfig(stage_type="sft", optimizer=optimizer, adam_beta2=0.95, adam_epsilon=1e-6, **changes)


@cache
def small() -> Model:
    return build(HF)


def gradients(specs: Specs, step: int) -> Params:
    """Random, of very different sizes from weight to weight."""
    rng = np.random.default_rng(step)
    return {
        path: jnp.asarray(10.0 ** (i % 5 - 3) * rng.standard_normal(spec.shape), jnp.float32)
        for i, (path, spec) in enumerate(sorted(specs.items()))
    }


@pytest.mark.parametrize("kind", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
def test_values_and_codes_are_those_of_bitsandbytes_maps(kind: Dynamic) -> None:
    values = create_dynamic_map(signed=kind.signed).numpy()
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_allclose(jax.jit(kind.values)(codes), values, rtol=2.5e-7)
    np.testing.assert_array_equal(jax.jit(kind.nearest)(values), codes)
    rng = np.random.default_rng(0)
    numbers = (rng.uniform(-1, 1, 100_000) * 10 ** rng.uniform(-7, 0, 100_000)).astype(np.float32)
    numbers = numbers if kind.signed else np.abs(numbers)
    nearest = np.searchsorted((values[:-1] + values[1:]) / 2, numbers)
    np.testing.assert_array_equal(jax.jit(kind.nearest)(numbers), nearest)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' update on a CPU with its own search for the nearest value, as it has it for other devices: its
    CPU's rounds to multiples of 1/32767 first, and so gives no second moment one of the seven lowest codes."""
    search = torch.ops.bitsandbytes.quantize_blockwise.default

    def quantised(
        x: torch.Tensor, code: torch.Tensor, absmax: torch.Tensor, out: torch.Tensor, size: int
    ) -> None:
        codes, largest = search._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, x, code, size)
        out.copy_(codes)
        absmax.copy_(largest)

    monkeypatch.setattr(ops, "_quant_blockwise_fp32_direct", quantised)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw_8bit": lambda groups: bnb.optim.AdamW8bit(groups, RATE, (0.9, 0.95), 1e-6),
    "lion_8bit": lambda groups: bnb.optim.Lion8bit(groups, RATE, (0.9, 0.95)),
}


def held_by(optimizer: torch.optim.Optimizer, named: dict[str, Any], specs: Specs, step: int) -> Moments:
    """bitsandbytes' state as ours."""
    of: dict[str, tuple[Any, ...]] = {}
    for path, spec in specs.items():
        states = [optimizer.state[named[name]] for _, name in spec.tensors()]
        shape = spec.shape[: len(spec.stacked)]
        of[path] = ()
        for number in ("1", "2") if "state2" in states[0] else ("1",):
            array: Any = jnp.stack([jnp.asarray(s[f"state{number}"].numpy()) for s in states]).reshape(
                spec.shape
            )
            if array.dtype == jnp.uint8:
                absmax = jnp.stack([jnp.asarray(s[f"absmax{number}"].numpy()) for s in states])
                array = Moment(array, absmax.reshape(*shape, -1))
            of[path] += (array,)
    return Moments(jnp.asarray(step), of)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.usefixtures("exact")
def test_each_of_twenty_steps_is_bitsandbytes(name: str) -> None:
    """Each from bitsandbytes' state: a rounding may carry a moment over the middle between two codes, and so on."""
    specs = small().specs
    model = torch_model(HF)
    named = dict(model.named_parameters())
    manager = bnb.optim.GlobalOptimManager.get_instance()  # what transformers' Trainer tells it of embeddings
    manager.register_module_override(model.get_input_embeddings(), "weight", {"optim_bits": 32})
    theirs = OPTIMIZERS[name]([{"params": list(named.values()), "weight_decay": 0.0}])
    transform = direction(settings(name), specs)

    @jax.jit
    def update(params: Params, state: Any, grads: Params) -> Any:
        updates, state = transform.update(grads, state, params)
        return jax.tree.map(lambda p, u: p - RATE * u, params, updates), state

    params = stacked(named, specs)
    state = transform.init(params)
    for step in range(1, 21):
        grads = gradients(specs, step)
        for path, spec in specs.items():
            for index, tensor in spec.tensors():
                named[tensor].grad = torch.tensor(np.asarray(grads[path][index])).reshape(named[tensor].shape)
        ours, (moments_, *rest) = update(params, state, grads)
        theirs.step()
        params, wanted = stacked(named, specs), held_by(theirs, named, specs, step)
        for path in specs:
            np.testing.assert_allclose(ours[path], params[path], rtol=1e-6, atol=1e-7, err_msg=path)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), moments_) == jax.tree.map(
            lambda x: (x.shape, x.dtype), wanted
        )
        off = 0
        for a, b in zip(jax.tree.leaves(moments_.of), jax.tree.leaves(wanted.of), strict=True):
            if a.dtype == jnp.uint8:
                between = np.abs(np.asarray(a, int) - np.asarray(b, int))
                assert between.max() <= 1
                off += int(between.sum())
            else:
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * float(jnp.abs(b).max()))
        assert off <= 10  # of 300,000
        state = (wanted, *rest)


def shapes(specs: Specs) -> Params:
    return {path: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for path, spec in specs.items()}


def test_what_is_held_and_what_an_update_needs_beside_it() -> None:
    """Bytes a weight of SmolLM2-135M's: two codes and 8 / 256 of absmaxes, 8 of the embedding, which is a fifth of the
    weights; beside it two arrays as large as that at most: layers are updated one after the other."""
    hf = {**TINY, "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    specs = build(
        {**hf, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    ).specs
    weights = sum(math.prod(spec.shape) for spec in specs.values())
    held, beside = {}, {}
    for optimizer in ("adamw_8bit", "lion_8bit"):
        transform = direction(settings(optimizer), specs)
        state = jax.eval_shape(transform.init, shapes(specs))
        args = shapes(specs), state, shapes(specs)
        update = jax.jit(
            lambda *args, of=transform: of.update(*args), donate_argnums=(0, 1), keep_unused=True
        )
        memory: Any = update.lower(*args).compile().memory_analysis()
        held[optimizer] = memory.argument_size_in_bytes / weights - 8
        beside[optimizer] = memory.temp_size_in_bytes / weights
    wide = math.prod(specs["embed"].shape) / weights
    expected = {"adamw_8bit": 2 + 8 / 256, "lion_8bit": 1 + 4 / 256}
    expected = {name: size * (1 - wide) + 4 * int(size) * wide for name, size in expected.items()}
    assert held == pytest.approx(expected, rel=5e-3)
    assert max(beside.values()) < 2 * 4 * wide + 0.1


def on_mesh(model: Model, layout: Layout, steps: int) -> tuple[TrainState, dict[str, Any], str]:
    """The state after some updates by random gradients, the shardings of what the optimizer keeps, and the program."""
    specs = model.specs
    transform = direction(settings("adamw_8bit", weight_decay=0.1), specs)
    params = layout.put(initial(specs, jax.random.key(0)), specs)
    state = initial_state(params, transform, lambda state: layout.of_state(state, specs))
    places = jax.tree.map(lambda x: x.sharding, (state.params, state.opt_state))

    def update(params: Params, opt_state: Any, grads: Params) -> tuple[Params, Any]:
        updates, opt_state = transform.update(layout.shared(grads, specs), opt_state, params)
        return jax.tree.map(lambda p, u: p - RATE * u, params, updates), opt_state

    step = jax.jit(update, out_shardings=places, donate_argnums=(0, 1))
    for number in range(steps):
        params, opt_state = step(state.params, state.opt_state, gradients(specs, number))
        state = TrainState(state.step + 1, params, opt_state)
    program = step.lower(state.params, state.opt_state, gradients(specs, 0)).compile()
    return state, places[1][0].of, program.as_text() or ""


@pytest.mark.parametrize("zero", some([1, 3], [3]))
@pytest.mark.parametrize(
    "width", some([72, 1024], [72], [1024]), ids=["blocks over parts", "blocks within parts"]
)
def test_codes_lie_as_their_weights_do_and_are_those_of_one_device(width: int, zero: int) -> None:
    heads = {"hidden_size": width, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    model = build({**HF, **heads, "num_hidden_layers": 1 if width == 1024 else 2})
    ours, places, text = on_mesh(model, Layout(meshes.make_mesh({"data": 2, "fsdp": 4}), zero), 5)
    one, *_ = on_mesh(model, Layout(meshes.make_mesh({"data": 1}, jax.devices()[:1])), 5)
    for path, (mu, nu) in ((path, places[path]) for path in ("blocks.attn.q", "blocks.mlp.down")):
        assert (
            mu.codes.spec
            == nu.codes.spec
            == Layout(mu.codes.mesh, 3).partition(model.specs[path], parted=True)
        )
        blocks = one.opt_state[0].of[path][0].absmax.shape[-1]
        assert ("fsdp" in mu.absmax.spec) == (blocks % 4 == 0)
    if width == 1024 and zero == 3:  # what is sent is of blocks, of which a matrix has 4096
        sent = re.findall(
            r" = \(?\w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|all-reduce|reduce-scatter)\(", text
        )
        assert max(math.prod(map(int, dims.split(","))) for dims in sent if dims) <= 4096
    off = sum(
        int((np.asarray(a) != np.asarray(b)).sum())
        for a, b in zip(jax.tree.leaves(ours.opt_state), jax.tree.leaves(one.opt_state), strict=True)
        if a.dtype == jnp.uint8
    )
    assert off == 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours.params, one.params)


@pytest.mark.parametrize("zero", some([1, 3], [3]))
def test_ten_steps_of_training_are_those_of_one_device(
    zero: int,
    train: Train,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(moments, "LEAST", 256)
    monkeypatch.setitem(STAGES, "moments", {**STAGES["sft"], "optimizer": "adamw_bnb_8bit"})
    check(train("moments", MESHES[f"zero {zero}"]), train("moments", None))


@pytest.mark.slow
def test_a_checkpoint_gives_the_codes_back_on_any_mesh(tmp_path: Path) -> None:
    layout = Layout(meshes.make_mesh({"data": 2, "fsdp": 4}), 3)
    state, *_ = on_mesh(small(), layout, 2)
    saved = jax.device_get(state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, state, {})
    checkpoints.close()
    other = Layout(meshes.make_mesh({"fsdp": 8}), 1)
    places = other.shardings(state.params, small().specs), other.of_state(state.opt_state, small().specs)
    abstract = jax.eval_shape(lambda: state)
    whole: Any = meshes.replicated(other.mesh)
    abstract = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        abstract,
        TrainState(whole, *places),
    )
    _, found, _ = Checkpoints(tmp_path).restore(abstract)
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, abstract)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), saved)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "lion_8bit"])
def test_a_plan_counts_the_state_that_training_holds(
    optimizer: str,
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(moments, "LEAST", 256)
    monkeypatch.setitem(STAGES_OF_PLANS, "sft", {**STAGES_OF_PLANS["sft"], "optimizer": optimizer})
    made = programs(config_of(folder, "sft", {}, {"fsdp": 4, "data": 2, "zero_stage": 2}))
    program = next(iter(made))
    specs = made.model.specs
    params = made.layout.put(initial(specs, jax.random.key(0)), specs)
    transform = direction(made.stage, specs)
    state = initial_state(params, transform, lambda state: made.layout.of_state(state, specs)).opt_state
    planned = program.arguments[0].opt_state

    def told(x: Any) -> tuple[Any, ...]:
        assert isinstance(x.sharding, NamedSharding)
        return x.shape, x.dtype, x.sharding.spec

    assert jax.tree.map(told, planned) == jax.tree.map(told, state)
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert program.held["optimizer"] == held


def test_names_of_bitsandbytes(folder: Path) -> None:  # noqa: F811
    names = {"adamw_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit", "lion_8bit": "lion_8bit"}
    for name, meant in (names | {"lion_bnb_8bit": "lion_8bit", "lion_32bit": "lion"}).items():
        assert asked(folder, optim=name).optimizer == meant


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "paged_lion_8bit", "paged_adamw_32bit"])
def test_paged_moments_are_refused_with_what_there_is_instead(name: str, folder: Path) -> None:  # noqa: F811
    meant = {"paged_adamw_8bit": "adamw_8bit", "paged_lion_8bit": "lion_8bit"}.get(name, "adamw_torch")
    with pytest.raises(ConfigError, match=f"write {meant}, and offload_optimizer = true in \\[mesh\\]"):
        asked(folder, optimizer=name)


def test_moments_in_8_bits_have_no_dtype(folder: Path) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match="mu_dtype: adamw_8bit keeps no first moment in floating point"):
        asked(folder, optimizer="adamw_8bit", mu_dtype="bfloat16")


def asked(folder: Path, **stage: Any) -> StageConfig:  # noqa: F811
    path = folder / "asked.json"
    model, data = {"model_name_or_path": "model"}, {"rows": {"dataset_path": "rows.jsonl"}}
    stages = [{"stage_type": "sft", **stage}]
    path.write_text(json.dumps({"model": model, "datasets": data, "stages": stages}))
    return load_config(path).stages[0]
