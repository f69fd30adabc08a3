"""What a token costs on devices that aren't here: every weight read once, as it is multiplied."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from ntjax.config import load_config
from ntjax.estimate.measure import Estimate, estimate
from ntjax.estimate.programs import Programs
from ntjax.estimate.target import target
from ntjax.hf.files import read_config
from ntjax.narrow import traced_for
from ntjax.prepare import layout_of

ROOT = Path(__file__).parents[2]
TPU = pytest.mark.skipif(not find_spec("libtpu"), reason="libtpu isn't installed")
GPU = pytest.mark.skipif(not find_spec("jax_cuda13_plugin"), reason="JAX's CUDA plugin isn't installed")
QLORA = ("model.use_lora=true", "model.load_in_4bit=true")


def decoding(topology: str, hf: dict[str, Any], *settings: str) -> Estimate:
    """A token of GRPO."""
    config = load_config(ROOT / "configs/plan/llama3_8b_grpo.toml", settings)
    where = target(topology)
    programs = Programs(config, config.stages[0], hf, layout_of(config, where.devices), where.memory)
    with traced_for(where.platform):
        (decode,) = (program for program in programs if program.name == "decode")
        return estimate(programs, decode, where)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), QLORA], ids=["all weights", "4 bits"])
@pytest.mark.parametrize(
    "topology",
    [
        pytest.param("v5p:1x1x1", marks=TPU),
        pytest.param("v5p:2x2x1", marks=TPU),
        pytest.param("h100:1", marks=GPU),
        pytest.param("h100:8", marks=GPU),
    ],
)
@pytest.mark.parametrize("kv_heads", [8, 32], ids=["grouped", "a key each"])
def test_a_token_reads_weights_and_cache_once(
    kv_heads: int, topology: str, settings: tuple[str, ...]
) -> None:
    """In bf16, whatever they are held in: nothing is copied out of a stack, cast or dequantised at every token."""
    hf = {**read_config(ROOT / "configs/plan/llama-3.1-8b"), "num_hidden_layers": 4, "vocab_size": 32000}
    hf["num_key_value_heads"] = kv_heads
    token = decoding(topology, hf, *settings)
    embed, mlp = hf["hidden_size"], hf["intermediate_size"]
    layer = (2 + 2 * kv_heads / 32) * embed * embed + 3 * embed * mlp
    matrices = 4 * layer + embed * hf["vocab_size"]
    cache = token.memory["cache"]
    assert token.moved < 1.08 * (2 * matrices + cache)
