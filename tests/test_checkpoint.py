"""A checkpoint gives back exactly what was saved, or says which one it can't give back."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ntjax.checkpoint import Checkpoints, read_meta, saved_steps
from ntjax.digest import digests
from ntjax.errors import CheckpointError
from ntjax.record import best_step, retained

# When one read of a damaged checkpoint fails, orbax closes its event loop under the reads still going on.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

NAN, INF = float("nan"), float("inf")


@struct.dataclass
class State:
    step: jax.Array
    params: dict[str, Any]
    opt_state: Any
    key: jax.Array


TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def new_state(seed: int = 0) -> State:
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "blocks.attn.q": jax.random.normal(keys[0], (4, 16, 8)),
        "blocks.norm": jnp.ones((4, 8), jnp.bfloat16),
        "embed": jax.random.normal(keys[1], (32, 8)),
    }
    return State(jnp.int32(0), params, TX.init(params), keys[2])


@jax.jit
def train(state: State) -> State:
    def loss(params: dict[str, Any]) -> jax.Array:
        return optax.tree.sum(
            jax.tree.map(lambda x: jnp.sum(jnp.square(x.astype(jnp.float32) - 0.5)), params)
        )

    key, noise = jax.random.split(state.key)
    grads = jax.grad(loss)(state.params)
    grads["embed"] += jax.random.normal(noise, grads["embed"].shape)
    updates, opt_state = TX.update(grads, state.opt_state, state.params)
    return State(state.step + 1, optax.apply_updates(state.params, updates), opt_state, key)


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def bits(tree: Any) -> list[bytes]:
    def plain(x: jax.Array) -> jax.Array:
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return [np.asarray(plain(x)).tobytes() for x in jax.tree.leaves(tree)]


def saved(folder: Path, states: dict[int, Any], **options: Any) -> Checkpoints:
    checkpoints = Checkpoints(folder, **options)
    for step, state in states.items():
        checkpoints.save(step, state, {"position": step * 10})
    checkpoints.close()
    return checkpoints


def data_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name == "d"]


def test_a_resumed_run_is_bit_identical_to_one_that_never_stopped(tmp_path: Path) -> None:
    state = train(train(new_state()))
    saved(tmp_path, {2: state})

    step, restored, meta = Checkpoints(tmp_path).restore(abstract(state))

    assert (step, meta) == (2, {"position": 20})
    assert str(jax.tree.structure(restored)) == str(jax.tree.structure(state))
    assert bits(train(train(restored))) == bits(train(train(state)))


def test_a_step_is_a_folder_named_as_users_know_it(tmp_path: Path) -> None:
    saved(tmp_path, {500: new_state(), 1000: new_state()})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1000", "checkpoint-500"]
    assert saved_steps(tmp_path) == [500, 1000]


def test_buffers_donated_right_after_save_are_saved_as_they_were(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=None)
    overwrite = jax.jit(lambda s: {"w": s["w"] + 1}, donate_argnums=0)
    state = {"w": jnp.arange(1 << 20)}
    for step in range(5):
        checkpoints.save(step, state, {})
        state = overwrite(state)
    checkpoints.close()
    for step in range(5):
        _, restored, _ = checkpoints.restore(abstract(state), step)
        assert np.array_equal(restored["w"], np.arange(1 << 20) + step)


def test_leaves_that_orbax_refuses_come_back(tmp_path: Path) -> None:
    state = {
        "codes": jnp.arange(16).astype(jnp.uint4),
        "int4": (jnp.arange(16) - 8).astype(jnp.int4),
        "float8": jnp.arange(4.0).astype(jnp.float8_e4m3fn),
        "mask": jnp.array([True, False]),
        "nothing": None,
        "empty": {},
        "no_rows": jnp.zeros((0, 3), jnp.bfloat16),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 2),
        "optax": optax.EmptyState(),
        "a": {"b.c": jnp.ones(2)},
        "a.b": {"c": jnp.zeros(2)},
    }
    _, restored, _ = saved(tmp_path, {1: state}).restore(abstract(state))
    assert str(jax.tree.structure(restored)) == str(jax.tree.structure(state))
    assert [x.dtype for x in jax.tree.leaves(restored)] == [x.dtype for x in jax.tree.leaves(state)]
    assert bits(restored) == bits(state)


@pytest.mark.parametrize("devices", [8, 4, 1])
def test_a_checkpoint_of_eight_devices_restores_on_fewer(tmp_path: Path, devices: int) -> None:
    if len(jax.devices()) < 8:
        pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=8")

    def placed(count: int) -> dict[str, NamedSharding]:
        mesh = jax.make_mesh((count,), ("fsdp",), (AxisType.Auto,), devices=jax.devices()[:count])
        specs = {"w": PartitionSpec(None, "fsdp"), "key": PartitionSpec(), "none": PartitionSpec("fsdp")}
        return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}

    values = {
        "w": jax.random.normal(jax.random.key(0), (16, 8)),
        "key": jax.random.key(3),
        "none": jnp.zeros((0, 8)),
    }
    checkpoints = saved(tmp_path, {1: jax.device_put(values, placed(8))})
    like = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed(devices)[name])
        for name, x in values.items()
    }
    _, restored, _ = checkpoints.restore(like)
    assert bits(restored) == bits(values)
    assert {name: x.sharding for name, x in restored.items() if name != "key"} == {
        name: sharding for name, sharding in placed(devices).items() if name != "key"
    }


# --- damage -----------------------------------------------------------------------------


def flip_bit(path: Path, rng: random.Random) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    path.write_bytes(damaged)


def test_every_flipped_bit_of_the_data_is_seen_and_the_older_checkpoint_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(0)
    states = {step: {"w": jax.random.normal(jax.random.key(step), (64, 65))} for step in (1, 2)}
    checkpoints = saved(tmp_path, states)
    path = max(data_files(tmp_path / "checkpoint-2"), key=lambda path: path.stat().st_size)
    intact = path.read_bytes()
    assert len(intact) < 1.1 * states[2]["w"].nbytes, "this file is the data and little else"
    restored = []
    for _ in range(40):
        flip_bit(path, rng)
        step, state, _ = checkpoints.restore(abstract(states[1]))
        assert bits(state) == bits(states[step])
        restored.append(step)
        path.write_bytes(intact)
    assert restored == [1] * 40
    assert "checkpoint-2 can't be used: w is not what was written" in caplog.text


def test_a_flipped_bit_anywhere_never_changes_what_is_restored(tmp_path: Path) -> None:
    rng = random.Random(1)
    states = {1: new_state(1), 2: new_state(2)}
    checkpoints = saved(tmp_path, states)
    files = [path for path in sorted((tmp_path / "checkpoint-2").rglob("*")) if path.is_file()]
    restored = set()
    for path in files:
        intact = path.read_bytes()
        for _ in range(2 if intact else 0):
            flip_bit(path, rng)
            step, state, meta = checkpoints.restore(abstract(states[1]))
            assert (bits(state), meta) == (bits(states[step]), {"position": step * 10}), path
            restored.add(step)
            path.write_bytes(intact)
    assert restored == {1, 2}, "some files are not needed to read the state"


@pytest.mark.parametrize("damage", ["truncate", "delete", "empty"])
def test_truncated_and_missing_files_make_it_use_the_older_checkpoint(tmp_path: Path, damage: str) -> None:
    states = {1: new_state(1), 2: new_state(2)}
    checkpoints = saved(tmp_path, states)
    state_folder = tmp_path / "checkpoint-2" / "state"
    largest = max(data_files(state_folder), key=lambda path: path.stat().st_size)
    for path in (largest, state_folder / "manifest.ocdbt", tmp_path / "checkpoint-2" / "record" / "metadata"):
        intact = path.read_bytes()
        if damage == "delete":
            path.unlink()
        else:
            path.write_bytes(b"" if damage == "empty" else intact[: len(intact) // 2])
        step, state, _ = checkpoints.restore(abstract(states[1]))
        assert (step, bits(state)) == (1, bits(states[1])), path
        path.write_bytes(intact)
    assert checkpoints.restore(abstract(states[1]))[0] == 2


def test_a_run_never_restarts_from_zero_over_damaged_checkpoints(tmp_path: Path) -> None:
    states = {1: new_state(1), 2: new_state(2)}
    checkpoints = saved(tmp_path, states)
    for step in states:
        shutil.rmtree(tmp_path / f"checkpoint-{step}" / "state")
    with pytest.raises(CheckpointError, match=r"checkpoint-1, checkpoint-2") as raised:
        checkpoints.restore(abstract(states[1]))
    assert raised.value.exit_code == 74
    assert saved_steps(tmp_path) == [1, 2]


def test_a_damaged_checkpoint_is_set_aside_when_training_goes_on(tmp_path: Path) -> None:
    states = {1: new_state(1), 2: new_state(2)}
    saved(tmp_path, states)
    (tmp_path / "checkpoint-2" / "record" / "metadata").unlink()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(abstract(states[1]))[0] == 1
    assert saved_steps(tmp_path) == [1, 2], "restoring changes nothing on disk"

    checkpoints.save(2, new_state(3), {})
    checkpoints.close()

    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2", "damaged-2"]
    assert bits(checkpoints.restore(abstract(states[1]))[1]) == bits(new_state(3))


def test_another_dtype_shape_or_tree_is_an_error_that_names_the_leaf(tmp_path: Path) -> None:
    here = jnp.zeros(1).sharding
    checkpoints = saved(tmp_path, {1: {"blocks.attn.q": jnp.ones((4, 2)), "embed": jnp.ones(3)}})

    def like(**leaves: tuple[tuple[int, ...], Any]) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            name.replace("__", "."): jax.ShapeDtypeStruct(shape, dtype, sharding=here)
            for name, (shape, dtype) in leaves.items()
        }

    cases = {
        "blocks.attn.q: the checkpoint has float32 [4, 2], this run has bfloat16 [4, 2]": like(
            blocks__attn__q=((4, 2), jnp.bfloat16), embed=((3,), jnp.float32)
        ),
        "embed: the checkpoint has float32 [3], this run has float32 [5]": like(
            blocks__attn__q=((4, 2), jnp.float32), embed=((5,), jnp.float32)
        ),
        "embed: the checkpoint has float32 [3], this run has no such leaf": like(
            blocks__attn__q=((4, 2), jnp.float32)
        ),
        "head: the checkpoint has no such leaf, this run has float32 [1]": like(
            blocks__attn__q=((4, 2), jnp.float32), embed=((3,), jnp.float32), head=((1,), jnp.float32)
        ),
    }
    for message, state in cases.items():
        with pytest.raises(CheckpointError) as raised:
            checkpoints.restore(state)
        assert raised.value.message == message


# --- kill -9 and a full disk ------------------------------------------------------------

VICTIM = """
    import sys, time
    from pathlib import Path
    import jax.numpy as jnp
    from ntjax.checkpoint import Checkpoints
    checkpoints = Checkpoints(Path(sys.argv[1]), keep=2)
    for step in range(1, 100):
        checkpoints.save(step, {"w": jnp.full((8 << 20,), step, jnp.int32)}, {"step": step})
        print(step, flush=True)
        time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize(("after_saves", "delay"), [(2, 0.0), (3, 0.01), (4, 0.04)])
def test_after_kill_9_the_last_complete_checkpoint_is_intact(
    tmp_path: Path, after_saves: int, delay: float
) -> None:
    command = [sys.executable, "-c", textwrap.dedent(VICTIM), str(tmp_path), str(delay)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout is not None
        for _ in range(after_saves):
            victim.stdout.readline()
        victim.send_signal(signal.SIGKILL)
    assert victim.returncode == -signal.SIGKILL

    checkpoints = Checkpoints(tmp_path, keep=2)
    like = {"w": jax.ShapeDtypeStruct((8 << 20,), jnp.int32, sharding=jnp.zeros(1).sharding)}
    step, state, meta = checkpoints.restore(like)
    assert step >= after_saves - 1, "every save but the one under way was complete"
    assert meta == {"step": step}
    assert np.all(np.asarray(state["w"]) == step)

    checkpoints.save(step + 1, state, {})
    checkpoints.close()
    assert not [path for path in tmp_path.iterdir() if "tmp" in path.name]


def test_a_full_disk_costs_a_checkpoint_and_the_third_in_a_row_ends_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    noise = np.random.default_rng(0).integers(0, 2**31, 1 << 18, dtype=np.int32)
    state = {"w": jnp.asarray(noise)}
    checkpoints = saved(tmp_path, {1: state}, keep=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        checkpoints.save(2, state, {})
        checkpoints.save(3, state, {})
        checkpoints.wait()
        assert checkpoints.steps() == [1]
        checkpoints.save(4, state, {})
        with pytest.raises(CheckpointError, match="3 saves in a row failed, the last at step 4") as raised:
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.exit_code == 74
    assert "checkpoint-2 could not be saved" in caplog.text
    assert Checkpoints(tmp_path).restore(abstract(state))[0] == 1


def test_a_save_that_succeeds_clears_the_count_of_failures(tmp_path: Path) -> None:
    state = {"w": jnp.asarray(np.random.default_rng(0).integers(0, 2**31, 1 << 18, dtype=np.int32))}
    checkpoints = Checkpoints(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in range(1, 9):
        full = step % 3 != 0
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16 if full else limits[0], limits[1]))
        checkpoints.save(step, state, {})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints.close()
    assert checkpoints.steps() == [3, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-6"]


# --- what is kept -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "mode", "metrics", "kept"),
    [
        (None, None, [None, None, None], {1, 2, 3}),
        (1, None, [None, None, None], {3}),
        (2, None, [3.0, 1.0, 2.0], {2, 3}),
        (1, "min", [3.0, 1.0, 2.0, 4.0], {2, 4}),  # the newest stays although it is the worst
        (1, "max", [3.0, 1.0, 2.0, 4.0], {4}),
        (1, "min", [3.0, 1.0, 2.0, NAN], {2, 4}),  # NaN is never best
        (2, "min", [3.0, 1.0, 2.0, NAN, 4.0, -INF, NAN], {2, 6, 7}),
        (1, "max", [INF, 1.0, 2.0, NAN], {3, 4}),
        (1, "min", [1.0, 1.0, 1.0], {1, 3}),  # the first of equals
        (1, "min", [NAN, None, NAN], {3}),
    ],
)
def test_what_is_kept(keep: int | None, mode: Any, metrics: list[float | None], kept: set[int]) -> None:
    assert retained(dict(enumerate(metrics, 1)), keep, mode) == kept


def test_the_latest_and_the_best_are_kept_on_disk_and_by_a_later_process(tmp_path: Path) -> None:
    state = {"w": jnp.ones(2)}
    for step, loss in enumerate([3.0, 1.0, 2.0, NAN, 4.0], 1):
        checkpoints = Checkpoints(tmp_path, keep=1, best="min")
        checkpoints.save(step, state, {}, metric=loss)
        checkpoints.close()
    assert checkpoints.steps() == [2, 5]
    assert (checkpoints.best(), checkpoints.latest()) == (2, 5)
    assert checkpoints.restore(abstract(state))[0] == 5, "training resumes from the newest"


def test_without_a_mode_nothing_is_best() -> None:
    assert best_step({1: 1.0}, None) is None


def test_other_files_of_the_stage_survive(tmp_path: Path) -> None:
    others = [
        "model.safetensors",
        "metrics.jsonl",
        "adapter/adapter_model.safetensors",
        "checkpoint-notes.txt",
    ]
    for name in others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "checkpoint-7.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "checkpoint-best").mkdir()

    saved(tmp_path, {1: new_state(), 2: new_state(), 3: new_state()}, keep=1).discard_after(3)

    assert [(tmp_path / name).read_text() for name in others] == others
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "adapter",
        "checkpoint-3",
        "checkpoint-best",
    ]


def test_resuming_from_an_older_checkpoint_discards_the_later_ones(tmp_path: Path) -> None:
    states = {step: new_state(step) for step in (1, 2, 3)}
    checkpoints = saved(tmp_path, states)
    assert checkpoints.restore(abstract(states[1]), step=1)[0] == 1
    checkpoints.discard_after(1)
    assert checkpoints.steps() == [1]
    checkpoints.save(2, new_state(9), {})
    checkpoints.close()
    assert bits(checkpoints.restore(abstract(states[1]))[1]) == bits(new_state(9))


def test_a_step_already_saved_is_left_as_it_is(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, {1: new_state(1)})
    checkpoints.save(1, new_state(2), {})
    checkpoints.close()
    assert bits(checkpoints.restore(abstract(new_state()))[1]) == bits(new_state(1))


def test_meta_is_read_without_jax(tmp_path: Path) -> None:
    meta = {"position": 3, "window": {"loss": [0.1, 2.0]}, "run": "sft"}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, {"w": jnp.ones(1)}, meta)
    checkpoints.close()
    assert read_meta(tmp_path, 5) == meta
    script = f"""
        import json, sys
        from pathlib import Path
        from ntjax.checkpoint import read_meta, saved_steps
        folder = Path({str(tmp_path)!r})
        heavy = sorted({{"jax", "orbax"}} & set(sys.modules))
        print(json.dumps([saved_steps(folder), read_meta(folder, 5), heavy]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [[5], meta, []]


def test_one_flipped_bit_changes_the_digest_of_any_dtype() -> None:
    rng = random.Random(0)
    for dtype in (np.float32, jnp.bfloat16, np.int8, np.uint32, np.bool_):
        clean = np.random.default_rng(0).integers(0, 2, (5, 7)).astype(dtype)
        for _ in range(5):
            flipped = clean.copy()
            bit = 1 << (0 if dtype is np.bool_ else rng.randrange(8))
            flipped.view(np.uint8).reshape(-1)[rng.randrange(flipped.nbytes)] ^= bit
            assert digests({"x": jnp.asarray(clean)}) != digests({"x": jnp.asarray(flipped)}), dtype


def test_a_digest_depends_on_the_place_of_the_values() -> None:
    x = jnp.arange(12.0).reshape(3, 4)
    assert digests({"x": x}) != digests({"x": x[::-1]})
