"""The search: what it may change, and that it ends at what fits, however wrong the paper is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from ntjax.config import Config, load_config
from ntjax.errors import ConfigError
from ntjax.estimate.chips import CHIPS
from ntjax.estimate.flops import Flops
from ntjax.estimate.measure import TEMPORARIES, Estimate
from ntjax.estimate.paper import Sheet, row_flops
from ntjax.estimate.programs import Programs
from ntjax.estimate.search import Found, Search, meshes
from ntjax.estimate.target import Target
from ntjax.prepare import layout_of
from tests.cases import some

HF = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 4096, "hidden_size": 512}
HF |= {"intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
TEXT = """
[model]
model_name_or_path = "m"
dtype = "bfloat16"
attention = "blocked"
[datasets.rows]
dataset_path = "x.jsonl"
[mesh]
zero_stage = 3
[[stages]]
stage_type = "sft"
max_length = 512
per_device_train_batch_size = 4
gradient_accumulation_steps = 2
[[stages]]
stage_type = "dpo"
max_length = 512
per_device_train_batch_size = 2
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "run.toml").write_text(TEXT)
    return load_config(tmp_path / "run.toml")


def target(memory: float) -> Target:
    chip = replace(CHIPS["h100"], memory=memory, links=1e15)  # so that computing takes the time
    return Target("8 small ones", jax.devices(), chip)


def sheet(config: Config, number: int, where: Target) -> Sheet:
    stage = config.stages[number]
    programs = Programs(config, stage, HF, layout_of(config, where.devices))
    return Sheet.of(programs, where, row_flops(config, stage, HF, where.devices[0]))


def searched(config: Config, where: Target, off: float, calls: list[Any] | None = None) -> Found:
    """By a compiler that finds `off` times the temporaries that are on paper."""

    def compiled(config: Config, number: int) -> Estimate:
        stage, one = config.stages[number], sheet(config, number, where)
        shape = stage.per_device_train_batch_size, stage.gradient_accumulation_steps, stage.remat
        if calls is not None:
            calls.append(shape)
        memory = {"weights": one.held, TEMPORARIES: int(off * one.temporaries(*shape))}
        times = SimpleNamespace(total=one.seconds(*shape))
        return Estimate("train", 1, 1, memory, {}, where.memory, Flops(), 0.0, 1.0, times=times)  # type: ignore[arg-type]

    def layout(config: Config) -> Any:
        return layout_of(config, where.devices)

    return Search(config, [HF, HF], where, layout, compiled, lambda text: None)()


def rows(config: Config, number: int) -> int:
    stage = config.stages[number]
    groups = layout_of(config).rows
    return stage.per_device_train_batch_size * stage.gradient_accumulation_steps * groups


@pytest.mark.parametrize(
    "case", some([(1.4e9, 2.0), (9e8, 1.0), (6e8, 0.5), (8e9, 1.5)], [(9e8, 1.0)]), ids=str
)
def test_what_is_found_fits_and_learns_from_the_same_rows(case: tuple[float, float], config: Config) -> None:
    memory, off = case
    where = target(memory)
    found = searched(config, where, off)
    assert found.fits
    for number, stage in enumerate(found.config.stages):
        one = sheet(found.config, number, where)
        shape = stage.per_device_train_batch_size, stage.gradient_accumulation_steps, stage.remat
        assert one.held + off * one.temporaries(*shape) <= memory
        assert rows(found.config, number) == rows(config, number)


def test_with_much_memory_nothing_is_computed_twice(config: Config) -> None:
    found = searched(config, target(80e9), 1.0)
    assert [stage.remat for stage in found.config.stages] == ["none", "none"]


def test_too_little_memory_is_said(config: Config) -> None:
    assert not searched(config, target(1e6), 1.0).fits


def test_few_programs_are_compiled(config: Config) -> None:
    calls: list[Any] = []
    searched(config, target(9e8), 3.0, calls)
    assert len(calls) <= 9


def test_the_settings_can_be_pasted(config: Config, tmp_path: Path) -> None:
    found = searched(config, target(9e8), 1.0)
    head = TEXT.split("[mesh]")[0]
    parts = "\n".join(found.lines).split("[[stages]]")
    kinds = [f'\nstage_type = "{stage.stage_type}"\nmax_length = 512\n' for stage in config.stages]
    stages = "".join(f"[[stages]]{a}{b}" for a, b in zip(parts[1:], kinds, strict=True))
    (tmp_path / "again.toml").write_text(head + parts[0] + stages)
    again = load_config(tmp_path / "again.toml")
    assert again.mesh.sizes == {k: v for k, v in found.config.mesh.sizes.items() if v != 1} | (
        {"data": -1} if found.config.mesh.data == 1 else {}
    )
    for ours, theirs in zip(again.stages, found.config.stages, strict=True):
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "remat"):
            assert getattr(ours, name) == getattr(theirs, name)


def test_rows_that_no_mesh_splits_are_an_error(config: Config) -> None:
    odd = replace(config, mesh=replace(config.mesh, zero_stage=None, data=1, fsdp=1, tensor=8))
    stages = tuple(
        replace(s, per_device_train_batch_size=3, gradient_accumulation_steps=1) for s in odd.stages
    )
    with pytest.raises(ConfigError, match="splits the rows"):
        searched(replace(odd, stages=stages), target(1e9), 1.0)


def test_meshes_are_all_there_are_once(config: Config) -> None:
    found = [(m.data, m.fsdp, m.tensor, m.zero) for m in meshes(config.mesh, 8)]
    assert len(found) == len(set(found))
    assert all(a * b * c == 8 for a, b, c, _ in found)  # type: ignore[operator]
    assert (1, 8, 1, 3) in found
    assert (8, 1, 1, 0) in found
    assert (2, 2, 2, 1) in found


@pytest.mark.parametrize("remat", ["none", "minimal", ("attention",), "full"])
def test_less_that_is_kept_takes_less_memory_and_more_time(remat: Any, config: Config) -> None:
    one = sheet(config, 0, target(80e9))
    assert one.temporaries(4, 1, "full") <= one.temporaries(4, 1, remat) <= one.temporaries(4, 1, "none")
    assert one.seconds(4, 1, "none") <= one.seconds(4, 1, remat) <= one.seconds(4, 1, "full")
    assert one.seconds(4, 1, "none") < one.seconds(4, 1, "full")
