"""The sampler: transformers' own greedy text, the trainer's own log-probabilities, rows that mind their business."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ntjax import sampler, slots
from ntjax.data.prompts import Prompt
from ntjax.draw import Sampling, cut, draw, inverse, penalised
from ntjax.estimate.traffic import Program
from ntjax.layout import RULES, Layout
from ntjax.mesh import make_mesh
from ntjax.models import Model
from ntjax.params import Params
from ntjax.sampler import Completion, Sampler, Taken
from ntjax.slots import Prompts, Shape
from tests.torch_reference import TINY, logits, pair, tokens
from tests.trl_reference import smollm2_folder

PROMPTS = [[5, 6, 7], [10, 11, 12, 13, 14, 15, 16], [20]]
GREEDY = Sampling(max_new_tokens=20, temperature=0.0)
DRAWN = Sampling(max_new_tokens=20, temperature=0.7, top_k=5, top_p=0.9)
FREE = Sampling(max_new_tokens=20, temperature=0.7)


GROUPED = TINY["num_key_value_heads"]


@cache
def tiny(kv_heads: int = GROUPED) -> tuple[Any, Model, Params]:
    return pair({**TINY, "eos_token_id": None, "num_key_value_heads": kv_heads})


def complete(
    prompts: Sequence[Sequence[int]], sampling: Sampling, slots: int = 64, **options: Any
) -> list[Completion]:
    _, model, params = tiny(options.pop("kv_heads", GROUPED))
    model = replace(model, looped=options.pop("looped", None))
    layout = options.pop("layout", None)
    if layout is not None:
        model = replace(model, layout=layout)
        params = layout.put(params, model.specs)
    made = Sampler(model, sampling, slots=slots, tokenizer=options.pop("tokenizer", None))
    return made(params, [Prompt(prompt) for prompt in prompts], **options)


@cache
def greedy() -> list[Completion]:
    return complete(PROMPTS, GREEDY)


def over(**sizes: int) -> Layout:
    rules = {**RULES, "vocab": "none"}  # 61 words can't be shared by two
    layout = Layout(make_mesh(sizes), zero=3, rules=tuple(rules.items()))
    assert layout.mesh.size == 8
    return layout


def same(ours: Sequence[Completion], theirs: Sequence[Completion], atol: float = 2e-5) -> None:
    assert [c.tokens for c in ours] == [c.tokens for c in theirs]
    assert [c.finished for c in ours] == [c.finished for c in theirs]
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=atol)


def test_greedy_is_transformers_greedy() -> None:
    theirs, _, _ = tiny()
    for prompt, completion in zip(PROMPTS, greedy(), strict=True):
        ids = torch.tensor([prompt])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
        assert completion.tokens == out[0, len(prompt) :].tolist()
        assert completion.finished == "length"
        assert len(set(completion.tokens)) > 5


def test_greedy_with_a_repetition_penalty_is_transformers_too() -> None:
    theirs, _, _ = tiny()
    ours = complete(PROMPTS, Sampling(max_new_tokens=20, temperature=0.0, repetition_penalty=1.3))
    assert [c.tokens for c in ours] != [c.tokens for c in greedy()]
    for prompt, completion in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "repetition_penalty": 1.3}
        out = theirs.generate(ids, max_new_tokens=20, **options)
        assert completion.tokens == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, FREE], ids=["greedy", "cut", "free"])
def test_reported_logprobs_are_those_of_a_full_forward_pass(sampling: Sampling) -> None:
    # Of the whole distribution at the temperature, whatever was drawn from.
    _, model, params = tiny()
    completions = complete(PROMPTS, sampling, group=2)
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    ids = np.zeros((len(prompts), 32), np.int32)
    mask = np.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        text = prompt + completion.tokens
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    logp = jax.nn.log_softmax(logits(model, params, ids, tokens(mask)) / (sampling.temperature or 1.0))
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        at = np.arange(len(completion.tokens)) + len(prompt) - 1
        expected = logp[row, at, np.array(completion.tokens)]
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=2e-5)


def test_a_row_depends_on_its_prompt_its_number_and_the_seed_alone() -> None:
    together = complete(PROMPTS, FREE, seed=3)
    same(complete(PROMPTS[:1], FREE, seed=3), together[:1])
    same(complete([PROMPTS[0], [30, 31], [40] * 9], FREE, seed=3)[:1], together[:1])
    same(complete(PROMPTS[1:], FREE, seed=3, first_row=1), together[1:])
    assert complete(PROMPTS, FREE, seed=4) != together


def test_a_group_shares_a_prompt_and_nothing_else() -> None:
    grouped = complete(PROMPTS, FREE, seed=3, group=4)
    each = [prompt for prompt in PROMPTS for _ in range(4)]
    same(grouped, complete(each, FREE, seed=3))
    assert len({tuple(completion.tokens) for completion in grouped[:4]}) == 4


@pytest.mark.parametrize("group", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_slots_that_are_refilled_change_nothing(group: int) -> None:
    prompts = [[n, n + 1] for n in range(3, 14)]
    stops = Sampling(max_new_tokens=70, temperature=0.9, stop_ids=tuple(range(8)))  # lengths differ widely
    whole = complete(prompts, stops, seed=1, group=group)
    assert len({len(completion.tokens) for completion in whole}) > 5
    same(complete(prompts, stops, slots=2 * group, seed=1, group=group), whole)
    same(complete(prompts, stops, slots=3 * group, seed=1, group=group), whole)


MESHES = [{"data": 8}, {"fsdp": 2, "tensor": 2, "sequence": 2}]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_on_eight_devices_it_draws_the_same(sizes: dict[str, int]) -> None:
    eight = complete(PROMPTS * 4, FREE, layout=over(**sizes), seed=2, group=2)
    same(eight, complete(PROMPTS * 4, FREE, seed=2, group=2))


@pytest.mark.slow
def test_a_loop_over_the_layers_draws_the_same() -> None:
    unrolled = complete(PROMPTS * 4, FREE, seed=2, group=2, looped=False)
    same(complete(PROMPTS * 4, FREE, seed=2, group=2, looped=True), unrolled, atol=1e-5)
    for sizes in MESHES:
        eight = complete(PROMPTS * 4, FREE, layout=over(**sizes), seed=2, group=2, looped=True)
        same(eight, unrolled)


@pytest.mark.parametrize(("platform", "looped"), [("tpu", True), ("gpu", False)])
def test_the_order_of_a_cache_in_memory_changes_nothing(
    platform: str, looped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = TINY["num_attention_heads"]  # each query has keys of its own
    plain = complete(PROMPTS, FREE, seed=2, group=2, looped=looped, kv_heads=heads)
    monkeypatch.setitem(slots.ORDERS, "cpu", slots.ORDERS[platform])
    slots.programs.cache_clear()
    layout = over(data=8)
    _, model, _ = tiny(heads)
    model = replace(model, layout=layout, looped=looped)
    state = slots.programs(model, FREE, Shape(8, 1, 2, 32, 32), True).empty()
    orders = [x.format.layout.major_to_minor for x in state.cache.layers[0].own]
    assert orders == list(slots.ORDERS[platform])
    same(complete(PROMPTS, FREE, layout=layout, seed=2, group=2, looped=looped, kv_heads=heads), plain)
    slots.programs.cache_clear()


@pytest.mark.parametrize("looped", [pytest.param(False, marks=pytest.mark.slow), True])
def test_weights_are_cast_once_for_all_tokens_to_the_dtype_that_is_computed_in(
    looped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, params = pair({**TINY, "eos_token_id": None}, dtype="bfloat16")
    model = replace(model, looped=looped)
    assert {w.dtype for w in params.values()} == {jnp.dtype("float32")}
    own, layers = jax.jit(model.copies)(params)
    matrices = {path for path, spec in model.specs.items() if spec.is_matrix}
    assert own.keys() == {path for path in matrices if looped or not path.startswith("blocks.")}
    assert {w.dtype for w in jax.tree.leaves(own)} == {jnp.dtype("bfloat16")}
    assert {w.ndim for w in jax.tree.leaves(own)} == ({2, 3} if looped else {2})
    dtypes = {w.dtype for w in jax.tree.leaves(layers) if w.ndim > 1}
    assert dtypes == (set() if looped else {jnp.dtype("bfloat16")})
    assert jax.jit(model.copies)(params | own)[0] == {}
    drawn = Sampler(model, FREE, slots=4)
    prompts = [Prompt(prompt) for prompt in PROMPTS]
    cast_once = drawn(params, prompts, seed=3)
    monkeypatch.setattr(Model, "copies", lambda self, params: ({}, None if looped else self.layers(params)))
    slots.programs.cache_clear()
    assert drawn(params, prompts, seed=3) == cast_once
    slots.programs.cache_clear()


def test_slots_that_are_free_on_some_of_eight_devices_are_refilled(monkeypatch: pytest.MonkeyPatch) -> None:
    needs: list[np.ndarray] = []  # of each device, at each filling

    def seen(taken: Sequence[Taken], shape: Shape, vision: None) -> Any:
        needs.append(np.bincount([one.slot // shape.slots for one in taken], minlength=shape.devices))
        return batches(taken, shape)

    batches = sampler._batches
    monkeypatch.setattr(sampler, "_batches", seen)
    prompts = [[n % 50 + 3, n % 7 + 3] for n in range(60)]
    stops = Sampling(max_new_tokens=70, temperature=0.9, stop_ids=tuple(range(8)))
    eight = complete(prompts, stops, slots=16, layout=over(data=8), seed=1)
    assert needs[0].tolist() == [2] * 8
    assert any(need.min() == 0 and need.max() == 2 for need in needs)
    assert sum(need.sum() for need in needs) == 60
    same(eight, complete(prompts, stops, seed=1))


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 4, "sequence": 2}], ids=str)
def test_prompts_are_sent_to_no_other_device(sizes: dict[str, int], looped: bool) -> None:
    layout = over(**sizes)
    _, model, params = tiny()
    model = replace(model, layout=layout, looped=looped)
    params = model.gathered(layout.put(params, model.specs))
    shape = Shape.of(64, 2, 32, 60, 20, devices=8)
    assert shape == Shape(devices=8, slots=4, group=2, time=64, columns=32)
    compiled = slots.programs(model, FREE, shape, True)
    each = np.zeros(16, np.int32)
    read = Prompts(np.zeros((16, shape.time), np.int32), each, each, each)
    text = compiled.fill.lower(params, compiled.empty(), read, 0).compile().as_text()  # type: ignore[attr-defined]
    assert max((one.bytes for one in Program(text).collectives), default=0) <= 1024


def test_free_slots_are_dealt_to_the_devices_in_turn() -> None:
    shape = Shape(devices=4, slots=4, group=1, time=32, columns=32)
    free = [0, 1, 2, 3, 5, 7, 12]
    assert sampler._spread(free, shape) == [0, 5, 12, 1, 7, 2, 3]
    taken = [Taken(slot, 10 * slot, Prompt([slot + 1] * 3)) for slot in free]
    (batch,) = sampler._batches(taken, shape)
    none = shape.slots
    assert batch.into.reshape(4, 4).tolist() == [
        [0, 1, 2, 3],
        [1, 3, none, none],
        [none] * 4,
        [0] + [none] * 3,
    ]
    assert batch.numbers[:6].tolist() == [0, 10, 20, 30, 50, 70]
    assert batch.ids[5, :4].tolist() == [8, 8, 8, 0]
    assert len(next(iter(sampler._batches(taken[3:], shape))).ids) == 4 * 2


def test_no_more_tokens_are_read_at_once_than_fit() -> None:
    shape = Shape(devices=4, slots=16, group=1, time=1024, columns=32)
    taken = [Taken(slot, slot, Prompt([5])) for slot in range(10)]
    read = [batch.ids.shape for batch in sampler._batches(taken, shape)]
    assert read == [(16, 1024), (16, 1024), (8, 1024)]


def test_a_stop_token_ends_its_row_and_is_kept() -> None:
    free = greedy()
    stop = free[0].tokens[4]
    stopped = complete(PROMPTS, Sampling(max_new_tokens=20, temperature=0.0, stop_ids=(stop, 60)))
    for completion, whole in zip(stopped, free, strict=True):
        ends = [i for i, token in enumerate(whole.tokens) if token in (stop, 60)]
        kept = ends[0] + 1 if ends else 20
        assert completion.tokens == whole.tokens[:kept]
        assert completion.finished == ("stop" if ends else "length")
        assert len(completion.logprobs) == kept
    assert len(stopped[0].tokens) <= 5
    assert {completion.finished for completion in stopped} == {"stop", "length"}


class Letters:
    """A tokenizer whose token n is "<n>"."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"<{n}>" for n in ids)


def test_a_stop_string_ends_its_row_at_the_token_that_completes_it() -> None:
    free = greedy()
    first, second = free[1].tokens[6:8]
    sampling = Sampling(max_new_tokens=20, temperature=0.0, stop_strings=(f"<{first}><{second}",))
    stopped = complete(PROMPTS, sampling, tokenizer=Letters())
    assert stopped[1].tokens == free[1].tokens[:8]
    assert stopped[1].finished == "stop"
    assert stopped[0].finished == "length"


@pytest.mark.parametrize("limit", [1, 7, 32])
def test_no_more_tokens_than_asked_for(limit: int) -> None:
    completions = complete(PROMPTS, Sampling(limit, 0.0))
    assert [c.tokens[:20] for c in completions] == [c.tokens[:limit] for c in greedy()]
    assert [len(c.logprobs) for c in completions] == [limit] * 3


def test_programs_are_counted_by_buckets_not_by_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = [0]

    def counted(*args: Any) -> Any:
        traced[0] += 1
        return draw(*args)

    monkeypatch.setattr(slots, "draw", counted)

    def compiled(prompt: int, new: int) -> int:
        before = traced[0]
        complete([[5] * prompt], Sampling(new, 0.99), seed=new)
        return traced[0] - before

    first = compiled(1, 1)
    assert first >= 1
    again = compiled(2, 2)  # another limit is another program
    assert again >= 1
    assert [compiled(prompt, 2) for prompt in (1, 17, 32)] == [0, 0, 0]
    assert compiled(33, 2) == again
    assert compiled(64, 2) == 0


def random_logits(size: int = 50) -> np.ndarray:
    return 3 * np.random.default_rng(0).standard_normal(size).astype(np.float32)


CUTS = {
    "top_k": {"top_k": 5},
    "top_k of 1": {"top_k": 1},
    "top_k past the vocabulary": {"top_k": 99},
    "top_p": {"top_p": 0.8},
    "top_p of almost nothing": {"top_p": 1e-4},
    "top_p after temperature": {"temperature": 2.0, "top_p": 0.8},
    "top_p after top_k": {"temperature": 0.5, "top_k": 7, "top_p": 0.6},
    "min_p": {"min_p": 0.1},
    "min_p after all": {"temperature": 1.5, "top_k": 20, "top_p": 0.95, "min_p": 0.2},
    "penalty": {"repetition_penalty": 1.7},
    "penalty below 1, cut": {"repetition_penalty": 0.6, "temperature": 0.7, "top_p": 0.7},
}
SEEN = [3, 7, 11, 40]


@pytest.mark.parametrize("name", CUTS)
def test_what_is_drawn_from_is_transformers(name: str) -> None:
    sampling = Sampling(**CUTS[name])
    row = jnp.asarray(random_logits())[None]
    seen = jnp.zeros((1, 50), bool).at[0, jnp.array(SEEN)].set(True)
    ours = cut(penalised(row, seen, sampling.repetition_penalty) / sampling.temperature, sampling)[0]
    steps: list[Any] = [RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
    steps += [TemperatureLogitsWarper(sampling.temperature)] if sampling.temperature != 1 else []
    steps += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    steps += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    steps += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    theirs = LogitsProcessorList(steps)(torch.tensor([SEEN]), torch.tensor(random_logits())[None])[0].numpy()
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """How many of its standard deviations the statistic lies above its mean."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("options", [{}, {"top_k": 12}, {"top_p": 0.8}, {"min_p": 0.05}])
def test_drawn_frequencies_are_the_softmax(options: dict[str, Any]) -> None:
    draws, size = 40_000, 300  # more than one piece of the vocabulary
    sampling = Sampling(temperature=0.8, **options)
    row = jnp.asarray(random_logits(size))
    uniform = jax.random.uniform(jax.random.key(0), (draws,))
    ids = jax.jit(lambda u: draw(jnp.broadcast_to(row, (draws, size)), u, sampling).ids)(uniform)
    expected = np.asarray(jax.nn.softmax(cut(row[None] / 0.8, sampling))[0]) * draws
    counts = np.bincount(np.asarray(ids), minlength=size)
    assert counts[expected == 0].sum() == 0
    often = expected >= 5
    rest = np.array([counts[~often].sum()]), np.array([max(expected[~often].sum(), 1e-9)])
    both = np.append(counts[often], rest[0]), np.append(expected[often], rest[1])
    assert abs(chi_square(*both)) < 4


def test_frequencies_of_whole_runs_are_the_softmax() -> None:
    _, model, params = tiny()
    found = complete([PROMPTS[0]], Sampling(max_new_tokens=1, temperature=0.7), slots=512, group=4096)
    counts = np.bincount([completion.tokens[0] for completion in found], minlength=TINY["vocab_size"])
    ids = np.array([PROMPTS[0]], np.int32)
    expected = jax.nn.softmax(logits(model, params, ids, tokens(np.ones_like(ids)))[0, -1] / 0.7)
    expected = np.asarray(expected) * len(found)
    often = expected >= 5
    assert abs(chi_square(counts[often], expected[often])) < 4


def test_a_uniform_number_picks_by_running_sums() -> None:
    weights = jnp.asarray([[0.0, 1.0, 0.0, 3.0, 0.0]])
    picked = [int(inverse(weights, jnp.asarray([u]))[0]) for u in (0.0, 0.2, 0.25, 0.9, 0.9999999)]
    assert picked == [1, 1, 3, 3, 3]


def test_temperature_zero_takes_the_likeliest_whatever_the_number() -> None:
    row = jnp.asarray(random_logits())[None]
    drawn = {int(draw(row, jnp.asarray([u]), Sampling(temperature=0.0, top_k=5)).ids[0]) for u in (0.1, 0.9)}
    assert drawn == {int(np.argmax(random_logits()))}


QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "What is 7 + 5? Answer with the number only.",
    "Explain gravity to a child.",
    "Name three colours.",
    "Who wrote Hamlet?",
    "Give me a recipe for pancakes.",
    "Translate 'good morning' into Spanish.",
]


@pytest.mark.slow
def test_greedy_smollm2_is_transformers_token_for_token(tmp_path: Path) -> None:
    from ntjax.hf.files import read_config
    from ntjax.hf.folder import load_params
    from ntjax.hf.tokenizer import load_tokenizer
    from ntjax.models import build

    folder = smollm2_folder(tmp_path / "smollm2")
    tokenizer: Any = load_tokenizer(folder)
    model = build(read_config(folder))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = load_params(folder, model.specs, dtype="float32", sharding=lambda path, shapes: place)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [
        tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False) for turns in asked
    ]
    sampling = Sampling(max_new_tokens=64, temperature=0.0, stop_ids=(tokenizer.eos_token_id,))
    ours = Sampler(model, sampling, slots=4)(params, [Prompt(prompt) for prompt in prompts])
    for prompt, completion in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64, pad_token_id=2
            )
            logp = torch.log_softmax(theirs(out).logits[0], -1)
        assert completion.tokens == out[0, len(prompt) :].tolist()
        at = np.arange(len(completion.tokens)) + len(prompt) - 1
        full = logp.numpy()[at, np.array(completion.tokens)]
        assert np.abs(np.array(completion.logprobs) - full).max() <= 1e-4
