"""The leaves of a state as orbax stores them, and how they are known to be what was written."""

from __future__ import annotations

import gc
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ntjax.errors import CheckpointError
from ntjax.record import DamageError, checkpoint_folder, new_record, read_record

if TYPE_CHECKING:
    import jax

T = TypeVar("T")


def describe(
    state: Any, meta: Mapping[str, Any], metric: float | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays to write, without the empty ones that orbax refuses, and the record of all leaves."""
    from ntjax.digest import digests

    leaves = _leaves(state)
    stored = {name: _stored(x) for name, x in leaves.items() if x.size}
    sums = digests(stored)
    described = {name: (str(x.dtype), x.shape, *sums.get(name, ())) for name, x in leaves.items()}
    return stored, new_record(meta, metric, described)


def load(folder: Path, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
    """State and meta; `DamageError` on every host if one of them can't read its part."""
    import jax
    import jax.numpy as jnp

    wanted = _leaves(abstract)

    def read() -> tuple[dict[str, Any], dict[str, jax.Array]]:
        record = read_record(folder, step)
        _check_leaves(wanted, record["leaves"], checkpoint_folder(folder, step))
        nonempty = {name: x for name, x in wanted.items() if math.prod(x.shape)}
        return record, _read_arrays(checkpoint_folder(folder, step) / "state", nonempty)

    record, stored = _agreed(read)
    _check_digests(stored, record)
    arrays = [
        _unstored(stored[name], x) if name in stored else jnp.zeros(x.shape, x.dtype, device=x.sharding)
        for name, x in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract), arrays), record["meta"]


def load_part(folder: Path, step: int, prefix: str) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """The leaves below `prefix` ("params/"), by what follows it, on one device, and meta.

    Raises `CheckpointError` where the checkpoint is damaged.
    """
    import jax

    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    path = checkpoint_folder(folder, step)
    try:
        record = read_record(folder, step)
        wanted = {
            name: jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=place)
            for name, (dtype, shape, *_) in record["leaves"].items()
            if name.startswith(prefix)
        }
        stored = _read_arrays(path / "state", wanted)
        _check_digests(stored, record)
    except DamageError as error:
        raise CheckpointError(str(error), where=str(path), fix="use another checkpoint") from error
    return {name.removeprefix(prefix): stored[name] for name in wanted}, record["meta"]


def _check_digests(stored: dict[str, jax.Array], record: Mapping[str, Any]) -> None:
    from ntjax.digest import digests

    for name, digest in digests(stored).items():
        if list(digest) != record["leaves"][name][2:]:
            raise DamageError(f"{name} is not what was written: its digest differs")


def first_line(error: Exception) -> str:
    """Type and first line of an error, for a message."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path."""
    import jax

    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}
    assert len(leaves) == len(flat), "two leaves of the state have the same path"
    return leaves


def _stored(x: jax.Array) -> jax.Array:
    """The array orbax writes for `x`: it has no uint4, and a digest needs the bits of a key."""
    import jax
    import jax.numpy as jnp

    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(x)
    return x.astype(jnp.uint8) if x.dtype == jnp.uint4 else x


def _unstored(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """The inverse of `_stored`."""
    import jax
    import jax.numpy as jnp

    if not jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return x.astype(like.dtype)
    impls: list[Any] = []  # only a key, not its dtype, can be asked for its implementation
    jax.eval_shape(lambda key: impls.append(jax.random.key_impl(key)), like)
    return jax.random.wrap_key_data(x, impl=impls[0])


def _check_leaves(wanted: Mapping[str, Any], saved: Mapping[str, list[Any]], where: Path) -> None:
    """Raises unless the checkpoint holds these leaves with these dtypes and shapes."""
    ours = {name: f"{x.dtype} {list(x.shape)}" for name, x in wanted.items()}
    theirs = {name: f"{dtype} {shape}" for name, (dtype, shape, *_) in saved.items()}
    for name in sorted(ours.keys() | theirs.keys()):
        has, needs = theirs.get(name, "no such leaf"), ours.get(name, "no such leaf")
        if has != needs:
            raise CheckpointError(
                f"{name}: the checkpoint has {has}, this run has {needs}",
                where=str(where),
                fix="resume with the config it was saved with (config.toml in the run folder)",
            )


def _read_arrays(path: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The stored arrays that `wanted` names, with its shardings.

    The handler is called without orbax's `Checkpointer`: its barriers would hold the hosts that didn't fail.
    """
    import jax
    import orbax.checkpoint as ocp
    from etils import epath

    stored = {name: jax.eval_shape(_stored, x) for name, x in wanted.items()}
    target = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=wanted[name].sharding)
        for name, x in stored.items()
    }
    with _orbax_quiet():
        try:
            args = ocp.args.PyTreeRestore(
                item=target,
                restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                partial_restore=True,
            )
            return ocp.PyTreeCheckpointHandler().restore(epath.Path(path), args=args)
        except Exception as error:  # whatever the storage layer makes of damaged bytes
            reason = first_line(error)
        gc.collect()
    raise DamageError(f"{path.name} can't be read ({reason})")


@contextmanager
def _orbax_quiet() -> Iterator[None]:
    """Keeps off stderr the tracebacks of the reads that orbax abandons when one of them fails."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    asyncio_log = logging.getLogger("asyncio")
    asyncio_log.disabled = True
    try:
        yield
    finally:
        sys.unraisablehook, asyncio_log.disabled = hook, False


def _agreed(read: Callable[[], T]) -> T:
    """`read()`, or `DamageError` on every host if it was damaged for any."""
    import numpy as np
    from jax.experimental import multihost_utils

    problem = None
    try:
        value = read()
    except DamageError as error:
        problem = error
    if np.any(multihost_utils.process_allgather(np.array(problem is not None))):
        raise problem or DamageError("another host can't read its part")
    return value
