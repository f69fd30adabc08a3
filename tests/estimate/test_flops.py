"""FLOPs through loops, branches and devices; a train step's against the formula that everyone uses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntjax.config import load_config
from ntjax.estimate.flops import Flops, flops
from ntjax.estimate.programs import Programs, untuned
from ntjax.layout import Layout
from ntjax.mesh import make_mesh

HF = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 128}
HF |= {"intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
TIME = 64


def test_scans_count_as_often_as_they_go_round_and_branches_by_the_longest() -> None:
    def run(stack: jax.Array, x: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, stack)
        return jax.lax.cond(x.sum() > 0, lambda x: x @ x.T, lambda x: (x @ x.T) @ (x @ x.T), x)

    shapes = jax.ShapeDtypeStruct((5, 8, 8), "float32"), jax.ShapeDtypeStruct((4, 8), "float32")
    found = flops(jax.make_jaxpr(run)(*shapes), devices=2)
    assert found == Flops(dense=(5 * 2 * 4 * 8 * 8 + 2 * (2 * 4 * 8 * 4) + 2 * 4 * 4 * 4) / 2)


def programs(tmp_path: Path, mesh: dict[str, int], **model: object) -> Programs:
    path = tmp_path / "run.toml"
    lines = "\n".join(f"{key} = {str(value).lower()}" for key, value in model.items())
    path.write_text(
        f'[model]\nmodel_name_or_path = "m"\n{lines}\n[datasets.sft]\ndataset_path = "x.jsonl"\n'
        f'[[stages]]\nstage_type = "sft"\nmax_length = {TIME}\nper_device_train_batch_size = 2\n'
    )
    config = load_config(path)
    return Programs(config, config.stages[0], HF, Layout(make_mesh(mesh), 3 if mesh.get("fsdp") else 0))


def counted(one: Programs, *, remat: bool = False) -> Flops:
    config, stage = untuned(one.config, one.stage, remat=remat)
    program = next(iter(replace(one, config=config, stage=stage)))
    return flops(program.function.trace(*program.arguments).jaxpr, one.layout.mesh.size)


@pytest.mark.parametrize(
    "mesh", [{"data": 8}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "sequence": 4}]
)
def test_a_step_takes_six_flops_a_weight_and_token(mesh: dict[str, int], tmp_path: Path) -> None:
    """6 N of the matrices in the layers and the head, and 12 L T D of attention, a token (arXiv:2204.02311, app. B)."""
    one = programs(tmp_path, mesh)
    specs = one.model.specs
    matrices = sum(np.prod(s.shape) for path, s in specs.items() if "blocks" in path and s.inputs) + 512 * 128
    tokens = 2 * TIME * one.layout.rows / one.layout.mesh.size
    found = counted(one)
    assert found.dense == pytest.approx(tokens * 6 * matrices, rel=1e-6)
    assert found.attention == pytest.approx(tokens * 12 * 3 * TIME * 128, rel=1e-6)


def test_remat_counts_the_forward_pass_again(tmp_path: Path) -> None:
    one = programs(tmp_path, {"data": 8}, gradient_checkpointing=True)
    plain, again = counted(one), counted(one, remat=True)
    assert again.attention == pytest.approx(4 / 3 * plain.attention)
    assert 1.15 * plain.dense < again.dense < 4 / 3 * plain.dense


def test_frozen_weights_take_no_gradient(tmp_path: Path) -> None:
    full = counted(programs(tmp_path, {"data": 8}))
    lora = counted(programs(tmp_path, {"data": 8}, use_lora=True))
    assert 0.6 < lora.dense / full.dense < 0.75


def test_attention_is_known_wherever_it_is_traced() -> None:
    def attend(x: jax.Array) -> jax.Array:
        with jax.named_scope("attention"):
            return jnp.tanh(x @ x.T) @ x

    found = flops(jax.make_jaxpr(jax.grad(lambda x: attend(x @ x.T).sum()))(jnp.ones((4, 4))), 1)
    assert found.attention == 6 * 2 * 4**3
    assert found.dense == 3 * 2 * 4**3
