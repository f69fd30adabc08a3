"""The settings under which every stage fits and takes the least time: searched on paper, confirmed by compiling.

Searched are the mesh, which all stages share, and for each stage the rows of a microbatch and what is kept for the
backward pass. The rows of an optimizer step stay what the config says, so that the run learns the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ntjax.config import Config
from ntjax.config.schema import MeshConfig
from ntjax.errors import ConfigError
from ntjax.estimate.measure import TEMPORARIES, Estimate
from ntjax.estimate.paper import Counted, Remat, Sheet, row_flops
from ntjax.estimate.programs import Programs
from ntjax.estimate.target import Target
from ntjax.layout import Layout
from ntjax.stages.base import StageConfig

# From the least work to the least memory.
POLICIES: tuple[Remat, ...] = (
    "none",
    "minimal",
    ("query", "key", "value", "attention", "attention_out"),
    ("attention", "attention_out"),
    "full",
)
COMPILED = 4  # programs at most for a stage
TENSOR_MOST = 16  # devices along `tensor`
ROOM = 0.97  # of memory, that what is only on paper may take

Compile = Callable[[Config, int], Estimate]  # (config, stage) -> its step
LayoutOf = Callable[[Config], Layout]
Sheets = tuple[MeshConfig, list[Sheet]]  # a mesh, and every stage on it


class Option(NamedTuple):
    """How a stage runs on a mesh, with what it needs on paper."""

    seconds: float
    rows: int
    accumulation: int
    remat: Remat
    bytes: float

    def applied(self, stage: StageConfig) -> StageConfig:
        """The stage with these settings."""
        return replace(
            stage,
            per_device_train_batch_size=self.rows,
            gradient_accumulation_steps=self.accumulation,
            remat=self.remat,
        )


@dataclass(frozen=True)
class Found:
    """The config that fits, and what it means to paste it."""

    config: Config
    fits: bool
    lines: tuple[str, ...]


class Search:
    """`layout_of` gives a config's layout on the target; `compiled` compiles a stage's step."""

    def __init__(
        self,
        config: Config,
        hf: Sequence[dict[str, Any]],
        target: Target,
        layout_of: LayoutOf,
        compiled: Compile,
        told: Callable[[str], None],
    ):
        assert target.memory is not None
        self.config, self.hf, self.target = config, hf, target
        self.layout_of, self.compiled, self.told = layout_of, compiled, told
        groups = _groups(config, layout_of, len(target.devices))
        self.rows = [
            stage.per_device_train_batch_size * stage.gradient_accumulation_steps * groups
            for stage in config.stages
        ]
        self.counted: list[Counted] = [
            row_flops(config, stage, hf[number], target.devices[0])
            for number, stage in enumerate(config.stages)
        ]
        self.scale = [1.0] * len(
            config.stages
        )  # of a stage's temporaries on paper, to be what a compiler said
        self.seen: dict[tuple[Any, ...], Estimate] = {}

    def __call__(self) -> Found:
        """The best config that compiles and fits, or the nearest to fitting."""
        sheets = list(self._sheets())
        if not sheets:
            raise ConfigError(
                f"no mesh of {len(self.target.devices)} devices splits the rows of a step evenly",
                where=self.config.where("stages"),
                fix="let per_device_train_batch_size times gradient_accumulation_steps be divisible by more",
            )
        limit = COMPILED * len(self.config.stages)
        while True:
            mesh, stages, options = self._best(sheets)
            config = replace(
                self.config,
                mesh=mesh,
                stages=tuple(o.applied(s) for o, s in zip(options, self.config.stages, strict=True)),
            )
            fresh = [n for n in range(len(options)) if self._key(mesh, n, options[n]) not in self.seen]
            if not fresh or len(self.seen) >= limit:
                every = [self.seen.get(self._key(mesh, n, o)) for n, o in enumerate(options)]
                return Found(config, all(e is not None and e.fits for e in every), tuple(lines(config)))
            for number in fresh:
                option = options[number]
                self.told(f"{config.stages[number].stage_name}: trying {_said(mesh, option)}")
                estimate = self.compiled(config, number)
                self.seen[self._key(mesh, number, option)] = estimate
                sheet = stages[number]
                paper = sheet.temporaries(option.rows, option.accumulation, option.remat)
                self.scale[number] = max(estimate.memory[TEMPORARIES], 1) / paper

    def _key(self, mesh: MeshConfig, number: int, option: Option) -> tuple[Any, ...]:
        return (*mesh.sizes.items(), mesh.zero, number, option.rows, option.accumulation, option.remat)

    def _sheets(self) -> Iterator[Sheets]:
        """Every mesh that splits the model and the rows, with its stages on paper."""
        for mesh in meshes(self.config.mesh, len(self.target.devices)):
            config = replace(self.config, mesh=mesh)
            try:
                layout = self.layout_of(config)
                if any(rows % layout.rows for rows in self.rows):
                    continue
                stages = enumerate(self.config.stages)
                every = [Programs(config, stage, self.hf[n], layout) for n, stage in stages]
                yield mesh, [Sheet.of(p, self.target, self.counted[n]) for n, p in enumerate(every)]
            except ConfigError:  # an axis that doesn't divide
                continue

    def _best(self, sheets: Sequence[Sheets]) -> tuple[MeshConfig, list[Sheet], list[Option]]:
        """The mesh whose stages take the least time together, each by the best option that fits; where nothing fits, by
        what is least too large."""
        memory = self.target.memory
        assert memory is not None
        chosen = [
            (mesh, stages, [self._option(number, mesh, sheet) for number, sheet in enumerate(stages)])
            for mesh, stages in sheets
        ]

        def excess(options: Sequence[Option]) -> tuple[float, float]:
            over = sum(max(option.bytes - memory, 0.0) for option in options)
            return over, sum(option.seconds for option in options)

        return min(chosen, key=lambda each: excess(each[2]))

    def _option(self, number: int, mesh: MeshConfig, sheet: Sheet) -> Option:
        """The fastest that fits; of what was compiled, what the compiler said counts."""
        assert self.target.memory is not None
        share = self.rows[number] // sheet.programs.layout.rows
        fitting, least = [], None
        for rows in (n for n in range(1, share + 1) if share % n == 0):
            for remat in POLICIES:
                bytes_ = sheet.bytes(rows, share // rows, remat, self.scale[number])
                option = Option(sheet.seconds(rows, share // rows, remat), rows, share // rows, remat, bytes_)
                known = self.seen.get(self._key(mesh, number, option))
                if known is not None:
                    seconds = known.times.total if known.times and known.fits else option.seconds
                    option = option._replace(bytes=known.bytes, seconds=seconds)
                if known.fits if known is not None else bytes_ <= ROOM * self.target.memory:
                    fitting.append(option)
                if least is None or option.bytes < least.bytes:
                    least = option
        assert least is not None
        # Of two that take the same, the one that keeps less and takes fewer microbatches.
        return min(fitting, key=lambda o: (float(f"{o.seconds:.2e}"), o.accumulation, o.bytes), default=least)


def meshes(asked: MeshConfig, count: int) -> Iterator[MeshConfig]:
    """Meshes of `count` devices: all ways over `data`, `fsdp` and `tensor`, with ZeRO 1 or 3 along `fsdp` (2 sends what
    3 sends, and holds more); `sequence` and slices as the config has them."""
    sequence = max(asked.sequence or 1, 1)
    count //= sequence
    for tensor in (n for n in range(1, min(count, TENSOR_MOST) + 1) if count % n == 0):
        for fsdp in (n for n in range(1, count // tensor + 1) if count // tensor % n == 0):
            sizes = {"data": count // tensor // fsdp, "fsdp": fsdp, "tensor": tensor, "sequence": sequence}
            for zero in (1, 3) if fsdp > 1 else (0,):
                if zero == 3 or not getattr(asked, "offload_param", False):
                    yield replace(asked, **sizes, zero_stage=zero)  # type: ignore[arg-type]


def lines(config: Config) -> Iterator[str]:
    """The settings that were found, as the config has them."""
    mesh = config.mesh
    yield "[mesh]"
    yield from (f"{axis} = {size}" for axis, size in mesh.sizes.items() if size != 1)
    if mesh.fsdp and mesh.fsdp > 1:
        yield f"zero_stage = {mesh.zero}"
    for stage in config.stages:
        remat = stage.remat if isinstance(stage.remat, str) else list(stage.remat)
        yield ""
        yield f"[[stages]]    # {stage.stage_name}"
        yield f"per_device_train_batch_size = {stage.per_device_train_batch_size}"
        yield f"gradient_accumulation_steps = {stage.gradient_accumulation_steps}"
        yield f"remat = {remat!r}".replace("'", '"')


def _said(mesh: MeshConfig, option: Option) -> str:
    along = ", ".join(f"{axis} {size}" for axis, size in mesh.sizes.items() if size != 1) or "one device"
    remat = option.remat if isinstance(option.remat, str) else "+".join(option.remat)
    zero = f", ZeRO {mesh.zero}" if mesh.zero else ""
    return f"{along}{zero}; {option.rows} rows x {option.accumulation}, remat {remat}"


def _groups(config: Config, layout_of: LayoutOf, count: int) -> int:
    """Into how many parts the config's own mesh splits rows; all devices where it is no mesh of this target."""
    try:
        return layout_of(config).rows
    except ConfigError:
        return count // math.prod(max(size or 1, 1) for size in (config.mesh.tensor, config.mesh.sequence))
