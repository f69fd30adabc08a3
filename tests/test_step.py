"""The train step: what an update is, what it isn't, and what it costs to compile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from ntjax.losses.nll import nll
from ntjax.mesh import make_mesh, place_batch, replicated
from ntjax.metrics import Mean, Metrics
from ntjax.models import Model, build
from ntjax.narrow import traced_for
from ntjax.ops.attention import Tokens
from ntjax.ops.logprobs import likelihood
from ntjax.params import Params
from ntjax.step import Batch, Loss, TrainState, eval_step, initial_state, train_step
from tests.jaxprs import equations

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def loss_of(model: Model) -> Loss:
    """Next-token loss of a batch of ids and mask, [B, T] each."""

    def loss(params: Params, batch: Batch) -> Metrics:
        ids = batch["ids"]
        at = Tokens(jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape), jnp.ones_like(ids))
        hidden = model.hidden(params, ids, at)
        mask = batch["mask"][:, 1:]
        return nll(likelihood(hidden[:, :-1], model.head(params), ids[:, 1:], mask), mask)

    return loss


def uneven_batch(microbatches: int, rows: int = 8, time: int = 12) -> dict[str, Any]:
    """The same `rows` rows in `microbatches`; row i has i^2 / 4 masked positions, so no two halves weigh the same."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 61, (rows, time), dtype=np.int32)
    mask = np.arange(time) >= (np.arange(rows) ** 2 // 4)[:, None]
    return {name: x.reshape(microbatches, -1, time) for name, x in {"ids": ids, "mask": mask}.items()}


def random_params(model: Model) -> Params:
    """N(0, 0.2) all of them: gradients that are well away from zero."""
    rng = np.random.default_rng(1)
    shapes = {path: spec.shape for path, spec in sorted(model.specs.items())}
    return {
        path: jnp.asarray(0.2 * rng.standard_normal(shape), jnp.float32) for path, shape in shapes.items()
    }


def recorder() -> optax.GradientTransformation:
    """An optimizer whose state is the gradient it was last given."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, state, params=None: (grads, grads)
    )


def constant(rate: float) -> Any:
    return lambda step: jnp.full((), rate)


def assert_close(a: Any, b: Any, relative: float) -> None:
    """Each pair of arrays differs by at most `relative` of the second's norm."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.linalg.norm(x - y) <= relative * np.linalg.norm(y)


@pytest.fixture(scope="module")
def whole() -> tuple[Model, Params, TrainState, Metrics]:
    """A model, its weights, and the recorded step over one microbatch."""
    model = build(TINY)
    params = random_params(model)
    step = jax.jit(train_step(loss_of(model), recorder(), constant(0.5), 0.0))
    return model, params, *step(initial_state(params, recorder()), {}, uneven_batch(1))


Whole = tuple[Model, Params, TrainState, Metrics]


def test_the_gradient_is_that_of_the_mean_over_all_learned_tokens(whole: Whole) -> None:
    model, params, state, metrics = whole
    batch = jax.tree.map(lambda x: x[0], uneven_batch(1))

    def mean(params: Params) -> jax.Array:
        total, weight = loss_of(model)(params, batch)["loss"]
        return total / weight

    assert int(metrics["loss"].weight) == uneven_batch(1)["mask"][0, :, 1:].sum()
    assert_close(state.opt_state, jax.jit(jax.grad(mean))(params), 1e-6)
    assert_close(state.params, jax.tree.map(lambda p, g: p - 0.5 * g, params, state.opt_state), 1e-7)


def test_four_microbatches_are_one_batch_under_uneven_masks(whole: Whole) -> None:
    model, params, one, metrics = whole
    step = jax.jit(train_step(loss_of(model), recorder(), constant(0.5), 0.0))
    four, summed = step(initial_state(params, recorder()), {}, uneven_batch(4))
    assert_close(four.opt_state, one.opt_state, 1e-6)
    assert_close(four.params, one.params, 1e-6)
    assert_close(summed, metrics, 1e-6)


def test_evaluation_sums_microbatches_too(whole: Whole) -> None:
    model, params, _, metrics = whole
    evaluated = jax.jit(eval_step(loss_of(model)))(params, {}, uneven_batch(4))
    assert_close(evaluated, {name: metrics[name] for name in evaluated}, 1e-6)


# The properties below do not depend on the model: a loss of two weights will do.


def linear(params: Params, batch: Batch) -> Metrics:
    """w . x + 2 f . x over rows, where f is frozen: the gradient of w is x."""
    return {
        "loss": Mean((batch["x"] * (params["w"] + 2 * params["f"])).sum(), jnp.float32(batch["x"].shape[0]))
    }


def adam_state() -> tuple[Any, TrainState, Params]:
    optimizer = optax.scale_by_adam()
    params = {"w": jnp.asarray([1.0, -2.0, 3.0])}
    return optimizer, initial_state(params, optimizer), {"f": jnp.asarray([1.0, 1.0, 1.0])}


@pytest.mark.parametrize("limit", [0.25, 1e3])
def test_clipping_is_torchs(limit: float) -> None:
    rng = np.random.default_rng(0)
    params = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)}
    x = {name: jnp.asarray(rng.standard_normal((1, *p.shape)), jnp.float32) for name, p in params.items()}
    leaves = [torch.zeros(p.shape, requires_grad=True) for p in params.values()]
    for leaf, grad in zip(leaves, x.values(), strict=True):
        leaf.grad = torch.tensor(np.asarray(grad[0]))
    norm = float(torch.nn.utils.clip_grad_norm_(leaves, limit))
    assert 0.25 < norm < 1e3

    def dot(params: Params, batch: Batch) -> Metrics:
        return {"loss": Mean(sum((params[n] * batch[n]).sum() for n in params), jnp.ones(()))}

    clipped, metrics = train_step(dot, recorder(), constant(0.1), limit)(
        initial_state(params, recorder()), {}, x
    )
    assert float(metrics["grad_norm"].total) == pytest.approx(norm, rel=1e-6)
    for ours, leaf in zip(clipped.opt_state.values(), leaves, strict=True):
        assert leaf.grad is not None
        np.testing.assert_allclose(ours, leaf.grad.numpy(), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e38])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_gradient_that_is_not_finite_changes_no_bit_but_the_count(
    bad: float, max_grad_norm: float, platform: str
) -> None:
    optimizer, state, frozen = adam_state()
    good, wrong = np.ones((2, 2, 3), np.float32), np.ones((2, 2, 3), np.float32)
    wrong[1, :, 1] = bad  # 1e38 is finite; the square of its sum is not
    with traced_for(platform):
        lowered = jax.jit(train_step(linear, optimizer, constant(0.1), max_grad_norm)).lower(
            state, frozen, {"x": good}
        )
    assert ("stablehlo.case" in lowered.as_text()) == (platform == "cpu")  # a branch, or a choice
    step = lowered.compile()
    state, metrics = step(state, frozen, {"x": good})
    assert float(metrics["skipped"].total) == 0
    after, metrics = step(state, frozen, {"x": wrong})
    assert float(metrics["skipped"].total) == float(metrics["skipped"].weight) == 1
    for new, old in zip(
        jax.tree.leaves((after.params, after.opt_state)),
        jax.tree.leaves((state.params, state.opt_state)),
        strict=True,
    ):
        assert np.asarray(new).tobytes() == np.asarray(old).tobytes()
    assert (int(state.step), int(after.step)) == (1, 2)
    recovered, metrics = step(after, frozen, {"x": good})
    assert float(metrics["skipped"].total) == 0
    assert not np.array_equal(recovered.params["w"], after.params["w"])


def test_frozen_weights_take_part_and_stay() -> None:
    optimizer, state, frozen = adam_state()
    after, metrics = train_step(linear, optimizer, constant(0.1), 0.0)(
        state, frozen, {"x": jnp.ones((1, 2, 3))}
    )
    assert float(metrics["loss"].total) == 2 * (1 - 2 + 3 + 6)
    assert set(after.params) == {"w"}


def test_the_schedule_is_read_at_the_count_of_steps_done() -> None:
    optimizer, state, frozen = adam_state()
    step = jax.jit(train_step(linear, optax.identity(), lambda step: 0.1 * step, 0.0))
    state = initial_state(state.params, optax.identity())
    batch = {"x": np.ones((1, 2, 3), np.float32)}
    seen = []
    for _ in range(3):
        state, metrics = step(state, frozen, batch)
        seen.append((float(metrics["learning_rate"].total), float(state.params["w"][0])))
    np.testing.assert_allclose(seen, [(0.0, 1.0), (0.1, 0.9), (0.2, 0.7)], rtol=1e-6)


def test_an_empty_mask_changes_nothing_and_divides_by_nothing() -> None:
    optimizer, _, _ = adam_state()
    params = {"w": jnp.asarray([1.0])}
    step = train_step(
        lambda p, b: {"loss": Mean((p["w"] * 0).sum(), jnp.zeros(()))}, optimizer, constant(0.1), 1.0
    )
    after, metrics = step(initial_state(params, optimizer), {}, {"x": jnp.ones((1, 1))})
    np.testing.assert_array_equal(after.params["w"], [1.0])
    assert float(metrics["skipped"].total) == 0


def batches(shapes: list[tuple[int, ...]]) -> Iterator[Batch]:
    for shape in shapes:
        yield {"x": jnp.ones(shape)}


def test_one_compilation_a_shape_and_the_state_is_donated() -> None:
    optimizer, state, frozen = adam_state()
    chex.clear_trace_counter()
    step = jax.jit(
        chex.assert_max_traces(train_step(linear, optimizer, constant(0.1), 1.0), 2), donate_argnums=0
    )
    for batch in batches([(2, 2, 3), (2, 2, 3), (1, 4, 3), (2, 2, 3), (1, 4, 3)]):
        given = state
        state, _ = step(given, frozen, batch)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    assert not frozen["f"].is_deleted()


def test_eight_devices_are_one(whole: Whole) -> None:
    model, params, one, metrics = whole
    mesh = make_mesh()
    assert mesh.size == 8
    step = jax.jit(train_step(loss_of(model), recorder(), constant(0.5), 0.0))
    state = initial_state(jax.device_put(params, replicated(mesh)), recorder())
    batch = place_batch(uneven_batch(1), mesh)
    assert {shard.data.shape for shard in batch["ids"].addressable_shards} == {(1, 1, 12)}  # a row a device
    eight, summed = step(state, {}, batch)
    assert len(eight.params["embed"].devices()) == 8
    assert_close(eight.opt_state, one.opt_state, 1e-6)
    assert_close(eight.params, one.params, 1e-6)
    assert_close(summed, metrics, 1e-6)


def test_the_program_does_not_grow_with_depth() -> None:
    def size(layers: int) -> int:
        model = build({**TINY, "num_hidden_layers": layers})
        params = {path: jax.ShapeDtypeStruct(s.shape, jnp.float32) for path, s in model.specs.items()}
        state = jax.eval_shape(lambda p: initial_state(p, recorder()), params)
        step = train_step(loss_of(model), recorder(), constant(0.1), 1.0)
        return len(jax.jit(step).lower(state, {}, uneven_batch(2)).as_text("hlo"))

    assert size(30) <= 1.3 * size(6)


def test_bf16_multiplies_in_bf16_and_keeps_weights_and_moments_in_fp32() -> None:
    model = build(TINY, dtype="bfloat16")
    optimizer = optax.scale_by_adam()
    step = train_step(loss_of(model), optimizer, constant(0.1), 1.0)
    state = initial_state(random_params(model), optimizer)
    jaxpr = jax.make_jaxpr(step)(state, {}, uneven_batch(1))
    operands = [
        tuple(v.aval.dtype.name for v in eqn.invars)
        for eqn in equations(jaxpr.jaxpr)
        if eqn.primitive.name == "dot_general"
    ]
    # Scores leave their product in fp32, so their cotangent meets q and k in fp32: the two that are not bf16.
    assert operands.count(("float32", "bfloat16")) == 2
    assert operands.count(("bfloat16", "bfloat16")) == len(operands) - 2
    after = jax.eval_shape(step, state, {}, uneven_batch(1))[0]
    floats = [x.dtype for x in jax.tree.leaves((after.params, after.opt_state)) if x.ndim]
    assert floats
    assert set(floats) == {jnp.dtype("float32")}
