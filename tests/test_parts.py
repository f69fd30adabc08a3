"""Parts of a model that stay as they are, and parts with learning rates of their own, as torch has them."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import get_cosine_schedule_with_warmup
from transformers.trainer import Trainer

from ntjax import lora, parts, trainer
from ntjax.checkpoint import read_meta
from ntjax.config import load_config
from ntjax.errors import ConfigError
from ntjax.estimate import shapes
from ntjax.estimate.programs import Programs
from ntjax.export import main as export_command
from ntjax.hf.files import read_config
from ntjax.hf.peft import load_adapter, save_adapter
from ntjax.layout import Layout
from ntjax.loop import Loop, stage_step
from ntjax.mesh import make_mesh
from ntjax.params import Specs, weight
from ntjax.policy import Policy, quantisable
from ntjax.prepare import Job, layout_of, prepare
from ntjax.reference import with_reference
from ntjax.signals import StopRequest
from ntjax.stages.sft import Options
from ntjax.step import initial_state
from tests.cli.process import write_rows
from tests.peft_reference import QWEN2, WARNINGS, adapted, config, load, trained
from tests.peft_reference import logits as their_logits
from tests.tiny import tiny_model
from tests.torch_reference import TINY, logits, pair, random_ids, stacked, tokens

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNINGS]
STEPS, RATE, DECAY, CLIP = 5, 1e-3, 0.1, 1.0  # larger steps make more of a last bit's difference
FREEZE = ("embed", r"self_attn\.[kv]_proj", "blocks.attn_norm")
RATES = {"mlp.up": 3e-3, r"q_proj\.weight": 1e-4, "head": 0.0}


def stage(**settings: Any) -> Options:
    given = {
        "learning_rate": RATE,
        "weight_decay": DECAY,
        "max_grad_norm": CLIP,
        "warmup_steps": 1,
        "seed": 0,
    }
    return Options(stage_type="sft", **(given | {"freeze": FREEZE, "learning_rates": RATES} | settings))


def torch_steps(model: Any, rates: Mapping[str, float], ids: np.ndarray, make: Any) -> None:
    """Trains what requires a gradient, in groups by decay and by the rate of each name, as Trainer makes them."""
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    groups = [
        {"params": [p], "lr": rates.get(name, RATE), "weight_decay": DECAY if name in decayed else 0.0}
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    optimizer = make(groups, lr=RATE)
    schedule = get_cosine_schedule_with_warmup(optimizer, 1, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.tensor(ids), labels=torch.tensor(ids, dtype=torch.long)).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], CLIP)
        optimizer.step()
        schedule.step()


def our_steps(which: Options, model: Any, join: Any, frozen: Any, params: Any, specs: Specs, ids: Any) -> Any:
    layout = Layout(make_mesh(None, [jax.devices()[0]]))
    step, optimizer = stage_step(which, model, specs, join, layout, STEPS)
    state, compiled = initial_state(params, optimizer), jax.jit(step)
    places = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    batch = {
        "tokens": ids,
        "mask": np.ones_like(ids, bool),
        "segments": np.ones_like(ids),
        "positions": places,
    }
    batch["mask"][:, 0] = False
    for _ in range(STEPS):
        state, _ = compiled(state, frozen, {name: jnp.asarray(x)[None] for name, x in batch.items()})
    return state


@pytest.mark.parametrize(
    ("settings", "make"),
    [({"optimizer": "adamw_torch"}, torch.optim.AdamW), ({"optimizer": "sgd"}, torch.optim.SGD)],
    ids=["adamw", "sgd"],
)
def test_training_with_frozen_parts_and_rates_is_torchs(settings: dict[str, Any], make: Any) -> None:
    theirs, model, params = pair({**TINY, "tie_word_embeddings": False})
    before = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    rates = {}
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad = not re.search(r"embed|self_attn\.[kv]_proj|input_layernorm", name)
        for part, rate in {"up_proj": 3e-3, "q_proj": 1e-4, "lm_head": 0.0}.items():
            rates |= {name: rate} if part in name else {}
    ids, which = random_ids(3, 12), stage(**settings)
    torch_steps(theirs, rates, ids, make)
    still = parts.frozen(FREEZE, model.specs)
    frozen = {path: w for path, w in params.items() if path in still}
    free = {path: spec for path, spec in model.specs.items() if path not in still}
    start = {path: params[path] for path in free}
    state = our_steps(which, model, Policy(start, frozen, free).join, frozen, start, free, ids)
    expected = stacked(theirs.state_dict(), model.specs)
    for path, array in state.params.items():
        np.testing.assert_allclose(array, expected[path], atol=2e-6, rtol=1e-5, err_msg=path)
    moved = {name for name, p in theirs.named_parameters() if not torch.equal(p, before[name])}
    assert {path for path in free if not np.array_equal(params[path], expected[path])} == free.keys() - {
        "head"
    }
    assert moved
    assert all(re.search(r"self_attn\.[qo]|mlp|post_att|model\.norm", name) for name in moved)
    kept = [leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(kept) == (2 * len(free) if make is torch.optim.AdamW else 0)


def test_adapters_with_frozen_parts_and_rates_are_pefts(tmp_path: Path) -> None:
    base, model, params = pair(TINY)
    theirs = adapted(
        base, r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"], exclude_modules=r".*\.up_proj"
    )
    theirs.save_pretrained(tmp_path)
    plan, start = load_adapter(tmp_path, model.specs)
    which = stage(freeze=("mlp",), learning_rates={"lora_B": 3e-2})
    asked = config(r=2, lora_alpha=4.0, target_modules=["q_proj", "up_proj"])
    still = parts.frozen(which.freeze, model.specs)
    assert lora.plan(asked, model.specs, frozen=still).has(plan)
    ids, specs = random_ids(3, 12), plan.specs(model.specs)
    rates = {name: 3e-2 for name, _ in theirs.named_parameters() if "lora_B" in name}
    torch_steps(theirs, rates, ids, torch.optim.AdamW)
    state = our_steps(which, model, plan.join, params, start, specs, ids)
    expected = stacked(trained(theirs), specs)
    assert state.params.keys() == {"blocks.attn.q.lora_A", "blocks.attn.q.lora_B"}
    for path, array in state.params.items():
        assert not np.allclose(array, start[path], atol=1e-3)
        np.testing.assert_allclose(array, expected[path], atol=2e-6, rtol=1e-5, err_msg=path)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "up_proj"], "bias": "all"},
        {"modules_to_save": ["input_layernorm", "embed_tokens", "down_proj"], "bias": "lora_only"},
    ],
    ids=["all-linear", "biases", "modules_to_save"],
)
def test_an_adapter_beside_frozen_parts_is_one_for_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    """Its settings name what is trained and no more, so that PEFT makes it of the same modules."""
    base, model, params = pair(QWEN2)
    asked = config(r=2, lora_alpha=4.0, init_lora_weights=False, **settings)
    still = parts.frozen(("mlp", "k_proj", "embed"), model.specs)
    plan = lora.plan(asked, model.specs, frozen=still)
    assert not still & {*plan.ranks, *plan.whole}
    adapter = plan.initial(params, model.specs, jax.random.key(0), jnp.float32)[1]
    adapter = {path: array + 0.1 * (array != 0) for path, array in adapter.items()}
    save_adapter(tmp_path, plan, adapter, model.specs, asked, "base")
    again, read = load_adapter(tmp_path, model.specs)
    assert again.has(plan)
    assert plan.has(again)
    assert all(np.array_equal(read[path], array) for path, array in adapter.items())
    ids = random_ids(2, 9)
    ours = logits(model, plan.join(params, adapter), ids, tokens(np.ones_like(ids)))
    theirs = load(base, tmp_path)
    assert np.abs(their_logits(theirs, ids) - np.asarray(ours)).max() <= 1e-4
    assert not any(
        re.search(r"mlp|k_proj\.lora|embed.*modules", name) for name in theirs.state_dict() if "lora" in name
    )


def with_tower() -> Specs:
    """A model's specs with a patch embedding, a layer that is read, one that nothing reads, and a projector."""
    sizes = {"layers": 2, "wide": 8, "tall": 4, "embed": 16, "patch": 7}
    lines = {
        "vision_tower.patch": ("wide patch patch -> embed", "model.vision_tower.patch.weight", True),
        "vision_tower.blocks.up": ("wide -> tall", "model.vision_tower.layers.{layers}.fc1.weight", False),
        "vision_tower.unused.up": ("wide -> tall", "model.vision_tower.layers.2.fc1.weight", False),
        "projector.up": ("wide -> embed", "model.multi_modal_projector.linear_1.weight", False),
        "blocks.up": ("wide -> tall", "model.language_model.layers.{layers}.up_proj.weight", False),
        "embed": ("wide tall", "model.language_model.embed_tokens.weight", False),
        "head": ("wide -> tall", "lm_head.weight", False),
    }
    found = {p: weight(sizes, axes, hf, kernel=kernel) for p, (axes, hf, kernel) in lines.items()}
    return {path: one.get_metadata()["spec"] for path, one in found.items()}


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("vision_tower", {"vision_tower.patch", "vision_tower.blocks.up"}),
        ("multi_modal_projector", {"projector.up"}),
        ("language_model", {"blocks.up", "embed", "head"}),
        (r"^blocks", {"blocks.up"}),
        (r"layers\.{layers}\.fc1", {"vision_tower.blocks.up"}),
    ],
)
def test_parts_go_by_their_paths_or_by_their_modules(pattern: str, named: set[str]) -> None:
    """What nothing reads is frozen in any case."""
    assert parts.frozen([pattern], with_tower()) == named | {"vision_tower.unused.up"}


def test_what_nothing_reads_and_kernels_are_neither_adapted_nor_quantised() -> None:
    specs = with_tower()
    plan = lora.plan(config(target_modules="all-linear", bias="all"), specs)
    assert plan.ranks.keys() == {"vision_tower.blocks.up", "projector.up", "blocks.up"}
    assert quantisable(specs) == {"vision_tower.blocks.up", "blocks.up"}
    with pytest.raises(ConfigError, match="freeze leaves nothing to train"):
        parts.frozen(["vision_tower", "projector", "language_model"], specs)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    tiny_model(folder / "model")
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n} {n}."} for n in range(24)]
    write_rows(folder / "rows.jsonl", rows)
    pairs = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "Sky."} for n in range(24)]
    write_rows(folder / "pairs.jsonl", pairs)
    return folder


def settings(place: Path, kind: str, model: dict[str, Any] | None = None, **stage: Any) -> Any:
    told: dict[str, Any] = {
        "base_output_dir": str(place / "out"),
        "use_tensorboard": False,
        "model": {"model_name_or_path": str(place / "model"), **(model or {})},
        "datasets": {
            "rows": {"dataset_path": str(place / ("pairs.jsonl" if kind == "dpo" else "rows.jsonl"))}
        },
        "stages": [
            {"stage_type": kind, "max_steps": 4, "save_steps": 2, "warmup_steps": 1, "max_length": 48}
            | {"per_device_train_batch_size": 1, "logging_steps": 1, "learning_rate": 1e-2}
            | stage
        ],
    }
    path = place / "run.json"
    path.write_text(json.dumps(told, indent=1))
    return load_config(path)


def run(config: Any, folder: Path, **how: Any) -> dict[str, np.ndarray]:
    job = Job(config, config.stages[0], Path(config.model.model_name_or_path), folder, "base", **how)
    trainer.train(prepare(job), StopRequest())
    return load_file(folder / "model.safetensors")


FROZEN_MLP = {"freeze": [r"\.mlp\.", "embed"], "learning_rates": {"attn.q": 3e-2}, "weight_decay": 0.1}


def test_a_stage_with_frozen_parts_resumes_and_exports(place: Path) -> None:
    config, whole = settings(place, "sft", **FROZEN_MLP), place / "whole"
    weights, before = run(config, whole), load_file(place / "model" / "model.safetensors")
    still = {name for name in before if np.array_equal(before[name], weights[name])}
    assert still == {name for name in before if re.search(r"mlp|embed", name)}
    leaves = json.loads((whole / "checkpoint-4" / "record" / "metadata").read_text())["leaves"]
    assert not any(re.search(r"mlp\.|embed", name) for name in leaves)
    meta = read_meta(whole, 4)["settings"]
    assert (meta["freeze"], meta["learning_rates"]) == ([r"\.mlp\.", "embed"], {"attn.q": 3e-2})

    half = shutil.copytree(whole, place / "half")
    again = run(config, half, resume=True, resume_step=2)
    assert all(np.array_equal(again[name], weights[name]) for name in weights)

    out = place / "exported"
    export_command(["--checkpoint", str(whole / "checkpoint-4"), "--out", str(out)])
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()

    other = replace(config, stages=(replace(config.stages[0], freeze=("embed",)),))
    with pytest.raises(ConfigError, match=r"freeze: .*'embed'\] -> \['embed'\]"):
        run(other, half, resume=True)


def test_adapters_beside_frozen_parts_resume_and_export(place: Path) -> None:
    model = {"use_lora": True, "lora_config": {"r": 2, "target_modules": "all-linear"}}
    config, whole = settings(place, "sft", model, **FROZEN_MLP), place / "lora"
    run(config, whole)
    out = place / "exported adapter"
    export_command(["--checkpoint", str(whole / "checkpoint-4"), "--out", str(out), "--adapter-only"])
    ours = load_file(whole / "adapter" / "adapter_model.safetensors")
    assert len(ours) == 16
    assert not any("mlp" in name for name in ours)
    one, other = (folder / "adapter_model.safetensors" for folder in (out, whole / "adapter"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    "settings_", [{}, {"sync_ref_model": True, "ref_model_sync_steps": 2}], ids=["", "synced"]
)
def test_a_reference_shares_what_is_frozen(settings_: dict[str, Any], place: Path, monkeypatch: Any) -> None:
    seen: list[Any] = []
    collect = Loop.collect

    def spied(loop: Any) -> None:
        seen.append((loop.frozen, loop.weights().reference, loop.done))
        collect(loop)

    monkeypatch.setattr(Loop, "collect", spied)
    run(settings(place, "dpo", **FROZEN_MLP, **settings_), place / f"dpo{len(settings_)}")
    for frozen, reference, _ in seen:
        assert frozen.keys() < reference.keys()
        assert all(reference[path] is w for path, w in frozen.items())


@pytest.mark.parametrize(
    "model", [{}, {"dtype": "bfloat16"}, {"use_lora": True}], ids=["full", "bf16", "lora"]
)
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_plan_holds_what_training_holds(kind: str, model: dict[str, Any], place: Path) -> None:
    config = settings(place, kind, model, **FROZEN_MLP)
    setup = prepare(Job(config, config.stages[0], place / "model", place / "planned"))
    policy = trainer.start(setup)
    made = Programs(config, config.stages[0], read_config(place / "model"), layout_of(config))
    weights = shapes.weights(config, made.stage, made.model, made.layout)

    def told(tree: Any) -> Any:
        return jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype), x.sharding.spec), tree)

    assert told(weights.frozen) == told(policy.frozen)
    assert told(weights.trainable) == told(made.layout.put(policy.trainable, policy.specs))
    train = next(iter(made))
    count = sum(math.prod(spec.shape) for spec in policy.specs.values())
    assert train.held["optimizer"] == 2 * 4 * count + 4
    if kind == "dpo":
        own = with_reference(setup, policy)[1]
        assert own is not None
        apart = sum(
            x.nbytes
            for path, x in own.items()
            if policy.frozen.get(path) is not x and not model.get("use_lora")
        )
        assert train.beside.get("reference", 0) == apart


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing frozen": ({"freeze": ["c_attn"]}, "freeze names 'c_attn', which is nowhere in the model"),
    "all frozen": ({"freeze": ["."]}, "freeze leaves nothing to train"),
    "no rate": ({"learning_rates": {"c_attn": 1e-3}}, "learning_rates names 'c_attn', which is nowhere"),
    "frozen rate": ({"freeze": ["mlp"], "learning_rates": {"mlp.up": 1e-3}}, "of which nothing is trained"),
    "two rates": (
        {"learning_rates": {"mlp": 1e-3, "up": 2e-3}},
        "blocks.mlp.up the rates of 'mlp' and of 'up'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_told_where_it_is_written(case: str, place: Path) -> None:
    given, message = BAD[case]
    config = settings(place, "sft", **given)
    with pytest.raises(ConfigError) as told:
        prepare(Job(config, config.stages[0], place / "model", place / "bad"))
    name = "learning_rates" if "learning_rates names" in message or "rates of" in message else "freeze"
    name = "learning_rates" if case == "frozen rate" else name
    line = next(
        n for n, text in enumerate((place / "run.json").read_text().splitlines(), 1) if f'"{name}"' in text
    )
    assert message in str(told.value)
    assert f"run.json:{line}" in str(told.value)
    parts_told = re.search(r"(parts of the model|trained) are (.*)", str(told.value))
    if case != "two rates":
        assert parts_told is not None
        assert parts_told[2] == ("blocks, embed, norm")
    with pytest.raises(ConfigError, match=re.escape(message)):
        list(Programs(config, config.stages[0], read_config(place / "model"), layout_of(config)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"freeze": ["("]}, "is no regular expression"),
        ({"learning_rates": {"mlp": -1.0}}, "must be at least 0"),
        ({"learning_rates": {"mlp": 1e-3}, "learning_rate": 0.0}, "which is 0 from the start"),
    ],
)
def test_settings_that_can_never_be_are_refused_early(
    given: dict[str, Any], message: str, place: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(place, "sft", **given)


def test_an_adapter_without_a_target_left_lists_those_there_are(place: Path) -> None:
    model = {"use_lora": True, "lora_config": {"target_modules": ["up_proj"]}}
    config = settings(place, "sft", model, freeze=["mlp"])
    with pytest.raises(ConfigError, match="the linear layers are k_proj, o_proj, q_proj, v_proj$"):
        prepare(Job(config, config.stages[0], place / "model", place / "bad"))
