"""Who sees whom, by hand; what they make of it, against torch; kernels, against the plain one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ntjax.errors import ConfigError
from ntjax.ops import blocked as module
from ntjax.ops.attention import KERNELS, Tokens, attention, chosen, visible
from ntjax.ops.blocked import blocked

PACKED = Tokens(jnp.asarray([[0, 1, 2, 0, 1, 0]]), jnp.asarray([[1, 1, 1, 2, 2, 0]]))


def test_a_token_sees_its_own_document_up_to_itself() -> None:
    assert visible(PACKED, PACKED, None)[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_a_window_counts_the_token_itself() -> None:
    assert visible(PACKED, PACKED, 2)[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_slots_of_a_cache_that_are_not_written_are_not_seen() -> None:
    # One slot of padding, three of tokens, two of nothing.
    keys = Tokens(jnp.asarray([[0, 0, 1, 2, 0, 0]]), jnp.asarray([[0, 1, 1, 1, 0, 0]]))
    query = Tokens(jnp.asarray([[2]]), jnp.asarray([[1]]))
    assert visible(query, keys, None)[0].astype(int).tolist() == [[0, 1, 1, 1, 0, 0]]


def test_a_token_sees_the_segment_it_goes_on_from() -> None:
    # Two tokens, and two documents that go on from them; then a document by itself, and padding.
    row = [[0, 1, 2, 3, 2, 0, 0]], [[1, 1, 2, 2, 3, 5, 0]], [[1, 1, 1, 1, 1, 5, 0]]
    place = Tokens(*map(jnp.asarray, row))
    assert visible(place, place, None)[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    assert visible(place, place, 2)[0, 3:5].astype(int).tolist() == [
        [0, 0, 1, 1, 0, 0, 0],
        [0, 1, 0, 0, 1, 0, 0],
    ]


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_kernels_that_know_no_prefixes_leave_them_to_others(kernel: str) -> None:
    at = jnp.arange(256)[None]
    place = Tokens(at, jnp.ones((1, 256), int), jnp.ones((1, 256), int))
    q, k, v = (jnp.ones((1, 256, 1, 128), jnp.bfloat16),) * 3
    with pytest.raises(NotImplementedError, match="a token sees its own"):
        KERNELS[kernel](q, k, v, place, place, None)


def tokens(count: int, rng: np.random.Generator) -> Tokens:
    """Two rows of `count`: documents of random lengths from some point of their own on, then padding."""
    positions, segments = np.zeros((2, 2, count), np.int32)
    for row in range(2):
        start, segment = 0, 1
        while start < count - 2:
            end = min(start + int(rng.integers(2, count // 2 + 3)), count - 1)
            positions[row, start:end] = rng.integers(0, 9) + np.arange(end - start)
            segments[row, start:end] = segment
            start, segment = end, segment + 1
    return Tokens(jnp.asarray(positions), jnp.asarray(segments))


def arrays(time: int, slots: int, dtype: str = "float32") -> list[jax.Array]:
    """q [2, time, 4, 8], k and v [2, slots, 2, 8]."""
    rng = np.random.default_rng(0)
    shapes = [(2, time, 4, 8), (2, slots, 2, 8), (2, slots, 2, 8)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def in_torch(qkv: list[jax.Array], seen: jax.Array) -> tuple[list[torch.Tensor], torch.Tensor]:
    """torch's leaves and its attention of them, [B, T, H, h]."""
    leaves = [torch.tensor(np.asarray(x), requires_grad=True) for x in qkv]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    mask = torch.tensor(np.asarray(seen))[:, None]
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return leaves, y.transpose(1, 2)


@pytest.mark.parametrize("kernel", ["xla", "blocked"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("prefixed", [False, True])
def test_attention_and_its_gradient_are_torchs(
    kernel: str, window: int | None, prefixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", 4)
    place = tokens(11, np.random.default_rng(1))
    if prefixed:
        place = place._replace(prefixes=jnp.minimum(place.segments, 1))
    qkv, seen = arrays(11, 11), visible(place, place, window)
    leaves, reference = in_torch(qkv, seen)
    y, backward = jax.vjp(jax.jit(lambda q, k, v: attention(q, k, v, place, place, window, kernel)), *qkv)
    np.testing.assert_allclose(y, reference.detach().numpy(), atol=1e-6)
    cotangent = np.random.default_rng(1).standard_normal(y.shape).astype(np.float32)
    reference.backward(torch.tensor(cotangent))
    for ours, leaf in zip(backward(jnp.asarray(cotangent)), leaves, strict=True):
        assert leaf.grad is not None
        np.testing.assert_allclose(ours, leaf.grad.numpy(), atol=5e-6)


def test_bf16_scores_are_summed_and_normalised_in_fp32() -> None:
    # 300 keys with the same score: in bf16 their sum would stick at 256 ones, and 1/257 isn't there either.
    q, k = jnp.zeros((1, 1, 1, 8), jnp.bfloat16), jnp.zeros((1, 300, 1, 8), jnp.bfloat16)
    v = jnp.ones((1, 300, 1, 8), jnp.bfloat16)
    query, keys = (Tokens(jnp.zeros((1, n), int), jnp.ones((1, n), int)) for n in (1, 300))
    y = attention(q, k, v, query, keys)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), 1.0, rtol=2**-8)
    scores = jax.make_jaxpr(attention)(q, k, v, query, keys).eqns
    products = [e for e in scores if e.primitive.name == "dot_general"]
    assert products[0].outvars[0].aval.dtype == jnp.float32


@pytest.mark.parametrize("kernel", ["xla", "blocked"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_query_that_sees_nothing_is_finite(
    dtype: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", 2)
    queries, keys = (Tokens(jnp.zeros((2, n), int), jnp.full((2, n), n)) for n in (5, 7))
    assert not visible(queries, keys, None).any()
    y, backward = jax.vjp(
        jax.jit(lambda q, k, v: attention(q, k, v, queries, keys, None, kernel)), *arrays(5, 7, dtype)
    )
    assert all(bool(jnp.isfinite(x.astype(jnp.float32)).all()) for x in (y, *backward(y)))


def same(qkv: list[jax.Array], queries: Tokens, keys: Tokens, window: int | None = None) -> None:
    """Asserts that values and gradients of the blocked kernel are the plain one's."""

    def kernel(name: str) -> tuple[jax.Array, list[jax.Array]]:
        y, backward = jax.vjp(lambda q, k, v: attention(q, k, v, queries, keys, window, name), *qkv)
        return y, backward(jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

    for ours, theirs in zip(jax.tree.leaves(kernel("blocked")), jax.tree.leaves(kernel("xla")), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("block", [1, 4, 5, 16])
def test_blocks_of_packed_rows(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    place = tokens(17, np.random.default_rng(2))
    same(arrays(17, 17), place, place)
    same(arrays(17, 17), place, place, window=4)


def test_blocks_of_rows_padded_on_the_left_that_go_on_in_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 4)
    # Row 0 has two slots of padding and six of a prompt, row 1 eight; both now add six tokens; two are left.
    slot = np.arange(16)
    positions = np.stack([np.maximum(slot - 2, 0), slot])
    segments = np.stack([(slot >= 2) & (slot < 14), slot < 14]).astype(np.int32)
    keys = Tokens(jnp.asarray(np.where(slot < 14, positions, 0)), jnp.asarray(segments))
    queries = Tokens(keys.positions[:, 8:14], keys.segments[:, 8:14])
    same(arrays(6, 16), queries, keys)
    same(arrays(6, 16), queries, keys, window=3)


def test_a_prompt_of_one_block_and_a_single_query_are_left_to_the_plain_kernel() -> None:
    place = Tokens(jnp.zeros((2, 1), int), jnp.ones((2, 1), int))
    q, k, v = arrays(1, 1)
    with pytest.raises(NotImplementedError):
        blocked(q, k, v, place, place, None)
    same([q, k, v], place, place)


def scratch(time: int, kernel: str) -> int:
    """Bytes that the compiled gradient needs beside its arguments and results, for 4 heads."""
    q, k, v = (jax.ShapeDtypeStruct((1, time, heads, 16), jnp.float32) for heads in (4, 2, 2))
    place = Tokens(jnp.arange(time)[None], jnp.ones((1, time), int))

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, place, place, None, kernel).sum()

    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    analysis = gradient.lower(q, k, v).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def test_blocks_need_no_memory_for_whole_scores() -> None:
    scores = 4 * 4 * 2048**2
    assert scratch(2048, "xla") > 3 * scores
    assert scratch(2048, "blocked") < 0.6 * scores


def test_memory_of_blocks_grows_with_time_alone() -> None:
    assert scratch(4096, "blocked") < 2.1 * scratch(2048, "blocked")


@pytest.mark.parametrize(
    ("platform", "auto"),
    [("cpu", "blocked"), ("tpu", "splash"), ("gpu", "cudnn"), ("cuda", "cudnn")],
)
def test_a_platform_has_a_kernel_of_its_own(platform: str, auto: str) -> None:
    assert chosen("auto", platform) == auto
    assert [chosen(name, platform) for name in ("xla", "blocked", auto)] == ["xla", "blocked", auto]


@pytest.mark.parametrize(("name", "platform"), [("splash", "cpu"), ("splash", "gpu"), ("cudnn", "tpu")])
def test_another_platforms_kernel_is_refused(name: str, platform: str) -> None:
    with pytest.raises(ConfigError, match=f'run.toml:3: attention = "{name}": the devices are {platform}'):
        chosen(name, platform, "run.toml:3")
