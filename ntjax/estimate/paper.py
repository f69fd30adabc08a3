"""What a step will need, on paper: the same quantities as a compiled program tells, in milliseconds instead of minutes.

What is held is exact, from shapes. Temporaries follow from the sizes of a layer's activations; `scale` corrects them by
what one compiled program of the stage was found to need. Axes as in `models.decoder`; t tokens of a microbatch on a
device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax

from ntjax.config import Config
from ntjax.estimate.flops import Flops, flops
from ntjax.estimate.programs import Program, Programs, untuned
from ntjax.estimate.roofline import REACHED, SKIPPED
from ntjax.estimate.target import Target
from ntjax.layout import Layout
from ntjax.mesh import DATA, FSDP, SEQUENCE, TENSOR, make_mesh
from ntjax.models import DecoderConfig
from ntjax.ops.blocked import block
from ntjax.ops.logprobs import chunk
from ntjax.stages.base import StageConfig

Remat = str | tuple[str, ...]
Counted = Callable[[Remat], Flops]


@dataclass(frozen=True)
class Sheet:
    """A stage on one mesh: what it holds, and what its step needs beside for a number of rows and a policy of remat."""

    programs: Programs
    target: Target
    row_flops: Counted
    held: int  # by the step, and by what lies beside it
    most: int  # by any program of the stage, with its cache
    weights: float  # of the model
    trained: int  # bytes of a device's gradients
    decoding: float  # bytes of memory read in a step to write completions

    @classmethod
    def of(cls, programs: Programs, target: Target, row_flops: Counted) -> Sheet:
        """Nothing is compiled. Raises ConfigError where the mesh doesn't split the model evenly."""
        every = list(programs)
        sizes = [sum(one.held.values()) + sum(one.beside.values()) for one in every]
        decode = [one.calls * sum(one.held.values()) for one in every if one.name == "decode"]
        specs, layout = programs.model.specs, programs.layout
        count = float(sum(math.prod(spec.shape) for spec in specs.values()))
        return cls(
            programs,
            target,
            row_flops,
            sizes[0],
            max(sizes),
            count,
            _gradients(every[0], layout),
            sum(decode),
        )

    @property
    def stage(self) -> StageConfig:
        return self.programs.stage

    @property
    def model(self) -> DecoderConfig:
        return self.programs.model.config

    def along(self, axis: str) -> int:
        """Devices along an axis of the mesh."""
        return self.programs.layout.mesh.shape[axis]

    def tokens(self, rows: int) -> float:
        """t, of so many rows a device."""
        pairs = 2 if self.stage.stage_type in ("dpo", "reward") else 1
        return rows * pairs * self.stage.row_length / self.along(SEQUENCE)

    def temporaries(self, rows: int, accumulation: int, remat: Remat) -> float:
        """Bytes of gradients and temporaries."""
        m, tensor, t = self.model, self.along(TENSOR), self.tokens(rows)
        c = 2 if m.dtype == "bfloat16" else 4
        heads, kv = m.heads * m.head_dim / tensor, m.kv_heads * m.head_dim / tensor
        named = {"query": heads, "key": kv, "value": kv, "attention": heads, "attention_out": m.embed}
        named |= {"gate": m.mlp / tensor, "up": m.mlp / tensor, "mlp_out": m.embed}
        kept = {"full": 0.0, "offload": 0.0, "none": sum(named.values())}
        each = (
            kept.get(remat, sum(named.values())) if isinstance(remat, str) else sum(named[n] for n in remat)
        )
        saved = m.layers * t * c * (m.embed + each)
        seen = {"xla": self.stage.row_length, "blocked": block(self.stage.row_length)}.get(m.attention, 0)
        layer = t * (c * (6 * m.mlp / tensor + 8 * m.embed + 6 * heads) + 12 * seen * m.heads / tensor)
        of_layer = m.embed * (2 * heads + 2 * kv + 3 * m.mlp / tensor)
        trains = self.trained > 0.01 * self.weights
        parted = self.along(FSDP) > 1 and self.programs.layout.zero >= 2
        weights = of_layer * ((3 * c if parted else 0) + (8 if trains else 0))
        logits = 12 * chunk(math.ceil(t), m.vocab) * m.vocab / tensor
        head = m.vocab * m.embed / tensor * (c + (8 if trains else 0)) + logits
        return saved + layer + weights + head + self.trained * (2 if accumulation > 1 else 1)

    def bytes(self, rows: int, accumulation: int, remat: Remat, scale: float = 1.0) -> float:
        """Of memory at most, in any program of the stage."""
        return max(self.held + scale * self.temporaries(rows, accumulation, remat), self.most)

    def seconds(self, rows: int, accumulation: int, remat: Remat) -> float:
        """Of a step, by the same roofline as of a compiled program."""
        chip, m, mesh = self.target.chip, self.model, self.programs.layout.mesh
        assert chip is not None
        tensor, sequence = self.along(TENSOR), self.along(SEQUENCE)
        work = self.row_flops(remat) * (rows * accumulation / tensor / sequence)
        peak = chip.fp32 if m.dtype == "float32" else chip.flops
        skipped = SKIPPED if m.attention in ("splash", "cudnn") else 1.0
        compute = work.dense / (peak * REACHED["dense"]) + work.attention * skipped / (
            peak * REACHED["attention"]
        )
        links = REACHED["links"] * chip.links * (0.5 if chip.torus else 1.0)
        c, fsdp = (2 if m.dtype == "bfloat16" else 4), self.along(FSDP)
        zero = self.programs.layout.zero
        gathered = 2 * accumulation * c * self.weights / tensor * (fsdp - 1) / fsdp if zero >= 3 else 0.0
        groups = self.along(DATA) * fsdp * sequence
        whole = self.trained * (fsdp if zero >= 2 else 1)
        reduced = 2 * accumulation * whole * (groups - 1) / groups
        one = links / max(chip.torus, 1) if tensor * sequence < mesh.size else links
        ring = 2 * (tensor - 1) / tensor
        passes = 4 if remat != "full" else 6
        waited = accumulation * m.layers * self.tokens(rows) * m.embed * c * passes * ring / one
        if sequence > 1:
            keys = 2 * m.kv_heads * m.head_dim / tensor * c * self.tokens(rows) * (sequence - 1)
            waited += accumulation * m.layers * 3 * keys / one
        read = (3 * self.held + self.decoding) / (chip.bandwidth * REACHED["memory"])
        return max(compute, (gathered + reduced) / links) + waited + read


def shortage(programs: Programs, target: Target) -> str | None:
    """What is to be said before a stage starts that won't fit, as far as that is known on paper."""
    assert target.memory is not None
    stage = programs.stage
    sheet = Sheet.of(programs, target, row_flops(programs.config, stage, programs.hf, target.devices[0]))
    rows, accumulation = stage.per_device_train_batch_size, stage.gradient_accumulation_steps
    needed = sheet.bytes(rows, accumulation, stage.remat or "none")
    if needed <= target.memory:
        return None
    return (
        f"{stage.stage_name} may need {needed / 2**30:.1f} GiB of each device, which has "
        f"{target.memory / 2**30:.1f}; python -m ntjax.plan --auto searches settings that fit"
    )


def _gradients(train: Program, layout: Layout) -> int:
    """Bytes of gradients on a device."""
    trainable = train.arguments[0].params
    total = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(trainable))
    return total // layout.mesh.shape[TENSOR] // (layout.mesh.shape[FSDP] if layout.zero >= 2 else 1)


def row_flops(config: Config, stage: StageConfig, hf: dict[str, Any], device: Any) -> Counted:
    """FLOPs of one row on one device, forward and backward, by what is kept for the backward pass."""
    mesh = make_mesh(None, [device])

    @cache
    def counted(remat: Remat) -> Flops:
        alone = replace(stage, per_device_train_batch_size=1, gradient_accumulation_steps=1, remat=remat)
        programs = Programs(*untuned(config, alone, remat=True), hf, Layout(mesh))
        program = next(iter(programs))
        rows = program.arguments[2]["tokens"].shape[1]
        return flops(program.function.trace(*program.arguments).jaxpr, 1) * (1 / rows)

    return counted
