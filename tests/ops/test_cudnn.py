"""How rows become cuDNN's documents, by hand; what is made of its answers, with a model of it in place of a GPU; that
XLA compiles the calls for GPUs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax.sharding import NamedSharding, PartitionSpec

from ntjax.mesh import ROWS, TENSOR, make_mesh
from ntjax.ops import cudnn as module
from ntjax.ops.attention import Tokens, plain
from ntjax.ops.cudnn import SLOTS, cudnn, documents, part

SEGMENTS = jnp.asarray([[1, 1, 1, 2, 2, 0, 0], [0, 0, 0, 0, 0, 0, 0], [0, 1, 2, 2, 2, 2, 2]])


def test_documents_of_rows() -> None:
    found = documents(SEGMENTS)
    assert found.start.tolist() == [[0, 3, *[0] * 6], [0] * 8, [1, 2, *[0] * 6]]
    assert found.length.tolist() == [[3, 2, *[0] * 6], [0] * 8, [1, 5, *[0] * 6]]
    assert found.number.tolist() == [[0, 0, 0, 1, 1, -1, -1], [-1] * 7, [-1, 0, 1, 1, 1, 1, 1]]


def test_documents_of_a_call() -> None:
    found = part(documents(SEGMENTS), jnp.asarray(0))
    assert found.lengths.tolist() == [[3, 2, -1, -1], [-1] * 4, [1, 5, -1, -1]]
    assert found.offsets.tolist() == [[0, 3, -1, -1, -1], [-1] * 5, [1, 2, -1, -1, -1]]
    assert found.own.tolist() == (SEGMENTS > 0).tolist()
    own = np.asarray(found.own)
    assert np.asarray(found.slot)[own].tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 3]
    assert np.asarray(found.place)[own].tolist() == [0, 1, 2, 0, 1, 0, 0, 1, 2, 3, 4]


def test_a_row_of_more_documents_than_slots_has_the_others_in_the_next_call() -> None:
    segments = jnp.asarray([[1, 2, 3, 3, 4, 5, 5, 5], [1, 1, 1, 1, 1, 1, 1, 0]])
    found = part(documents(segments), jnp.asarray(1))
    assert found.lengths.tolist() == [[3, -1, -1, -1], [-1] * 4]
    assert found.offsets.tolist() == [[5, -1, -1, -1, -1], [-1] * 5]
    assert found.own.tolist() == [[False] * 5 + [True] * 3, [False] * 8]
    assert module._calls(documents(segments)) == 2
    assert module._calls(documents(jnp.zeros((2, 8), jnp.int32))) == 0


def ragged(
    q: jax.Array, k: jax.Array, lengths: jax.Array, offsets: jax.Array, window: int | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What cuDNN makes of JAX's lengths and offsets: tokens of its N documents [N, T], as numbers of all tokens of the
    batch, and B * T after the end; the same of keys; which keys are seen [N, T, T]."""
    (batch, time, heads, head_dim), count = q.shape, lengths.size
    assert k.shape == q.shape
    length, _, start, start_of_keys = fused._fix_seqlen_offsets(lengths, lengths, offsets, offsets, q, k)
    step, length = jnp.arange(time), length.ravel()[:, None]

    def tokens(start: jax.Array) -> jax.Array:
        return jnp.where(
            step < length, start.ravel()[:count, None] // (heads * head_dim) + step, batch * time
        )

    ahead = step[:, None] - step
    seen = (ahead >= 0) & (ahead < (window or time)) & (step < length)[:, None]
    return tokens(start), tokens(start_of_keys), seen


def flat(x: jax.Array, tokens: jax.Array) -> jax.Array:
    """[N, T, H, h] fp32 of x [B, T, H, h]."""
    return x.reshape(-1, *x.shape[2:]).astype(jnp.float32).at[tokens].get(mode="fill", fill_value=0)


def laid(x: jax.Array, tokens: jax.Array, like: jax.Array) -> jax.Array:
    """`flat` undone: NaN, as memory may be found, where no document is."""
    memory = jnp.full((like.shape[0] * like.shape[1], *like.shape[2:]), jnp.nan, like.dtype)
    return memory.at[tokens].set(x.astype(like.dtype), mode="drop").reshape(like.shape)


def scores(q: jax.Array, k: jax.Array, seen: jax.Array) -> jax.Array:
    """[N, H, T, T] of q and k [N, T, H, h]."""
    products = jnp.einsum("NTHh,NSHh->NHTS", q, k) * q.shape[-1] ** -0.5
    return jnp.where(seen[:, None], products, -jnp.inf)


def call(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, offsets: jax.Array, window: int | None
) -> tuple[jax.Array, jax.Array]:
    tokens, keys, seen = ragged(q, k, lengths, offsets, window)
    found = scores(flat(q, tokens), flat(k, keys), seen)
    sums = jax.nn.logsumexp(found, axis=-1)
    probs = jnp.exp(found - jnp.where(jnp.isfinite(sums), sums, 0)[..., None])
    y = jnp.einsum("NHTS,NSHh->NTHh", probs, flat(v, keys))
    inside = tokens < q.shape[0] * q.shape[1]
    return laid(y, tokens, q), jnp.where(inside[:, None], sums, jnp.nan)


def call_back(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    offsets: jax.Array,
    window: int | None,
    stats: jax.Array,
    y: jax.Array,
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    tokens, keys, seen = ragged(q, k, lengths, offsets, window)
    queries, values, given = flat(q, tokens), flat(v, keys), flat(dy, tokens)
    probs = jnp.exp(scores(queries, flat(k, keys), seen) - stats[..., None])
    slopes = jnp.einsum("NTHh,NSHh->NHTS", given, values)
    slopes -= jnp.einsum("NTHh,NTHh->NHT", given, flat(y, tokens))[..., None]
    slopes *= probs * q.shape[-1] ** -0.5
    dq = jnp.einsum("NHTS,NSHh->NTHh", slopes, flat(k, keys))
    dk = jnp.einsum("NHTS,NTHh->NSHh", slopes, queries)
    dv = jnp.einsum("NHTS,NTHh->NSHh", probs, given)
    return laid(dq, tokens, q), laid(dk, keys, k), laid(dv, keys, v)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of cuDNN, a model of it, which takes fp32 too."""
    monkeypatch.setattr(module, "_check", lambda *_: None)
    monkeypatch.setattr(module, "_call", call)
    monkeypatch.setattr(module, "_call_back", call_back)


def place(segments: Any) -> Tokens:
    """Tokens of these segments, with positions from 0 in every document."""
    segments = np.asarray(segments, np.int32)
    positions = np.zeros_like(segments)
    for row, index in np.ndindex(segments.shape):
        if index and segments[row, index] == segments[row, index - 1]:
            positions[row, index] = positions[row, index - 1] + 1
    return Tokens(jnp.asarray(positions), jnp.asarray(segments))


def arrays(batch: int, time: int, dtype: str = "float32") -> list[jax.Array]:
    """q [batch, time, 4, 8], k and v [batch, time, 2, 8]."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((batch, time, heads, 8)), dtype) for heads in (4, 2, 2)]


def same(qkv: list[jax.Array], at: Tokens, window: int | None, run: Callable[..., jax.Array] = cudnn) -> None:
    """Asserts that values and gradients are the plain kernel's, and 0 in padding."""
    inside = (at.segments > 0)[..., None, None]

    def found(kernel: Callable[..., jax.Array]) -> list[jax.Array]:
        y, backward = jax.vjp(jax.jit(lambda q, k, v: kernel(q, k, v, at, at, window)), *qkv)
        given = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return [y, *backward(jnp.where(inside, given, 0))]

    for ours, theirs in zip(found(run), found(plain), strict=True):
        np.testing.assert_allclose(ours, jnp.where(inside, theirs, 0), atol=5e-6)


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    "segments",
    [
        [[1] * 11, [1] * 7 + [0] * 4],
        [[0] * 3 + [1] * 8, [0] * 11],
        [[1, 1, 1, 2, 2, 3, 3, 3, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 3, 4, 4, 4]],
        [[1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 0], [1, 1, 1, 1, 1, 1, 2, 2, 3, 4, 5]],
    ],
    ids=["one document", "padding first", "fewer than slots", "more than slots"],
)
def test_rows_of_documents(segments: list[list[int]], window: int | None) -> None:
    same(arrays(2, 11), place(segments), window)


@pytest.mark.usefixtures("model")
def test_a_batch_of_padding_has_no_gradient() -> None:
    same(arrays(2, 6), place(np.zeros((2, 6))), None)


@pytest.mark.usefixtures("model")
def test_devices_along_tensor_have_their_own_heads() -> None:
    mesh = make_mesh({"fsdp": 2, TENSOR: 2}, jax.devices()[:4])
    rows = PartitionSpec("fsdp")
    split = partial(jax.shard_map, mesh=mesh, out_specs=rows, axis_names={"fsdp"}, check_vma=False)

    def run(*arguments: Any) -> jax.Array:
        *inputs, window = arguments
        return split(lambda *inputs: cudnn(*inputs, window), in_specs=(rows,) * 5)(*inputs)

    at = place([[1, 1, 2, 2, 2, 0], [1, 2, 3, 4, 5, 5], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    heads = NamedSharding(mesh, PartitionSpec("fsdp", None, TENSOR))
    same([jax.device_put(x, heads) for x in arrays(4, 6)], at, None, run)


@pytest.mark.usefixtures("model")
def test_heads_that_devices_cannot_share_are_left_to_another_kernel() -> None:
    mesh, at = make_mesh({TENSOR: 4}, jax.devices()[:4]), place([[1, 1]])
    with (
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
        pytest.raises(NotImplementedError, match="heads"),
    ):
        cudnn(*arrays(1, 2), at, at, None)


def hopper(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), version: int = 91000
) -> None:
    """A machine with such a GPU and such a cuDNN, as far as JAX is asked."""

    def at_least(text: str) -> bool:
        return capability >= tuple(map(int, text.split(".")))

    monkeypatch.setattr(fused, "cuda_versions", object())
    monkeypatch.setattr(fused, "check_compute_capability", at_least)
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: version)


def refused(q: tuple[int, ...], k: tuple[int, ...], dtype: str, said: str) -> None:
    """Asserts that arrays of such shapes are, with what is said."""
    with pytest.raises(NotImplementedError, match=said):
        module._check(*(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in (q, k, k)))  # type: ignore[arg-type]


def test_what_cudnn_cannot_do_is_left_to_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper(monkeypatch)
    q, k = (2, 16, 4, 64), (2, 16, 2, 64)
    module._check(*(jnp.zeros(shape, jnp.bfloat16) for shape in (q, k, k)))
    refused(q, k, "float32", "float32")
    refused((2, 8, 4, 64), k, "bfloat16", "other tokens")
    refused((2, 16, 4, 60), (2, 16, 2, 60), "bfloat16", "head_dim")
    refused((2, 16, 4, 264), (2, 16, 2, 264), "bfloat16", "head_dim")
    refused((64, 2**17, 4, 64), (64, 2**17, 2, 64), "bfloat16", "int32")


def test_gpus_before_hopper_and_old_libraries_are_left_to_another_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k = (2, 16, 4, 64), (2, 16, 2, 64)
    monkeypatch.setattr(fused, "cuda_versions", None)
    refused(q, k, "bfloat16", "Hopper")
    hopper(monkeypatch, capability=(8, 9))
    refused(q, k, "bfloat16", "Hopper")
    hopper(monkeypatch, version=90500)
    refused(q, k, "bfloat16", "cuDNN")


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 4, TENSOR: 2}], ids=["fsdp", "tensor"])
def test_the_calls_are_compiled_for_gpus(sizes: dict[str, int]) -> None:
    """Two rows a device; a layer that keeps its attention calls each of cuDNN's functions once."""
    pytest.importorskip("jax_plugins.xla_cuda13")
    from ntjax.estimate.cuda import answering
    from ntjax.estimate.target import target

    mesh, time = make_mesh(sizes, target("h100:8").devices), 4096
    rows = PartitionSpec("fsdp")
    heads = TENSOR if TENSOR in sizes else None

    def shaped(shape: tuple[int, ...], dtype: Any, *axes: Any) -> jax.ShapeDtypeStruct:
        place = NamedSharding(mesh, PartitionSpec(ROWS, *axes))
        return jax.ShapeDtypeStruct((2 * sizes["fsdp"], time, *shape), dtype, sharding=place)

    q, k = (shaped((count, 128), jnp.bfloat16, None, heads) for count in (32, 8))

    def attended(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        at = Tokens(segments, segments)
        return cudnn(q, k, v, at, at, None)

    def total(*inputs: jax.Array) -> jax.Array:
        kept = jax.checkpoint(attended, policy=jax.checkpoint_policies.save_only_these_names("attention"))
        split = {"mesh": mesh, "in_specs": (rows,) * 4, "out_specs": rows, "axis_names": {"fsdp"}}
        y = jax.shard_map(kept, **split, check_vma=False)(*inputs)  # type: ignore[arg-type]
        return (y.astype(jnp.float32) ** 2).sum()

    with answering():
        lowered = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, k, k, shaped((), jnp.int32))
    compiled = lowered.compile()
    text, analysis = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert analysis is not None
    assert text.count('"__cudnn$fmhaSoftmax"') == text.count('"__cudnn$fmhaSoftmaxBackward"') == 1
    assert "all-gather" not in text
    here = 32 // sizes.get(TENSOR, 1)
    scores = 2 * 2 * here * time**2
    assert f"f32[{2 * SLOTS},{here},{time}]" in text
    assert f"{time},{time}" not in text
    assert analysis.temp_size_in_bytes < scores / 3
