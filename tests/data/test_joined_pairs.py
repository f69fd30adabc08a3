"""Pairs that have their prompt once: how they lie, and that a step over them is that over pairs that have it twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from ntjax.data.batch import Example, Pair
from ntjax.data.loader import Plan, batches
from ntjax.data.pairs import EncodedPairs
from ntjax.data.sizes import sizes
from ntjax.metrics import finish
from ntjax.models import build, scoring_config
from ntjax.ops import blocked as module
from ntjax.stages import dpo, reward
from ntjax.stages.base import StageConfig
from ntjax.step import initial_state, train_step
from tests.cases import some
from tests.data.test_filled_losses import gathered
from tests.models.test_logits import VARIANTS
from tests.test_step import TINY, assert_close, constant, random_params, recorder

ROWS, COUNT, EXACT = 4, 23, 1e-5
PROMPT = (1, 30)  # tokens, and after it of answers
ANSWER = (1, 20)


def document(rng: np.random.Generator, prompt: np.ndarray, scored: bool) -> Example:
    answer = rng.integers(1, 61, rng.integers(*ANSWER, endpoint=True))
    tokens = np.concatenate([prompt, answer]).astype(np.int32)
    return Example(tokens, np.arange(len(tokens)) >= (len(tokens) - 1 if scored else len(prompt)))


def pair(rng: np.random.Generator, number: int, scored: bool) -> Pair:
    """Every fourth has a prompt of one token, and every fourth prompts that differ from some token on."""
    prompt = rng.integers(1, 61, 1 if number % 4 == 1 else rng.integers(*PROMPT, endpoint=True))
    other = prompt.copy()
    if number % 4 == 3:
        other[rng.integers(len(other)) :] = 60 - other[-1]
    return Pair(document(rng, prompt, scored), document(rng, other, scored))


def pairs(scored: bool = False) -> EncodedPairs:
    rng = np.random.default_rng(1)
    made = gathered([pair(rng, number, scored) for number in range(COUNT)])
    if scored:
        return EncodedPairs(made, margin=rng.random(COUNT).astype(np.float32))
    return EncodedPairs(made, ref_logps=-20 * rng.random((COUNT, 2)).astype(np.float32))


def plans(examples: EncodedPairs, accumulation: int = 1, **options: Any) -> tuple[Plan, Plan]:
    """With a row for either document of each pair, and with pairs joined."""
    options = {"max_length": 128, "rows_per_microbatch": ROWS, "accumulation": accumulation, **options}
    joined = {"fills": True, "joined": examples.joined_lengths}
    return Plan(examples.lengths, **options), Plan(examples.lengths, **options, **joined)


def test_what_both_begin_with_is_there_once() -> None:
    prompt, one, two = [11, 12, 13], [21, 22], [31]
    alike = Pair(
        *(Example(np.array([*prompt, *more], np.int32), np.arange(3 + len(more)) >= 3) for more in (one, two))
    )
    short = Pair(*(Example(np.array([9, token], np.int32), np.array([False, True])) for token in (41, 42)))
    batch = EncodedPairs(gathered([alike, short])).joined([[0, 1], []], 16, 2, 7)
    assert batch["tokens"][0, 0].tolist() == [11, 12, 13, 21, 22, 13, 31, 9, 41, 9, 42, *[7] * 5]
    assert batch["positions"][0, 0].tolist() == [0, 1, 2, 3, 4, 2, 3, 0, 1, 0, 1, *[0] * 5]
    assert batch["segments"][0, 0].tolist() == [1, 1, 2, 2, 2, 3, 3, 5, 5, 6, 6, *[0] * 5]
    assert batch["prefixes"][0, 0].tolist() == [1, 1, 1, 1, 1, 1, 1, 5, 5, 6, 6, *[0] * 5]
    assert batch["mask"][0, 0].astype(int).tolist() == [0, 0, 0, 1, 1, 0, 1, 0, 1, 0, 1, *[0] * 5]
    assert batch["pairs"].tolist() == [[True, True], [False, False]]
    assert not batch["segments"][1].any()


def test_a_beginning_ends_before_what_is_learned_and_where_documents_part() -> None:
    tokens = np.arange(1, 9, dtype=np.int32)
    learned = np.arange(8) >= 5
    same, nothing = Example(tokens, learned), Example(tokens, np.zeros(8, bool))
    other = Example(np.array([1, 2, 7, 4, 5, 6, 7, 8], np.int32), learned)
    first = Example(np.array([9, 2, 3], np.int32), np.arange(3) >= 1)
    found = EncodedPairs(
        gathered([Pair(same, same), Pair(same, nothing), Pair(same, other), Pair(same, first)])
    )
    assert found.in_common.tolist() == [5, 5, 2, 0]
    assert found.joined_lengths.tolist() == [12, 12, 15, 11]


def test_sizes_of_rows() -> None:
    assert list(sizes(1, 1000)) == [64, 128, 256, 512, 1000]
    assert list(sizes(1, 1000, parts=2)) == [64, 128, 192, 256, 384, 512, 768, 1000]
    assert list(sizes(300, 1200, parts=4)) == [320, 384, 448, 512, 640, 768, 896, 1024, 1200]
    assert list(sizes(500, 1200, parts=8)) == [512, 576, 640, 704, 768, 832, 896, 960, 1024, 1152, 1200]
    assert list(sizes(129, 256, parts=2)) == [192, 256]
    assert list(sizes(5, 8, 8, parts=2)) == [8]
    assert list(sizes(7, 30, 3, parts=2)) == [9, 12, 18, 24, 30]


@pytest.mark.parametrize("parts", [1, 8])
@pytest.mark.parametrize(
    ("rows", "accumulation", "groups"), [(4, 1, 1), (4, 4, 1), (8, 2, 8), (1, 8, 1), (3, 2, 1)]
)
def test_steps_have_the_same_pairs_in_fewer_tokens(
    rows: int, accumulation: int, groups: int, parts: int
) -> None:
    rng = np.random.default_rng(0)
    prompts, *answers = (np.clip(rng.lognormal(4.5, 0.5, 300), 2, 250).astype(int) for _ in range(3))
    lengths, joined = prompts + np.max(answers, axis=0), prompts + np.sum(answers, axis=0) + 1
    options: dict[str, Any] = {"max_length": 512, "rows_per_microbatch": rows, "accumulation": accumulation}
    apart, filled = Plan(lengths, **options), Plan(lengths, **options, fills=True, groups=groups, parts=parts)
    plan, areas = replace(filled, joined=joined), np.zeros(2)
    for step in range(apart.steps):
        given, before, laid = apart.laid(step), filled.laid(step), plan.laid(step)
        rows_of = [
            sorted(i for micro in each.slots for slot in micro for i in slot) for each in (given, laid)
        ]
        assert rows_of[0] == rows_of[1]
        assert all(len(micro) == len(laid.slots[0]) for micro in laid.slots)
        assert len(laid.slots[0]) % groups == 0
        assert len(laid.slots) <= accumulation
        assert len(laid.slots[0]) * laid.length <= (1 + laid.joined) * rows * given.length
        sizes = joined if laid.joined else lengths
        assert all(sum(sizes[i] for i in slot) <= laid.length for micro in laid.slots for slot in micro)
        areas += 2 * before.area, laid.area * (2 - laid.joined)
        assert laid.area * (2 - laid.joined) <= 2 * before.area
    assert areas[1] < 0.75 * areas[0]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_joined_batches(count: int) -> None:
    examples = pairs()
    _, plan = plans(examples, accumulation=2, groups=4)
    whole = list(batches(plan, examples, 0))
    assert any("prefixes" in batch for batch in whole)
    parts = [list(batches(plan, examples, 0, process_index=p, process_count=count)) for p in range(count)]
    for step, *shares in zip(whole, *parts, strict=True):
        for name, array in step.items():
            np.testing.assert_array_equal(np.concatenate([share[name] for share in shares], axis=1), array)


def dpo_of(*losses: str, **settings: Any) -> StageConfig:
    return dpo.Options(stage_type="dpo", loss_type=losses, **settings)


CASES: dict[str, StageConfig] = {
    "dpo": dpo_of("sigmoid"),
    "weighed": dpo_of("sigmoid", use_weighting=True, ld_alpha=0.5),
    "ipo": dpo_of("ipo"),
    "sigmoid_norm": dpo_of("sigmoid_norm", f_divergence_type="forward_kl"),
    "several": dpo_of("hinge", "sft", rpo_alpha=0.5),
    "aot": dpo_of("aot"),
    "simpo": dpo_of("simpo"),
    "orpo": dpo_of("orpo"),
    "reward": reward.Options(stage_type="reward", center_rewards_coefficient=0.1),
}
WINDOWS = ("mistral, window", "qwen2, window", "llama3", "yarn", "dynamic, within", "multi-query")
Compared = Callable[..., None]


def compared(stage: StageConfig, accumulation: int = 1, attention: str = "blocked", **hf: Any) -> None:
    """A step over pairs that share rows is that over pairs that don't."""
    examples = pairs(stage.scores)
    described = {**TINY, **hf}
    if stage.scores:
        model = build(scoring_config(described), labels=1, attention=attention)
    else:
        model = build(described, attention=attention)
    params, found = random_params(model), []
    step = jax.jit(train_step(stage.loss(model), recorder(), constant(0.5), 0.0))
    for plan in plans(examples, accumulation):
        batch = next(batches(plan, examples, 0, threads=0))
        state, metrics = step(initial_state(params, recorder()), {}, batch)
        found.append(("prefixes" in batch, batch["tokens"].size, state.opt_state, finish(metrics)))
    (shared, area, gradient, metrics), (sharing, less, other, others) = found
    assert (shared, sharing) == (False, True)
    assert less < area
    assert_close(other, gradient, EXACT)
    assert others == pytest.approx(metrics, rel=EXACT, abs=EXACT)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 16)


@pytest.mark.parametrize("name", some(CASES, ["dpo", "reward", "several"]))
def test_a_step_is_the_same(name: str) -> None:
    compared(CASES[name])


def test_a_step_of_several_microbatches_is_the_same() -> None:
    compared(CASES["weighed"], accumulation=4)


def test_attention_that_holds_all_scores() -> None:
    compared(CASES["dpo"], attention="xla")


@pytest.mark.parametrize("variant", some(WINDOWS, ["qwen2, window"]))
def test_models_of_all_kinds(variant: str) -> None:
    compared(CASES["dpo"], **VARIANTS[variant])


def test_the_references_scores_are_the_same() -> None:
    stage, examples = CASES["weighed"], replace(pairs(), ref_logps=None)
    model = build(TINY, attention="blocked")
    params, scores, sums = random_params(model), stage.reference_scores(model), np.zeros((2, COUNT, 2))
    assert scores is not None
    score = jax.jit(scores)
    for number, plan in enumerate(plans(examples)):
        for step, batch in enumerate(batches(plan, examples, 0)):
            scored = np.asarray(score(params, {name: array[0] for name, array in batch.items()})["ref_logps"])
            for slot, values in zip(plan.laid(step).slots[0], scored, strict=True):
                sums[number, slot] = values[:, : len(slot)].T
    np.testing.assert_allclose(sums[1], sums[0], rtol=1e-5)
