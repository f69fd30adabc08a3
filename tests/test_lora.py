"""What an adapter is, starts as and does, against PEFT on the same numbers."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from ntjax import lora
from ntjax.errors import ConfigError
from ntjax.models import Model, build
from ntjax.ops.attention import Tokens
from ntjax.params import Params, Specs
from ntjax.quantised import quantise_4bit
from ntjax.weights import Adapted, dense, einsum
from tests.peft_reference import QWEN2, WARNINGS, adapted, config, trained
from tests.torch_reference import TINY, pair, random_ids, stacked, tokens
from tests.torch_reference import logits as our_logits

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNINGS]
IDS = random_ids(2, 9)
AT = tokens(np.ones_like(IDS))
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def models() -> tuple[Any, Model, Params]:
    return pair(QWEN2)


@pytest.fixture(scope="module")
def specs() -> Specs:
    return build(QWEN2).specs


def started(plan: lora.Plan, specs: Specs, params: Params, seed: int = 0) -> tuple[Params, Params]:
    return plan.initial(params, specs, jax.random.key(seed), jnp.float32)


def modules(plan: lora.Plan, specs: Specs) -> dict[str, tuple[int, float]]:
    """Rank and scale of each adapted module."""
    return {
        name.removesuffix(".weight"): (int(ranks[index]), float(plan.scales[path][index]))
        for path, ranks in plan.ranks.items()
        for index, name in specs[path].tensors()
        if ranks[index]
    }


TARGETS: dict[str, dict[str, Any]] = {
    "none named": {},
    "names": {"target_modules": ["o_proj", "1.mlp.up_proj"]},
    "a whole name": {"target_modules": ["model.layers.1.mlp.up_proj"]},
    "expression": {"target_modules": r"model\.layers\.[01]\.self_attn\.(q|v)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "All-Linear": {"target_modules": "All-Linear"},
    "the head": {"target_modules": ["lm_head"]},
    "excluded names": {"target_modules": LINEAR, "exclude_modules": ["mlp.gate_proj", "q_proj"]},
    "excluded expression": {"target_modules": LINEAR, "exclude_modules": r".*\.0\..*"},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "a whole name is in any layer": {
        "target_modules": ["q_proj", "model.layers.0.mlp.up_proj"],
        "layers_to_transform": [1],
    },
    "modules_to_save come first": {"target_modules": LINEAR, "modules_to_save": ["1.mlp", "k_proj"]},
    "rslora": {"use_rslora": True},
    "the first pattern counts": {
        "target_modules": "all-linear",
        "rank_pattern": {"v_proj": 5, r"layers\.1\..*": 3, "self_attn.q_proj": 7},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 2.0, r".*up_proj": 1.0},
        "use_rslora": True,
    },
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets_ranks_and_scales_are_pefts(case: str, models: Any, specs: Specs) -> None:
    settings = {"r": 4, "lora_alpha": 12, **TARGETS[case]}
    reference: Any = peft.get_peft_model(copy.deepcopy(models[0]), peft.LoraConfig(**settings))
    expected = {
        name.removeprefix("base_model.model."): (layer.r["default"], pytest.approx(layer.scaling["default"]))
        for name, layer in reference.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    assert modules(lora.plan(config(**settings), specs), specs) == expected


def test_what_is_trained_is_declared_under_pefts_names(models: Any, specs: Specs) -> None:
    settings: dict[str, Any] = {"r": 3, "use_dora": True, "modules_to_save": ["norm"]}
    declared = lora.plan(config(**settings), specs).specs(specs)
    ours = {name: spec.torch_shape for spec in declared.values() for _, name in spec.tensors()}
    assert ours == {name: tuple(p.shape) for name, p in trained(adapted(models[0], **settings)).items()}


def test_the_shapes_of_factors_follow_from_the_weights_line(specs: Specs) -> None:
    plan = lora.plan(config(r=3, use_dora=True, target_modules=("o_proj", "lm_head")), specs)
    shapes = {path: spec.shape for path, spec in plan.specs(specs).items()}
    assert shapes == {
        "head.lora_A": (3, 32),
        "head.lora_B": (61, 3),
        "head.lora_magnitude_vector": (61,),
        "blocks.attn.o.lora_A": (2, 3, 4, 8),
        "blocks.attn.o.lora_B": (2, 32, 3),
        "blocks.attn.o.lora_magnitude_vector": (2, 32),
    }


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"target_modules": ("query",)}, "the adapter has no target in this model"),
        ({"target_modules": r"(q|v)_proj"}, "the adapter has no target in this model"),
        (
            {"target_modules": "all-linear", "exclude_modules": ".*"},
            "the adapter has no target in this model",
        ),
        ({"target_modules": ("q_proj", "query")}, "target_modules names 'query', which is nowhere"),
        ({"exclude_modules": ("query",)}, "exclude_modules names 'query'"),
        ({"modules_to_save": ("head",), "rank_pattern": {"k_proj": 3}}, "rank_pattern names 'k_proj'"),
        ({"modules_to_save": ("wte",)}, "modules_to_save names 'wte'"),
        ({"layers_to_transform": (1, 2)}, "names layer 2; the model has 0 to 1"),
        ({"target_modules": ("embed_tokens",)}, "model.embed_tokens, which is no linear layer"),
        ({"target_modules": ".*"}, "input_layernorm, which is no linear layer"),
        ({"target_modules": "all-linear", "layers_to_transform": (1,)}, "goes with a list of names"),
    ],
)
def test_a_target_that_isnt_there_is_an_error(settings: Any, text: str, specs: Specs) -> None:
    with pytest.raises(ConfigError, match=text):
        lora.plan(config(**settings), specs)


def test_the_error_says_where_and_what_there_is(specs: Specs) -> None:
    with pytest.raises(ConfigError) as error:
        lora.plan(config(target_modules=("query",)), specs, where=lambda setting: f"run.toml:{len(setting)}")
    assert str(error.value).splitlines() == [
        'run.toml:14: the adapter has no target in this model: target_modules = ["query"]',
        "  fix: the linear layers are k_proj, o_proj, q_proj, v_proj, down_proj, gate_proj, up_proj, lm_head",
    ]


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ("lm_head",)}, {"target_modules": ("q_proj", "lm_head")}]
)
def test_a_tied_head_cant_be_trained_by_itself(settings: Any) -> None:
    specs = build({**TINY, "tie_word_embeddings": True}).specs
    with pytest.raises(ConfigError, match="name embed_tokens in modules_to_save"):
        lora.plan(config(**settings), specs)


def test_a_config_may_name_the_head_of_another_stage() -> None:
    scoring = build(QWEN2, labels=1).specs
    plan = lora.plan(config(modules_to_save=("lm_head",)), scoring)
    assert plan.whole.keys() == {"score"}


def spread(array: Any) -> float:
    return float(np.std(array))


def test_the_usual_start(specs: Specs, models: Any) -> None:
    _, adapter = started(lora.plan(config(r=16, target_modules=("down_proj",)), specs), specs, models[2])
    a, b = (np.asarray(adapter[f"blocks.mlp.down.{part}"]) for part in ("lora_A", "lora_B"))
    assert np.abs(a).max() <= 1 / math.sqrt(48)
    assert spread(a) == pytest.approx(1 / math.sqrt(3 * 48), rel=0.05)
    assert not b.any()
    assert not np.array_equal(a[0], a[1])


def test_a_gaussian_start_depends_on_each_layers_rank(specs: Specs, models: Any) -> None:
    settings = config(r=16, init_lora_weights="gaussian", rank_pattern={"0.self_attn.q_proj": 4})
    _, adapter = started(lora.plan(settings, specs), specs, models[2])
    a = np.asarray(adapter["blocks.attn.q.lora_A"])
    assert spread(a[0, :4]) == pytest.approx(1 / 4, rel=0.15)
    assert not a[0, 4:].any()
    assert spread(a[1]) == pytest.approx(1 / 16, rel=0.15)
    assert not adapter["blocks.attn.q.lora_B"].any()


def test_a_start_with_both_factors_random(specs: Specs, models: Any) -> None:
    settings = config(r=16, init_lora_weights=False, rank_pattern={"0.self_attn.q_proj": 4})
    _, adapter = started(lora.plan(settings, specs), specs, models[2])
    a, b = (np.asarray(adapter[f"blocks.attn.q.{part}"]) for part in ("lora_A", "lora_B"))
    assert spread(a[1]) == pytest.approx(1 / math.sqrt(3 * 32), rel=0.1)
    assert spread(b[0, ..., :4]) == pytest.approx(1 / math.sqrt(3 * 4), rel=0.15)
    assert not b[0, ..., 4:].any()
    assert spread(b[1]) == pytest.approx(1 / math.sqrt(3 * 16), rel=0.1)


def test_dora_starts_with_the_lengths_of_the_rows_it_has(specs: Specs, models: Any) -> None:
    plan = lora.plan(config(use_dora=True, target_modules=("o_proj",), layers_to_transform=(1,)), specs)
    _, adapter = started(plan, specs, models[2])
    lengths = adapter["blocks.attn.o.lora_magnitude_vector"]
    weight = np.asarray(models[2]["blocks.attn.o"][1]).reshape(32, 32)
    np.testing.assert_allclose(lengths[1], np.linalg.norm(weight, axis=1), rtol=1e-6)
    assert not lengths[0].any()


def test_dora_s_lengths_are_not_rounded_to_bf16() -> None:
    """A magnitude that has moved by less than bf16 tells next to 1 counts, on the average over outputs."""
    rng = np.random.default_rng(0)
    base, rows = (jnp.asarray(rng.standard_normal((256, 64)), jnp.float32) for _ in range(2))
    nothing = jnp.zeros((2, 64)), jnp.zeros((256, 2))

    def product(moved: float) -> np.ndarray:
        lengths = jnp.linalg.norm(base.astype(jnp.bfloat16).astype(jnp.float32), axis=-1) * moved
        weight = Adapted(base.astype(jnp.bfloat16), *nothing, jnp.ones(()), lengths)
        return np.asarray(weight.product(rows.astype(jnp.bfloat16), 1), np.float32)

    moved, plain = product(1.003), product(1.0)
    assert (moved * plain).sum() / (plain**2).sum() == pytest.approx(1.003, abs=5e-4)


def quantised(specs: Specs, params: Params, path: str) -> Params:
    shape = specs[path].shape[1:]
    layers = [quantise_4bit(np.asarray(w), "nf4", False, shape) for w in params[path]]
    return {**params, path: jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def test_dora_on_a_quantised_weight_starts_with_the_lengths_it_stands_for(specs: Specs, models: Any) -> None:
    base = quantised(specs, models[2], "blocks.mlp.up")
    plan = lora.plan(config(use_dora=True, target_modules=("up_proj",)), specs)
    frozen, adapter = started(plan, specs, base)
    expected = np.linalg.norm(base["blocks.mlp.up"].dense(jnp.float32), axis=-1)
    np.testing.assert_allclose(adapter["blocks.mlp.up.lora_magnitude_vector"], expected, rtol=1e-6)
    joined = our_logits(models[1], plan.join(frozen, adapter), IDS, AT)
    np.testing.assert_allclose(joined, our_logits(models[1], base, IDS, AT), atol=1e-4)


def test_pissa_takes_the_largest_singular_vectors_out_as_peft_does(specs: Specs, models: Any) -> None:
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "init_lora_weights": "pissa",
        "target_modules": LINEAR,
    }
    plan = lora.plan(config(**settings), specs)
    frozen, adapter = started(plan, specs, models[2])
    reference: Any = peft.get_peft_model(copy.deepcopy(models[0]), peft.LoraConfig(**settings))
    left = {n.replace(".base_layer", ""): t for n, t in reference.base_model.model.state_dict().items()}
    expected = stacked(left, specs)
    joined = plan.join(frozen, adapter)
    for path in plan.ranks:
        np.testing.assert_allclose(frozen[path], expected[path], atol=1e-5)
        np.testing.assert_allclose(dense(joined[path], jnp.float32), models[2][path], atol=1e-5)


def test_pissa_by_iteration_comes_to_the_same(specs: Specs) -> None:
    u, _, v = np.linalg.svd(np.random.default_rng(0).standard_normal((2, 48, 32)), full_matrices=False)
    singular = 2.0 ** -np.arange(32)
    params = {"blocks.mlp.up": jnp.asarray(u * singular @ v, jnp.float32)}
    settings = config(r=3, init_lora_weights="pissa_niter_8", target_modules=("up_proj",))
    frozen, adapter = started(lora.plan(settings, specs), specs, params)
    singular[:3] = 0
    np.testing.assert_allclose(frozen["blocks.mlp.up"], u * singular @ v, atol=1e-5)
    assert adapter["blocks.mlp.up.lora_A"].shape == (2, 3, 32)


def test_pissa_in_some_layers_leaves_the_others_as_they_are(specs: Specs, models: Any) -> None:
    plan = lora.plan(config(init_lora_weights="pissa", layers_to_transform=(1,), r=4), specs)
    frozen, adapter = started(plan, specs, models[2])
    np.testing.assert_array_equal(frozen["blocks.attn.q"][0], models[2]["blocks.attn.q"][0])
    assert not adapter["blocks.attn.q.lora_A"][0].any()
    assert adapter["blocks.attn.q.lora_A"][1].all()


def test_pissa_needs_plain_weights_and_a_rank_they_have(specs: Specs, models: Any) -> None:
    settings: dict[str, Any] = {"init_lora_weights": "pissa", "target_modules": ("up_proj",)}
    with pytest.raises(ConfigError, match="PiSSA can't start from quantised weights"):
        started(lora.plan(config(**settings), specs), specs, quantised(specs, models[2], "blocks.mlp.up"))
    with pytest.raises(ConfigError, match="at most 32 parts"):
        started(lora.plan(config(r=33, **settings), specs), specs, models[2])


def test_what_starts_at_nothing_changes_nothing(specs: Specs, models: Any) -> None:
    plan = lora.plan(config(target_modules="all-linear", bias="all", modules_to_save=("norm",)), specs)
    frozen, adapter = started(plan, specs, models[2])
    assert plan.starts_at_nothing
    joined = our_logits(models[1], plan.join(frozen, adapter), IDS, AT)
    np.testing.assert_array_equal(joined, our_logits(models[1], models[2], IDS, AT))
    assert all(adapter[path] is not models[2][path] for path in plan.whole)


GRADIENTS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": [*LINEAR, "lm_head"], "bias": "all"},
    "dora": {"target_modules": LINEAR, "use_dora": True, "use_rslora": True},
    "trained whole": {"modules_to_save": ["embed_tokens", "norm"], "layers_to_transform": [1]},
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_are_torchs(case: str, specs: Specs, models: Any) -> None:
    base, model, params = models
    settings = {"r": 2, "lora_alpha": 4, **GRADIENTS[case]}
    reference = adapted(base, **settings)
    plan = lora.plan(config(**settings), specs)
    declared = plan.specs(specs)
    weighting = np.random.default_rng(0).standard_normal((*IDS.shape, 61)).astype(np.float32)
    parameters = {name.replace(".base_layer", ""): p for name, p in trained(reference).items()}
    (reference(torch.tensor(IDS)).logits * torch.tensor(weighting)).sum().backward()
    values, expected = (
        stacked(absent_as_zero(tensors, declared), declared)
        for tensors in (parameters, {name: p.grad for name, p in parameters.items()})
    )
    for path in expected:
        assert float(jnp.abs(expected[path]).max()) > 0.1

    def loss(adapter: Params, at: Tokens) -> jax.Array:
        hidden = model.hidden(plan.join(params, adapter), jnp.asarray(IDS), at)
        logits = einsum("BTD,VD->BTV", hidden, model.head(plan.join(params, adapter)))
        return jnp.sum(logits * weighting)

    gradients = jax.jit(jax.grad(loss))(values, AT)
    for path, gradient in gradients.items():
        largest = float(jnp.abs(expected[path]).max())
        np.testing.assert_allclose(gradient, expected[path], atol=1e-5 * largest, rtol=0, err_msg=path)


def absent_as_zero(tensors: Mapping[str, Any], specs: Specs) -> dict[str, torch.Tensor]:
    """The tensors of layers without an adapter are zeros here."""
    declared = {name: spec.torch_shape for spec in specs.values() for _, name in spec.tensors()}
    assert tensors.keys() <= declared.keys()
    return {name: torch.zeros(shape) for name, shape in declared.items()} | dict(tensors)


def one_layer(params: Params, path: str, layer: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[layer], params[path])


def test_padding_gets_no_gradient(specs: Specs, models: Any) -> None:
    settings = config(
        r=4, init_lora_weights=False, rank_pattern={"0.mlp.up_proj": 1}, target_modules=("up_proj",)
    )
    plan = lora.plan(settings, specs)
    frozen, adapter = started(plan, specs, models[2])
    x = jax.random.normal(jax.random.key(1), (3, 32))

    def total(adapter: Params) -> jax.Array:
        joined = plan.join(frozen, adapter)
        layers = (one_layer(joined, "blocks.mlp.up", layer) for layer in (0, 1))
        return jnp.sum(jnp.stack([einsum("BD,MD->BM", x, w) for w in layers]))

    gradients = {
        path.rpartition("_")[2]: np.asarray(g) for path, g in jax.jit(jax.grad(total))(adapter).items()
    }
    assert gradients["A"][0, :1].all()
    assert not gradients["A"][0, 1:].any()
    assert gradients["B"][0, :, :1].all()
    assert not gradients["B"][0, :, 1:].any()
    assert gradients["A"][1].all()
    assert gradients["B"][1].all()


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_is_right_on_average(dora: bool, specs: Specs, models: Any) -> None:
    plan = lora.plan(config(r=2, init_lora_weights=False, lora_dropout=0.25, use_dora=dora), specs)
    frozen, adapter = started(plan, specs, models[2])
    x = jax.random.normal(jax.random.key(1), (1, 5, 32))

    @jax.jit
    def output(key: jax.Array | None) -> jax.Array:
        return einsum("BTD,HhD->BTHh", x, one_layer(plan.join(frozen, adapter, key), "blocks.attn.q", 1))

    outputs = jax.vmap(output)(jax.random.split(jax.random.key(2), 1000))
    assert spread(outputs[:, 0, 0, 0, 0]) > 0
    error = jnp.std(outputs, axis=0) / math.sqrt(len(outputs))
    assert float(jnp.max(jnp.abs(jnp.mean(outputs, axis=0) - output(None)) / error)) < 5


def test_dropout_differs_by_key_weight_and_layer(specs: Specs, models: Any) -> None:
    plan = lora.plan(config(lora_dropout=0.5, target_modules=("q_proj", "v_proj", "lm_head")), specs)
    frozen, adapter = started(plan, specs, models[2])
    keys = [
        jax.random.key_data(key).tolist()
        for seed in (0, 1)
        for path in plan.ranks
        for key in jnp.ravel(plan.join(frozen, adapter, jax.random.key(seed))[path].key)
    ]
    assert len(keys) == 2 * (2 + 2 + 1)
    assert len(set(map(tuple, keys))) == len(keys)


def test_no_key_or_no_rate_is_no_dropout(specs: Specs, models: Any) -> None:
    for rate, key in ((0.5, None), (0.0, jax.random.key(0))):
        plan = lora.plan(config(lora_dropout=rate), specs)
        frozen, adapter = started(plan, specs, models[2])
        assert plan.join(frozen, adapter, key)["blocks.attn.q"].key is None


def test_dropout_reaches_the_logits_through_the_scan(specs: Specs, models: Any) -> None:
    plan = lora.plan(config(lora_dropout=0.5, init_lora_weights=False), specs)
    frozen, adapter = started(plan, specs, models[2])
    some, same, other = (
        our_logits(models[1], plan.join(frozen, adapter, jax.random.key(seed)), IDS, AT) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(some, same)
    assert not jnp.array_equal(some, other)


def test_a_plan_goes_on_with_the_adapter_it_describes(specs: Specs) -> None:
    plan = lora.plan(config(r=4, modules_to_save=("norm",)), specs)
    assert plan.has(lora.plan(config(r=4), specs))
    assert not plan.has(lora.plan(config(r=8, lora_alpha=16.0), specs))
    assert not plan.has(lora.plan(config(r=4, lora_alpha=16.0), specs))
    assert not plan.has(lora.plan(config(r=4, use_dora=True), specs))
    assert not plan.has(lora.plan(config(r=4, bias="all"), specs))
