"""The processes of a run: how they find each other, agree on what they do, and part.

Every process runs the same program on its own devices. What decides what is computed next (the run's folder, which
checkpoint, when to stop) is the first process's word or a value that all of them hold; files are written by the first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np

import ntjax
from ntjax import errors, watchdog
from ntjax.errors import ConfigError, PeerLost

T = TypeVar("T")
ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "NTJAX_NUM_PROCESSES", "NTJAX_PROCESS_ID"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Which of how many processes this is, and where the first one listens ("host:port")."""

    address: str
    count: int
    number: int


def named_place(address: str | None, count: int | None, number: int | None) -> Place | None:
    """The place that flags or, where they are missing, the environment name; None if nothing does.

    Raises ConfigError if they say a part of it.
    """
    address = address or os.environ.get(ADDRESS)
    count = _whole(COUNT) if count is None else count
    number = _whole(NUMBER) if number is None else number
    if count is None and number is None:
        return None  # JAX reads the address by itself, and finds the rest out
    if address is None or count is None or number is None or not 0 <= number < count:
        raise ConfigError(
            f"process {number} of {count}, the first one at {address}: this doesn't name a place",
            where="--coordinator, --num-processes, --process-id",
            fix=f"give all three (or {ADDRESS}, {COUNT}, {NUMBER}), numbers from 0",
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"{address!r} is not host:port", where="--coordinator", fix="write 10.0.0.1:8476")
    return Place(address, count, number)


def _whole(variable: str) -> int | None:
    value = os.environ.get(variable)
    if value is None or value.isdigit():
        return None if value is None else int(value)
    raise ConfigError(f"{variable}={value!r} is not a number", where="the environment")


def join(place: Place | None, limits: Mapping[str, float]) -> None:
    """Connects this process with the others of its run, at `place`, or as Cloud TPU, GKE, Slurm or Open MPI say.

    Alone, nothing happens. `limits` are seconds: `start` for all to come, `heartbeat`, and those of the watchdog.
    Raises PeerLost if somebody doesn't come, ConfigError if the port is taken.
    """
    if place:
        errors.process = place.number if place.count > 1 else None
        _roll_call(place, limits["start"])
    alone = jax.config.values["jax_cpu_collectives_implementation"]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            place.address if place else None,
            place.count if place else None,
            place.number if place else None,
            initialization_timeout=round(limits["start"]),
            heartbeat_timeout_seconds=round(limits["heartbeat"]),
            shutdown_timeout_seconds=round(limits["heartbeat"]),
        )
    except ValueError as error:  # what JAX says where it finds no cluster
        if place or "coordinator_address" not in str(error):
            raise
        jax.config.update("jax_cpu_collectives_implementation", alone)
        return
    if jax.process_count() > 1:
        errors.process = jax.process_index()
        watchdog.start(limits)
        log.debug("process %d of %d", jax.process_index(), jax.process_count())


def _roll_call(place: Place, patience: float) -> None:
    """Returns when all processes have come to the first one. JAX's own wait ends by an abort that names nobody."""
    if place.count == 1:
        return
    host, _, port = place.address.rpartition(":")
    deadline = time.monotonic() + patience
    if place.number == 0:
        _call(int(port), place.count, deadline, patience)
        return
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=1) as line:
                line.sendall(f"{place.number}\n".encode())
                line.settimeout(max(deadline - time.monotonic(), 1))
                answer = line.makefile().readline()
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise PeerLost(
                    f"process 0 is not at {place.address}: nobody answered in {patience:g} s ({error})",
                    fix="see that process 0 runs and that its port can be reached from here",
                ) from None
            time.sleep(0.2)
    if answer != "all\n":
        raise PeerLost(answer.strip() or "process 0 left before all had come", fix="start all processes")


def _call(port: int, count: int, deadline: float, patience: float) -> None:
    """The first process's part: it listens until everybody has said their number, then tells them."""
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        raise ConfigError(
            f"port {port} can't be listened on: {error}", where="--coordinator", fix="name a free port"
        ) from error
    came: dict[int, socket.socket] = {}
    with server:
        while len(came) < count - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                line, _ = server.accept()
                line.settimeout(5)
                number = line.makefile().readline().strip()
            except OSError:
                continue
            if number.isdigit():  # not somebody who tries ports
                came[int(number)] = line
        missing = [str(i) for i in range(1, count) if i not in came]
        said = f"process {', '.join(missing)} of {count} did not come in {patience:g} s" if missing else "all"
        for line in came.values():
            line.sendall(f"{said}\n".encode())
        for line in came.values():
            line.settimeout(1)
            try:
                line.recv(1)  # they hang up first: the port is free again at once
            except OSError:
                continue
            finally:
                line.close()
    if missing:
        raise PeerLost(said, fix="look at what these processes printed, and start all of them")


def part() -> None:
    """The end of a run that went well: all wait for each other."""
    watchdog.disarm()
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def first() -> bool:
    """Whether this process writes files and speaks to people."""
    return jax.process_index() == 0


def sync(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def of_first(value: Callable[[], T]) -> T:
    """What the first process finds, on all of them; `value` gives what JSON can say."""
    if jax.process_count() == 1:
        return value()
    return json.loads(_broadcast(json.dumps(value()) if first() else ""))


def same(what: str, text: str) -> None:
    """Raises ConfigError on every process unless `text` is the same on all; it names the first line that differs."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    told = _broadcast(text)
    agree = np.asarray(multihost_utils.process_allgather(np.array(told == text)))
    if agree.all():
        return
    others = ", ".join(str(i) for i in np.flatnonzero(~agree))
    theirs, ours = told.splitlines(), text.splitlines()
    found = [f"here {b!r}, there {a!r}" for a, b in zip(theirs, ours, strict=False) if a != b]
    if told != text and not found:
        found = [f"here {len(ours)} lines, there {len(theirs)}"]
    raise ConfigError(
        f"process {others} started with another {what} than process 0" + "".join(f": {x}" for x in found[:1]),
        fix="give every process the same files and the same command",
    )


def _broadcast(text: str) -> str:
    """The first process's text."""
    from jax.experimental import multihost_utils

    length = int(multihost_utils.broadcast_one_to_all(np.array(len(text.encode()))))
    held = np.zeros(length, np.uint8)
    if first():
        held[:] = np.frombuffer(text.encode(), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(held)).astype(np.uint8).tobytes().decode()


@cache
def program() -> str:
    """What runs: versions and a digest of ntjax's own files, a line each."""
    digest = hashlib.sha256()
    root = Path(ntjax.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    versions = {"ntjax": ntjax.__version__, "jax": jax.__version__, "python": sys.version.split()[0]}
    lines = [f"{name} {version}" for name, version in versions.items()]
    return "\n".join([*lines, f"ntjax's files {digest.hexdigest()[:12]}"])


def whole(array: jax.Array) -> np.ndarray:
    """All of an array that may be spread over processes; all of them must ask for it."""
    from jax.experimental import multihost_utils

    return np.asarray(
        multihost_utils.process_allgather(array, tiled=True) if jax.process_count() > 1 else array
    )


class Vote:
    """What signal any process was asked to stop by, known to all of them at the same step.

    With several processes that is one step later: the answer comes with the step's metrics, and nobody waits for it.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        from jax.sharding import NamedSharding, PartitionSpec

        self.cast = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self.size = mesh.size
        self.most = jax.jit(lambda votes: votes.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self.open: jax.Array | None = None

    def __call__(self, wish: int) -> int:
        """The greatest number of any process, `wish` alone, else of the call before; 0 is none."""
        if jax.process_count() == 1:
            return wish
        before = self.open
        everywhere = np.full(self.size, wish)
        votes = jax.make_array_from_callback((self.size,), self.cast, lambda index: everywhere[index])
        self.open = self.most(votes)
        found = 0 if before is None else int(before)
        if found and found not in set(signal.Signals):  # collectives of different steps have met
            raise PeerLost("the processes are not at the same step", fix="start again with --resume auto")
        return found
