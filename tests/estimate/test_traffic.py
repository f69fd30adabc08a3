"""What a compiled program's text says: by hand on small texts, and of programs compiled here."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ntjax.estimate.hlo import arrays
from ntjax.estimate.traffic import Collective, Program
from ntjax.mesh import make_mesh

LOOP = """HloModule loop

%body (p: (s32[], f32[4,8], f32[3,4,8])) -> (s32[], f32[4,8], f32[3,4,8]) {
  %p = (s32[]{:T(128)}, f32[4,8]{1,0}, /*index=2*/f32[3,4,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %stack = f32[3,4,8]{2,1,0} get-tuple-element(%p), index=2
  %part = f32[4,8]{1,0} fusion(%x, %stack, %i), kind=kLoop, calls=%fused
  %all = f32[8,8]{1,0} all-gather(%part), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %t = (s32[], f32[4,8]{1,0}, f32[3,4,8]{2,1,0}) tuple(%i, %part, %stack)
}

%fused (a: f32[4,8], b: f32[3,4,8], c: s32[]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[3,4,8]{2,1,0} parameter(1)
  %c = s32[] parameter(2)
  %zero = s32[] constant(0)
  %slice = f32[1,4,8]{2,1,0} dynamic-slice(%b, %c, %zero, %zero), dynamic_slice_sizes={1,4,8}
  %flat = f32[4,8]{1,0} bitcast(%slice)
  ROOT %sum = f32[4,8]{1,0} add(%a, %flat)
}

%condition (q: (s32[], f32[4,8], f32[3,4,8])) -> pred[] {
  %q = (s32[], f32[4,8]{1,0}, f32[3,4,8]{2,1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%j, %three), direction=LT
}

ENTRY %main (x: f32[4,8], stack: f32[3,4,8]) -> f32[4,8] {
  %x.1 = f32[4,8]{1,0} parameter(0)
  %stack.1 = f32[3,4,8]{2,1,0} parameter(1)
  %start = s32[] constant(0)
  %init = (s32[], f32[4,8]{1,0}, f32[3,4,8]{2,1,0}) tuple(%start, %x.1, %stack.1)
  %loop = (s32[], f32[4,8]{1,0}, f32[3,4,8]{2,1,0}) while(%init), condition=%condition, body=%body
  ROOT %out = f32[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""
ROW = 4 * 8 * 4  # bytes of f32[4,8]


def test_a_loop_s_body_counts_as_often_as_it_goes_round() -> None:
    """The fusion reads x, a third of the stack and a counter, and writes a row; the gather reads one and writes two."""
    program = Program(LOOP)
    assert program.bytes == 3 * (3 * ROW + 4 + 3 * ROW)
    assert program.collectives == [Collective("all-gather", 2 * ROW, 3, (0, 1))]
    assert program.collectives[0].moved == 3 * ROW


def test_a_stack_that_is_tiled_anew_on_the_way_is_read_as_far_as_it_is_taken() -> None:
    again = """%again (d: f32[3,4,8]) -> f32[3,4,8] {
  %d = f32[3,4,8]{2,1,0} parameter(0)
  ROOT %copy = f32[3,4,8]{2,1,0:T(8,128)} copy(%d)
}

%fused (a:"""
    text = LOOP.replace("%fused (a:", again).replace(
        "%slice = f32[1,4,8]{2,1,0} dynamic-slice(%b,",
        "%tiled = f32[3,4,8]{2,1,0:T(8,128)} fusion(%b), kind=kLoop, calls=%again\n"
        "  %slice = f32[1,4,8]{2,1,0} dynamic-slice(%tiled,",
    )
    assert Program(text).bytes == Program(LOOP).bytes


def test_cycles_are_counted_as_often() -> None:
    text = LOOP.replace("calls=%fused", 'calls=%fused, backend_config={"estimated_cycles":"70"}')
    assert (Program(text).cycles, Program(LOOP).cycles) == (3 * 70, 0)


def test_a_loop_that_data_end_counts_once() -> None:
    text = LOOP.replace(
        "ROOT %less = pred[] compare(%j, %three), direction=LT",
        "%less = pred[] compare(%j, %three), direction=LT\n  ROOT %both = pred[] and(%less, %less)",
    )
    assert Program(text).collectives[0].times == 1


def test_memory_on_the_chip_is_free() -> None:
    sizes = list(arrays("(bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, f32[2]{0:T(128)}, pred[])"))
    assert sizes == [(64, True), (8, False), (1, False)]
    near = LOOP.replace("%part = f32[4,8]{1,0} fusion", "%part = f32[4,8]{1,0:S(1)} fusion")
    assert Program(LOOP).bytes - Program(near).bytes == 3 * 2 * ROW  # not written, and not read by the gather


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("{{0,4},{1,5}}", (0, 4)),
        ("[4,2]<=[8]", (0, 1)),
        ("[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("mesh['a'=4,'b'=2] {'a'}", (0, 2, 4, 6)),
        ("mesh['a'=4,'b'=2] {'b'}", (0, 1)),
        ("mesh['a'=8] {'a':(2)2}", (0, 2)),
        ("mesh['a'=8] {'a':(1)2}", (0, 4)),
    ],
)
def test_groups_are_read_in_every_form(groups: str, members: tuple[int, ...]) -> None:
    text = LOOP.replace("{{0,1},{2,3}}", groups)
    assert Program(text).collectives[0].members == members


def test_what_a_tpu_spreads_over_fusions_is_there_once() -> None:
    one = 'all-gather(%part), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}, chain_id="7"'
    gather = next(line for line in LOOP.splitlines() if "%all =" in line)
    chained = gather.split(" all-gather")[0] + " " + one
    text = LOOP.replace(gather, f"{chained}\n{chained.replace('%all', '%all.2')}")
    assert len(Program(text).collectives) == 1


def compiled(function: object, *arrays: jax.ShapeDtypeStruct) -> Program:
    return Program(jax.jit(function).lower(*arrays).compile().as_text())  # type: ignore[arg-type]


def test_a_scan_s_bytes_grow_with_its_length_and_not_with_the_stack_s_square() -> None:
    def run(stack: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    def bytes_of(length: int) -> float:
        shapes = jax.ShapeDtypeStruct((length, 64, 64), "float32"), jax.ShapeDtypeStruct((16, 64), "float32")
        return compiled(run, *shapes).bytes

    short, long = bytes_of(8), bytes_of(32)
    assert 3 < long / short < 5
    assert long > 32 * 64 * 64 * 4  # every weight is read


@pytest.mark.parametrize(("kind", "factor"), [("all-gather", 1), ("reduce-scatter", 1), ("all-reduce", 2)])
def test_collectives_that_were_compiled_are_found(kind: str, factor: int) -> None:
    mesh = make_mesh({"fsdp": 8})
    over = {
        "all-gather": lambda x: jax.lax.all_gather(x, "fsdp", tiled=True).sum(0, keepdims=True),
        "reduce-scatter": lambda x: jax.lax.psum_scatter(jnp.tile(x, (8, 1)), "fsdp", tiled=True),
        "all-reduce": lambda x: jax.lax.psum(x, "fsdp"),
    }[kind]
    spread = partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec("fsdp"), check_vma=False)
    place = NamedSharding(mesh, PartitionSpec("fsdp"))
    x = jax.ShapeDtypeStruct((8 * 16, 32), "float32", sharding=place)
    (found,) = compiled(spread(over, out_specs=PartitionSpec("fsdp")), x).collectives
    whole = 16 * 32 * 4 * (1 if kind == "all-reduce" else 8)
    assert (found.kind, found.group, found.bytes) == (kind, 8, whole)
    assert found.moved == factor * whole * 7 / 8
