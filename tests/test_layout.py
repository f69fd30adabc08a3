"""Every mesh computes what one device computes, with the collectives and the memory that its ZeRO stage means."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ntjax import mesh as meshes
from ntjax.config import load_config
from ntjax.layout import Layout
from ntjax.models import build
from ntjax.pipeline import run
from ntjax.stages.base import next_token_loss
from ntjax.step import TrainState, train_step
from tests.cases import some
from tests.cli.process import write_rows
from tests.tiny import tiny_model

WORDS = ["sea", "sky", "blue", "wide", "Paris", "France", "capital", "one", "two", "three"]
COMMON = {
    "max_steps": 10,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_strategy": "no",
}
LETTERS = """
def letters(prompts, responses):
    return [sum("a" <= c <= "m" for c in text) / max(len(text), 1) for text in responses]
"""
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"stage_type": "sft", "packing": True, "max_length": 64},
    "dpo": {"stage_type": "dpo", "max_length": 64},
    "grpo": {
        "stage_type": "grpo",
        "num_generations": 4,
        "max_completion_length": 8,
        "beta": 0.1,
        "reward_function": "letters.py:letters",
    },
}
MESHES: dict[str, dict[str, Any]] = {
    "zero 0": {"zero_stage": 0},
    "zero 1": {"zero_stage": 1},
    "zero 2": {"zero_stage": 2},
    "zero 3": {"zero_stage": 3},
    "tensor 2": {"tensor": 2},
    "sequence 2": {"sequence": 2},
    "data 2, zero 3 over 2, sequence 2": {"data": 2, "fsdp": 2, "sequence": 2},
    "zero 3 over 2, tensor 2, sequence 2": {"fsdp": 2, "tensor": 2, "sequence": 2},
    "zero 2 over 4, tensor 2": {"zero_stage": 2, "fsdp": 4, "tensor": 2},
}
Train = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """train(stage, mesh, model): the metrics of ten steps of 8 rows; without a mesh, on one device."""
    folder = tmp_path_factory.mktemp("layout")
    tiny_model(folder / "model")
    (folder / "letters.py").write_text(LETTERS)
    rows = [
        {
            "prompt": f"What is {WORDS[i % 10]} {i}?",
            "completion": f"It is {WORDS[3 * i % 10]}.",
            "chosen": f"It is {WORDS[3 * i % 10]}.",
            "rejected": f"{WORDS[7 * i % 10]} " * (i % 4 + 1),
        }
        for i in range(48)
    ]
    write_rows(folder / "rows.jsonl", rows)
    make = meshes.make_mesh
    done: dict[str, list[dict[str, Any]]] = {}

    def train(kind: str, mesh: dict[str, Any] | None, **model: Any) -> list[dict[str, Any]]:
        name = json.dumps([kind, mesh, model])
        if name in done:
            return done[name]
        devices = jax.devices() if mesh else jax.devices()[:1]
        sizes = {axis: size for axis, size in (mesh or {}).items() if axis != "zero_stage"}
        groups = len(devices) // (sizes.get("tensor", 1) * sizes.get("sequence", 1))
        table: dict[str, Any] = {"dataset_path": str(folder / "rows.jsonl")}
        if kind == "dpo":
            table |= {"prompt_field": "prompt"}
        config = {
            "task_name": "layout",
            "base_output_dir": str(folder / "out" / str(len(done))),
            "use_tensorboard": False,
            "model": {"model_name_or_path": str(folder / "model"), **model},
            "datasets": {"rows": table},
            "mesh": mesh or {},
            "stages": [COMMON | STAGES[kind] | {"per_device_train_batch_size": 8 // groups}],
        }
        path = folder / f"{len(done)}.json"
        path.write_text(json.dumps(config))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "ntjax.prepare.make_mesh", lambda sizes, _=None, **rest: make(sizes, devices, **rest)
            )
            ran = run(load_config(path))
        lines = (ran / f"{STAGES[kind]['stage_type']}_stage" / "metrics.jsonl").read_text().splitlines()
        done[name] = [json.loads(line) for line in lines]
        return done[name]

    return train


def check(ours: list[dict[str, Any]], one: list[dict[str, Any]]) -> None:
    assert len(ours) == len(one) == 10
    for name in ("loss", "grad_norm"):
        wanted = [line[name] for line in one]
        assert [line[name] for line in ours] == pytest.approx(wanted, rel=1e-5, abs=1e-7), name


ALL = [(kind, mesh) for kind in STAGES for mesh in MESHES]
ALONE = {"zero 2", "tensor 2", "sequence 2"}  # which others have too
FEW = [("sft", mesh) for mesh in MESHES if mesh not in ALONE]
SLOW = [(kind, "zero 3 over 2, tensor 2, sequence 2") for kind in STAGES]
SLOW += [("sft", mesh) for mesh in ALONE]


@pytest.mark.parametrize("case", some(ALL, FEW, SLOW), ids=lambda case: " ".join(case))
def test_ten_steps_are_those_of_one_device(case: tuple[str, str], train: Train) -> None:
    kind, mesh = case
    check(train(kind, MESHES[mesh]), train(kind, None))


LORA = {"use_lora": True, "lora_config": {"target_modules": "all-linear", "r": 4}}
ADAPTED = {"lora": LORA, "4 bits": LORA | {"load_in_4bit": True}, "8 bits": LORA | {"load_in_8bit": True}}


@pytest.mark.parametrize("name", some(ADAPTED, ["4 bits"], ADAPTED))
def test_adapters_and_quantised_weights_lie_by_the_same_rules(name: str, train: Train) -> None:
    mesh = MESHES["zero 3 over 2, tensor 2, sequence 2"]
    check(train("sft", mesh, **ADAPTED[name]), train("sft", None, **ADAPTED[name]))


def test_time_that_does_not_divide_is_padded(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STAGES, "odd", {"stage_type": "sft", "packing": True, "max_length": 63})
    check(train("odd", {"sequence": 8}), train("odd", None))


def test_bf16_is_computed_on_parts_of_rows(train: Train) -> None:
    """XLA for CPUs ends the process over a sum of bf16 across devices."""
    ours, one = (
        [line["loss"] for line in train("sft", mesh, dtype="bfloat16")]
        for mesh in (MESHES["sequence 2"], None)
    )
    assert ours == pytest.approx(one, rel=2e-3)


def compiled(zero: int, remat: str = "full") -> tuple[Any, int]:
    """The SFT step of a small model on 8 devices, compiled, and the number of its weights."""
    hf = {"model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 1024}
    hf |= {"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8}
    hf |= {"tie_word_embeddings": True, "max_position_embeddings": 64}
    layout = Layout(meshes.make_mesh({"fsdp": 8}), zero)
    model = build(hf, remat=remat, layout=layout)
    params = {path: jax.ShapeDtypeStruct(spec.shape, "float32") for path, spec in model.specs.items()}
    places = layout.shardings(params, model.specs)
    params = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[path]) for path, x in params.items()
    }
    optimizer = optax.scale_by_adam()
    step = train_step(
        next_token_loss(model),
        optimizer,
        lambda step: 1e-3,
        1.0,
        shared=lambda gradients: layout.shared(gradients, model.specs),
    )
    opt_state = jax.eval_shape(optimizer.init, params)
    held = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        opt_state,
        layout.of_state(opt_state, model.specs),
    )
    one = jax.ShapeDtypeStruct((), "int32", sharding=meshes.replicated(layout.mesh))
    state = TrainState(one, params, held)
    rows = NamedSharding(layout.mesh, PartitionSpec(None, meshes.ROWS))
    batch = {
        name: jax.ShapeDtypeStruct((1, 8, 32), "int32", sharding=rows)
        for name in ("tokens", "positions", "segments", "mask")
    }
    out = jax.tree.map(lambda x: x.sharding, state)
    lowered = jax.jit(step, donate_argnums=0, out_shardings=(out, None)).lower(state, {}, batch)
    return lowered.compile(), sum(math.prod(spec.shape) for spec in model.specs.values())


def test_each_zero_stage_holds_what_deepspeed_s_does() -> None:
    """Bytes a weight and device, of 8: the state 4 + 8, of which ZeRO 1 divides 8 and ZeRO 3 all (arXiv:1910.02054)."""
    held = {}
    for zero in range(4):
        step, weights = compiled(zero)
        held[zero] = step.memory_analysis().argument_size_in_bytes / weights
    wanted = {0: 12.0, 1: 4 + 8 / 8, 2: 4 + 8 / 8, 3: 12 / 8}
    assert held == pytest.approx(wanted, rel=0.15)


def test_gradients_are_shared_out_from_zero_2_on() -> None:
    temporary = {zero: compiled(zero)[0].memory_analysis().temp_size_in_bytes for zero in (1, 2)}
    weights = compiled(1)[1]
    assert temporary[1] - temporary[2] > 0.8 * 4 * weights * 7 / 8


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_step_s_collectives_are_those_that_its_zero_stage_means(zero: int) -> None:
    """Weights are gathered and their gradients scattered, the rest are sums of vectors and numbers; no activation
    crosses devices."""
    text = compiled(zero)[0].as_text()
    kinds = Counter(
        re.findall(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(", text)
    )
    print(zero, kinds)
    assert not kinds["all-to-all"]
    assert not kinds["collective-permute"]
    matrices = 8  # q, k, v, o, gate, up, down and the embedding
    if zero == 0:
        assert set(kinds) == {"all-reduce"}
    if zero >= 2:
        assert kinds["reduce-scatter"] >= matrices
        reduced = re.findall(r"= (.*?) all-reduce\(", text)
        assert max(size(shape) for shape in reduced) <= 6 * 256 * 13  # norms alone
    if zero == 3:
        # Those of layers once forward and once backward, though the backward pass forms a layer again.
        assert kinds["all-gather"] == 2 * (matrices - 1) + 1


def size(shape: str) -> int:
    """Numbers in an HLO shape, a tuple's together."""
    return sum(
        math.prod(int(n) for n in dims.split(",") if n) for dims in re.findall(r"\w+\[([\d,]*)\]", shape)
    )
