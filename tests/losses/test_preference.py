"""Losses on pairs are TRL's on the same numbers, whatever shares a row and whatever fills the batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntjax.config.settings import settings_of
from ntjax.losses.documents import completion_weights, document_sums, last_positions
from ntjax.losses.pairs import Pairs, Targets, completion_sums, gather_pairs
from ntjax.losses.preference import LOSSES, Preference, per_pair, preference_loss
from ntjax.metrics import finish
from ntjax.ops.logprobs import token_logprobs
from ntjax.stages import dpo
from tests.losses import references
from tests.losses.references import answers, ours, token_scores

REFERENCED = sorted(set(LOSSES) - dpo.REFERENCE_FREE)
SMOOTHED = {"exo_pair", "robust", "aot", "aot_unpaired"}
DIVERGENCES = {
    "forward_kl": Preference(f_divergence="forward_kl"),
    "js_divergence": Preference(f_divergence="js_divergence"),
    "alpha_divergence": Preference(f_divergence="alpha_divergence"),
    "alpha above 1": Preference(f_divergence="alpha_divergence", f_alpha=1.7),
    "alpha 1 is reverse": Preference(f_divergence="alpha_divergence", f_alpha=1.0),
}


def check(ours: tuple[dict[str, float], np.ndarray], theirs: tuple[dict[str, float], np.ndarray]) -> None:
    """Every metric that TRL logs is within 1e-5 of it, and so is the gradient."""
    for name, value in theirs[0].items():
        assert ours[0][name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5)
    assert np.abs(theirs[1]).max() > 1e-3


@pytest.mark.parametrize("name", REFERENCED)
def test_a_loss_its_gradient_and_its_metrics_are_trls(name: str) -> None:
    preference = Preference((name,), beta=0.3, label_smoothing=0.1 if name in SMOOTHED else 0.0)
    check(ours(answers(), preference), references.dpo(answers(), preference))


@pytest.mark.parametrize("name", sorted(dpo.REFERENCE_FREE))
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_losses_without_a_reference_are_trls(name: str, label_smoothing: float) -> None:
    preference = Preference((name,), beta=0.7, label_smoothing=label_smoothing, cpo_alpha=0.6)
    check(ours(answers(), preference, free=True), references.without_reference(answers(), preference))


@pytest.mark.parametrize("preference", DIVERGENCES.values(), ids=DIVERGENCES)
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "sigmoid_norm"])
def test_divergences_are_trls(name: str, preference: Preference) -> None:
    preference = Preference((name,), f_divergence=preference.f_divergence, f_alpha=preference.f_alpha)
    check(ours(answers(), preference), references.dpo(answers(), preference))


MIXTURES = {
    "weighted losses": Preference(("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.0)),
    "one loss twice": Preference(("hinge", "hinge"), beta=0.5),
    "shared lengths only": Preference(ld_alpha=0.0),
    "longer tails weigh less": Preference(("sigmoid", "ipo"), ld_alpha=0.3),
    "weighted by the policy": Preference(("sigmoid", "apo_zero"), (1.0, 0.5), use_weighting=True),
}


@pytest.mark.parametrize("preference", MIXTURES.values(), ids=MIXTURES)
def test_lists_of_losses_and_weighted_tokens_are_trls(preference: Preference) -> None:
    check(ours(answers(), preference), references.dpo(answers(), preference))


def test_rpo_alpha_adds_the_nll_of_a_chosen_token() -> None:
    plain, learned, both = (
        ours(answers(), preference)[0]["loss"]
        for preference in (Preference(), Preference(("sft",)), Preference(rpo_alpha=0.5))
    )
    assert both == pytest.approx(plain + 0.5 * learned, rel=1e-6)


def test_simpo_by_hand() -> None:
    """Two tokens of -1 each against one of -3: averages -1 and -3, so -log sigmoid(2 (-1 + 3) - 0.5)."""
    one = jnp.ones(1)
    pairs = Pairs(-2 * one, -3 * one, 0 * one, 0 * one, 2 * one, one, one > 0, one[0], one[0], one)
    loss = per_pair("simpo", pairs, Preference(beta=2.0, simpo_gamma=0.5, cpo_alpha=0.0))
    np.testing.assert_allclose(loss, [np.log1p(np.exp(-3.5))], rtol=1e-6)


def test_certain_answers_have_finite_odds() -> None:
    zero, one = jnp.zeros(1), jnp.ones(1)

    def loss(chosen: jax.Array) -> jax.Array:
        pairs = Pairs(chosen, -one, zero, zero, one, one, one > 0, zero[0], zero[0], one)
        return per_pair("orpo", pairs, Preference()).sum()

    value, gradient = jax.value_and_grad(loss)(zero)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def shared_rows(data: references.Answers, slots: list[list[int]], places: int) -> dict[str, np.ndarray]:
    """The pairs `slots` lists, each slot's in two rows one after another, padded with what must not matter."""
    length = max(len(slot) for slot in slots) * references.TIME
    shape = (len(slots), 2, length)
    batch = {
        "tokens": np.full(shape, 3, np.int32),
        "mask": np.zeros(shape, bool),
        "segments": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
        "pairs": np.arange(places) < np.array([[len(slot)] for slot in slots]),
    }
    for i, slot in enumerate(slots):
        for side in (0, 1):
            start = 0
            for k, pair in enumerate(slot):
                size = int(data.segments[pair, side].sum())
                at = (i, side, slice(start, start + size))
                batch["tokens"][at] = data.ids[pair, side, :size]
                batch["mask"][at] = data.mask[pair, side, :size]
                batch["segments"][at] = k + 1
                batch["positions"][at] = np.arange(size)
                start += size
    return batch


class Sums:
    """A model whose hidden state is the token's embedding, turned by its position."""

    def __init__(self) -> None:
        rng = np.random.default_rng(3)
        self.params = {
            "embed": jnp.asarray(rng.standard_normal((references.VOCAB, 4)), jnp.float32),
            "head": jnp.asarray(rng.standard_normal((references.VOCAB, 4)), jnp.float32),
        }

    def hidden(self, params: Any, ids: jax.Array, tokens: Any, pictures: None = None) -> jax.Array:
        return params["embed"][ids] * jnp.cos(tokens.positions)[..., None]

    def logprobs(self, params: Any, hidden: jax.Array, targets: jax.Array, wanted: jax.Array) -> Any:
        return token_logprobs(hidden, self.head(params), targets, wanted)

    def head(self, params: Any) -> jax.Array:
        return params["head"]


def stage(**settings: Any) -> dpo.Options:
    return dpo.Options(stage_type="dpo", **settings)


def stage_metrics(options: dpo.Options, batch: dict[str, np.ndarray]) -> tuple[dict[str, float], Any]:
    """Metrics and gradients of a stage under weights 1.1 times its reference's."""
    model: Any = Sums()
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    score = options.reference_scores(model)
    if score is not None:
        batch |= score(model.params, batch)
        assert batch["ref_logps"].shape == (len(batch["tokens"]), 2, batch["pairs"].shape[1])
    loss = options.loss(model)

    def mean(params: Any) -> Any:
        metrics = loss(params, batch)
        return metrics["loss"].total / metrics["loss"].weight, metrics

    moved = jax.tree.map(lambda x: 1.1 * x, model.params)
    gradients, metrics = jax.jit(jax.grad(mean, has_aux=True))(moved)
    return finish(metrics), gradients


def every_loss(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Each loss of LOSSES, a mean over the pairs, against a reference whose head is ours upside down."""
    hidden = Sums().hidden(params, batch["tokens"], SimpleNamespace(positions=batch["positions"]))
    scores = token_scores(batch["tokens"], hidden @ params["head"].T)
    targets = Targets.of(batch["mask"], batch["segments"], batch["pairs"])
    others = token_scores(batch["tokens"], hidden @ params["head"][::-1].T)
    ref = jax.lax.stop_gradient(completion_sums(others.logp, targets, None))
    pairs = gather_pairs(scores, ref, targets)
    means = [preference_loss(pairs, Preference((name,), label_smoothing=0.1)) for name in LOSSES]
    losses = jnp.stack([mean.total / jnp.maximum(mean.weight, 1) for mean in means])
    return losses, losses


def losses_and_gradients(slots: list[list[int]], places: int) -> dict[str, tuple[jax.Array, Any]]:
    """Of the pairs in these slots, by name."""
    batch = jax.tree.map(jnp.asarray, shared_rows(answers(), slots, places))
    gradients, losses = jax.jit(jax.jacrev(every_loss, has_aux=True))(Sums().params, batch)
    return {
        name: (losses[i], {path: gradient[i] for path, gradient in gradients.items()})
        for i, name in enumerate(LOSSES)
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[jax.Array, Any]]:
    return losses_and_gradients([[i] for i in range(6)], 1)


ALIKE = {
    "pairs share rows": ([[4, 0, 2], [1], [3, 5]], 3),
    "places are empty": ([[0], [], [1, 2], [3], [4, 5], []], 4),
}


@pytest.mark.parametrize(("slots", "places"), ALIKE.values(), ids=ALIKE)
def test_a_loss_depends_on_its_pairs_alone(
    slots: list[list[int]], places: int, alone: dict[str, tuple[jax.Array, Any]]
) -> None:
    for name, found in losses_and_gradients(slots, places).items():
        chex.assert_trees_all_close(found, alone[name], rtol=1e-5, atol=1e-5, custom_message=name)


def test_a_batch_of_empty_places_weighs_nothing_and_has_no_gradient() -> None:
    found = losses_and_gradients([[], []], 2)
    chex.assert_trees_all_equal(found, jax.tree.map(jnp.zeros_like, found))


def test_a_stages_packed_rows_give_the_metrics_and_gradients_of_its_pairs() -> None:
    options = stage(loss_type=("ipo", "aot", "orpo"), ld_alpha=0.2, use_weighting=True, rpo_alpha=0.1)
    alone = stage_metrics(options, shared_rows(answers(), [[i] for i in range(6)], 1))
    packed = stage_metrics(options, shared_rows(answers(), [[4, 0, 2], [1], [], [3, 5]], 3))
    assert packed[0] == pytest.approx(alone[0], rel=1e-5)
    assert {"log_odds_ratio", "rewards/margins"} <= set(packed[0])
    chex.assert_trees_all_close(packed[1], alone[1], rtol=1e-4, atol=1e-5)


def test_scores_of_hidden_states_are_those_of_whole_logits() -> None:
    rng = np.random.default_rng(5)
    hidden, head = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 6, 4), (9, 4)))
    ids = jnp.asarray(rng.integers(0, 9, (2, 6)))
    fused = token_logprobs(hidden, head, jnp.roll(ids, -1, axis=-1))
    chex.assert_trees_all_close(fused, token_scores(ids, hidden @ head.T), rtol=1e-5, atol=1e-6)


def test_mean_logits_are_those_of_completion_tokens() -> None:
    batch = shared_rows(answers(), [[0, 1], [2]], 2)
    model = Sums()
    tokens = SimpleNamespace(positions=batch["positions"])
    hidden = model.hidden({"embed": 1.1 * model.params["embed"]}, batch["tokens"], tokens)
    logits = np.asarray((hidden @ (1.1 * model.params["head"]).T).mean(-1))
    learned = np.roll(batch["mask"], -1, axis=-1)
    metrics, _ = stage_metrics(stage(), batch)
    for side, name in enumerate(("logits/chosen", "logits/rejected")):
        assert metrics[name] == pytest.approx(np.mean(logits[:, side][learned[:, side]]), rel=1e-5)


SEGMENTS = np.array([[[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 2, 2, 2, 2, 0, 0]]])
MASK = np.array([[[0, 0, 1, 1, 0, 1, 1, 0], [0, 1, 0, 1, 1, 1, 0, 0]]], bool)


def test_document_sums_by_hand() -> None:
    values = np.arange(8.0) + np.zeros((1, 2, 1))
    values[~MASK] = np.nan
    sums = document_sums(jnp.asarray(values), *map(jnp.asarray, (MASK, SEGMENTS)), 3)
    np.testing.assert_array_equal(sums, [[[2 + 3, 5 + 6, 0], [1, 3 + 4 + 5, 0]]])


def test_tokens_past_the_shorter_answer_count_by_ld_alpha() -> None:
    weights = completion_weights(*map(jnp.asarray, (MASK, SEGMENTS)), 2, 0.25)
    # First pair: 2 tokens against 1; second: 2 against 3.
    np.testing.assert_array_equal(weights[0, 0][MASK[0, 0]], [1, 0.25, 1, 1])
    np.testing.assert_array_equal(weights[0, 1][MASK[0, 1]], [1, 1, 1, 0.25])


def test_documents_end_at_their_last_token() -> None:
    np.testing.assert_array_equal(last_positions(jnp.asarray(SEGMENTS), 3), [[[3, 6, 0], [1, 5, 0]]])


def test_targets_are_the_following_tokens_and_the_last_has_none() -> None:
    segments, mask = np.array([[[1, 1, 2], [1, 1, 1]]]), np.array([[[0, 1, 0], [1, 0, 1]]], bool)
    targets = Targets.of(*map(jnp.asarray, (mask, segments, np.ones((1, 2), bool))))
    np.testing.assert_array_equal(targets.mask, [[[1, 0, 0], [0, 1, 0]]])
    np.testing.assert_array_equal(targets.segments, [[[1, 2, 0], [1, 1, 0]]])
    np.testing.assert_array_equal(targets.inside, [[[1, 0, 0], [1, 1, 0]]])


def test_every_loss_has_a_name_in_the_settings() -> None:
    assert set(dpo.LOSSES) == set(LOSSES)
    assert get_args(settings_of(dpo.Options)["loss_type"].kind) == (str, ...)


CONFLICTS: dict[str, tuple[dict[str, Any], str]] = {
    "a divergence of ratios alone": (
        {"loss_type": ("sigmoid", "nca_pair"), "f_divergence_type": "js_divergence"},
        "f_divergence_type",
    ),
    "exo without smoothing": ({"loss_type": ("exo_pair",)}, "label_smoothing"),
    "robust at one half": ({"loss_type": ("robust",), "label_smoothing": 0.5}, "label_smoothing"),
    "smoothing of nothing": ({"label_smoothing": 0.1}, "label_smoothing"),
    "gamma of nothing": ({"simpo_gamma": 1.0}, "simpo_gamma"),
    "alpha of nothing": ({"f_alpha_divergence_coef": 0.7}, "f_alpha_divergence_coef"),
    "lengths of averages": ({"loss_type": ("simpo",), "ld_alpha": 0.5}, "ld_alpha"),
    "sorted and weighted": ({"loss_type": ("aot",), "use_weighting": True}, "use_weighting"),
    "a reference of nothing": ({"loss_type": ("orpo",), "sync_ref_model": True}, "sync_ref_model"),
    "precomputed and moving": (
        {"sync_ref_model": True, "precompute_ref_log_probs": True},
        "sync_ref_model",
    ),
    "too few weights": ({"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0,)}, "loss_weights"),
}


@pytest.mark.parametrize(("settings", "name"), CONFLICTS.values(), ids=CONFLICTS)
def test_settings_that_contradict_each_other(settings: dict[str, Any], name: str) -> None:
    assert [key for key, _ in stage(**settings).conflicts()] == [name]
