"""A program compiled for the devices of a plan, and what that tells of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from ntjax.estimate.flops import Flops, flops
from ntjax.estimate.programs import TRAIN, Program, Programs, untuned
from ntjax.estimate.roofline import SKIPPED, Times, times
from ntjax.estimate.target import Target, answering
from ntjax.estimate.traffic import Collective
from ntjax.estimate.traffic import Program as Text
from ntjax.stages.rollout import RolloutConfig

TEMPORARIES = "gradients, temporaries"
OUT_OF_MEMORY = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Estimate:
    """Of one program and one device. `memory` is by kind, `beside` what lies there without being the program's.

    `fits` is None where the device's memory isn't known. `work` is what the program computes, `useful` what it would
    have to, each activation once and nothing that is masked. `times` is None for devices that `chips` doesn't know.
    `reckoned` are XLA's own seconds for a TPU, hand-written kernels and collectives left out.
    """

    program: str
    calls: float
    tokens: int
    memory: dict[str, int]
    beside: dict[str, int]
    capacity: float | None
    work: Flops
    useful: float
    moved: float
    collectives: list[Collective] = field(default_factory=list)
    kernels: dict[str, int] = field(default_factory=dict)
    times: Times | None = None
    reckoned: float | None = None
    utilisation: float | None = None  # of the peak, by useful FLOPs

    @property
    def bytes(self) -> int:
        """Of memory while the program runs."""
        return sum(self.memory.values()) + sum(self.beside.values())

    @property
    def fits(self) -> bool | None:
        return None if self.capacity is None else self.bytes <= self.capacity

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a call."""
        return sum(one.moved for one in self.collectives)


def estimate(programs: Programs, program: Program, target: Target) -> Estimate:
    """Compiles the program. One that the compiler finds too large has what it says, and no more is known of it."""
    layout, chip = programs.layout, target.chip
    work, useful = _work(programs, program.name)
    capacity = target.memory
    told: dict[str, Any] = {
        "program": program.name,
        "calls": program.calls,
        "tokens": program.tokens,
        "beside": program.beside,
        "capacity": capacity,
        "work": work,
        "useful": useful,
    }
    try:
        with answering():
            compiled = program.function.trace(*program.arguments).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        wanted = OUT_OF_MEMORY.search(str(error))
        if wanted is None:
            raise
        total = int(float(wanted[1]) * UNITS[wanted[2]])
        return Estimate(**told, memory=_by_kind(program, total), moved=0.0)
    text = Text(compiled.as_text())
    memory = _by_kind(program, _total(compiled.memory_analysis(), target))
    if "cudnn" in text.kernels and program.name == TRAIN:
        memory["cuDNN's workspace"] = _workspace(programs)
    found = Estimate(
        **told,
        memory=memory,
        moved=text.bytes,
        collectives=text.collectives,
        kernels=text.kernels,
    )
    if chip is None:
        return found
    skips = programs.model.config.attention in ("splash", "cudnn")
    dtype = programs.config.compute_dtype(programs.stage)
    spent = times(work, found.moved, found.collectives, chip, layout.mesh, dtype, skips)
    peak = chip.fp32 if dtype == "float32" else chip.flops
    reckoned = text.cycles / chip.clock if text.cycles else None
    return replace(found, times=spent, reckoned=reckoned, utilisation=useful / (spent.total * peak))


def _work(programs: Programs, name: str) -> tuple[Flops, float]:
    """FLOPs of a device that the named program computes, and the useful ones."""

    def counted(remat: bool) -> Flops:
        config, stage = untuned(programs.config, programs.stage, remat=remat)
        plain = replace(programs, config=config, stage=stage)
        program = next(program for program in plain if program.name == name)
        return flops(program.function.trace(*program.arguments).jaxpr, programs.layout.mesh.size)

    needed = counted(remat=False)
    work = needed if programs.stage.remat == "none" or name != TRAIN else counted(remat=True)
    masked = name not in ("decode",)
    return work, needed.dense + needed.attention * (SKIPPED if masked else 1.0)


def _by_kind(program: Program, total: int) -> dict[str, int]:
    return {**program.held, TEMPORARIES: max(total - sum(program.held.values()), 0)}


def _total(memory: Any, target: Target) -> int:
    """Bytes of a device's memory: what libtpu holds against its limit; elsewhere all buffers together."""
    if target.platform == "tpu":
        # libtpu counts arguments and results in the host's memory too.
        far = memory.host_argument_size_in_bytes + memory.host_output_size_in_bytes
        return memory.peak_memory_in_bytes - far + memory.host_alias_size_in_bytes
    buffers = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return buffers + memory.temp_size_in_bytes


def _workspace(programs: Programs) -> int:
    """Bytes in which cuDNN sums the gradient of queries, in fp32, which a compiler without a GPU doesn't know of."""
    from ntjax.ops.cudnn import SLOTS

    stage, config, mesh = programs.stage, programs.model.config, programs.layout.mesh
    rows = stage.per_device_train_batch_size
    if isinstance(stage, RolloutConfig):
        rows = stage.geometry(programs.layout.rows).rows // programs.layout.rows
    rows *= 2 if stage.stage_type in ("dpo", "reward") else 1
    return 4 * SLOTS * rows * stage.row_length * config.heads * config.head_dim // mesh.shape["tensor"]
