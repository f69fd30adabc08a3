"""`python -m ntjax.plan`: whether each stage of a config fits, and how fast it will be, before anything is paid for."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ntjax import errors
from ntjax.errors import ConfigError

if TYPE_CHECKING:
    from ntjax.config import Config
    from ntjax.estimate.measure import Estimate
    from ntjax.estimate.target import Target
    from ntjax.layout import Layout

GIB = 2**30
# Columns of the table: heading and width.
COLUMNS = (
    ("stage", 12),
    ("program", 10),
    ("weights", 8),
    ("optimizer", 9),
    ("cache", 7),
    ("temporary", 9),
    ("beside", 7),
    ("total", 8),
    ("fits", 5),
    ("TFLOP", 9),
    ("GB moved", 9),
    ("GB sent", 8),
    ("seconds", 9),
    ("bound by", 8),
    ("MFU", 6),
    ("XLA's s", 8),
)
LEGEND = """
GiB of memory, and FLOPs and bytes of a call, of one device. XLA's s: what the compiler reckons with, on TPUs, without
kernels and collectives; far above the seconds, something is done in a slow way.
"""


def main(argv: Sequence[str]) -> None:
    """Parses the command line and prints the plan."""
    parser = argparse.ArgumentParser(
        "ntjax plan", description="Compiles every stage of a config on shapes alone: bytes, FLOPs, seconds."
    )
    parser.add_argument("--config", required=True)
    parser.add_argument(
        "--topology",
        metavar="NAME",
        help="a TPU slice (v5e:4x4, v5p:2x2x2, v6e:16x16) or a GPU box (h100:8); the devices there are by default",
    )
    parser.add_argument(
        "--auto", action="store_true", help="search mesh, batch and remat that fit, and print them"
    )
    parser.add_argument("--stages", default="", help="only these, by name or type, comma-separated")
    parser.add_argument("--deepspeed", metavar="FILE", help="a DeepSpeed JSON, as train reads it")
    parser.add_argument("--json", action="store_true", help="an object a program")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any setting, by dotted path")
    args = parser.parse_intermixed_args(argv)

    from dataclasses import replace

    from ntjax.config import load_config, refuse_unbuilt
    from ntjax.pipeline import chosen_stages

    deepspeed = [f"deepspeed={args.deepspeed}"] if args.deepspeed else []
    config = load_config(args.config, [*args.overrides, *deepspeed])
    refuse_unbuilt(config)
    names = [name.strip() for name in args.stages.split(",") if name.strip()]
    config = replace(config, stages=tuple(chosen_stages(config, names)))
    if args.topology:
        os.environ["JAX_PLATFORMS"] = "cpu"  # what is here has no part in it

    from ntjax.compiling import keep_compiled, set_defaults
    from ntjax.estimate.target import target

    set_defaults()
    keep_compiled(config.compile_cache)
    devices = target(args.topology)
    plan = Plan(config, devices, quiet=args.json)
    if args.auto:
        plan = plan.searched()
    plan.show(as_json=args.json)
    if wrong := [e for each in plan.estimates() for e in each if e.fits is False]:
        over = max(wrong, key=lambda e: e.bytes)
        assert devices.memory is not None
        raise ConfigError(
            f"{over.program} needs {over.bytes / GIB:.2f} GiB of each device, which has {devices.memory / GIB:.2f}",
            where=config.where("mesh"),
            fix=f"take more or larger devices than {devices.name}"
            if args.auto
            else "--auto searches what fits",
        )


class Plan:
    """A config on a target: each stage's programs, compiled once each."""

    def __init__(self, config: Config, target: Target, *, quiet: bool = False):
        self.config, self.target, self.quiet = config, target, quiet
        self.hf = [_model_of(config, number) for number in range(len(config.stages))]
        self.known: dict[str, Estimate] = {}
        self.found: str | None = None  # settings that were searched

    def layout(self, config: Config) -> Layout:
        """How a config lies on the target."""
        from ntjax.prepare import layout_of

        return layout_of(config, self.target.devices)

    def searched(self) -> Plan:
        """The plan of the settings that fit and take the least time."""
        from ntjax.estimate.search import Search

        if self.target.chip is None:
            raise ConfigError(
                f"nothing is known of {self.target.name} that a search could go by",
                where="--auto",
                fix="name devices with --topology",
            )
        search = Search(self.config, self.hf, self.target, self.layout, self.step_of, self.tell)
        found = search()
        plan = Plan(found.config, self.target, quiet=self.quiet)
        plan.known, plan.found = self.known, "\n".join(found.lines)
        return plan

    def step_of(self, config: Config, number: int) -> Estimate:
        """Of one stage's step, under another config."""
        return self._compiled(config, number, only="train")[0]

    def estimates(self) -> list[list[Estimate]]:
        """Of every stage, every program."""
        return [self._compiled(self.config, number) for number in range(len(self.config.stages))]

    def _compiled(self, config: Config, number: int, only: str | None = None) -> list[Estimate]:
        from ntjax.estimate.measure import estimate
        from ntjax.estimate.programs import Programs
        from ntjax.narrow import traced_for

        stage, found = config.stages[number], []
        programs = Programs(config, stage, self.hf[number], self.layout(config), self.target.memory)
        with traced_for(self.target.platform):
            for program in programs:
                key = f"{program.name} {stage} {config.mesh} {config.model}"
                if key not in self.known:
                    self.tell(f"{stage.stage_name}: compiling {program.name}", end="")
                    began = time.perf_counter()
                    self.known[key] = estimate(programs, program, self.target)
                    self.tell(f" {time.perf_counter() - began:.0f} s")
                found.append(self.known[key])
                if program.name == only:
                    break
        return found

    def tell(self, text: str, end: str = "\n") -> None:
        """Progress, beside the plan itself."""
        if not self.quiet:
            print(text, end=end, file=sys.stderr, flush=True)

    def show(self, *, as_json: bool = False) -> None:
        """Prints the plan."""
        stages = self.estimates()
        if as_json:
            for stage, every in zip(self.config.stages, stages, strict=True):
                for one in every:
                    print(json.dumps({"stage": stage.stage_name, **_plain(one, self.layout(self.config))}))
            if self.found:
                print(json.dumps({"settings": self.found}))
            return
        layout, memory = self.layout(self.config), self.target.memory
        of_each = f", {memory / GIB:.2f} GiB each" if memory else ""
        print(f"\n{self.config.model.model_name_or_path} on {self.target.name}{of_each}; {layout}\n")
        print(" ".join(f"{name:>{width}}" for name, width in COLUMNS))
        for stage, every in zip(self.config.stages, stages, strict=True):
            for one in every:
                print(
                    " ".join(f"{cell:>{w}}" for cell, (_, w) in zip(_cells(stage, one), COLUMNS, strict=True))
                )
        print(LEGEND)
        for stage, every in zip(self.config.stages, stages, strict=True):
            for text in _notes(stage, every, layout):
                print(text)
        if self.found:
            print(f"\nSettings that fit, to paste:\n\n{self.found}")


def _cells(stage: Any, one: Estimate) -> list[str]:
    held = defaultdict(float, {kind: size / GIB for kind, size in one.memory.items()})
    models = sum(held[kind] for kind in ("weights", "sampler's weights", "reference", "reward model"))
    temporary = sum(held.values()) - models - held["optimizer"] - held["cache"]
    sizes = [
        models,
        held["optimizer"],
        held["cache"],
        temporary,
        sum(one.beside.values()) / GIB,
        one.bytes / GIB,
    ]
    fits = {None: "", True: "yes", False: "NO"}[one.fits]
    work = one.work.dense + one.work.attention
    row = [stage.stage_name, one.program, *(f"{size:.2f}" for size in sizes), fits, f"{work / 1e12:.3g}"]
    if not one.moved:  # it wasn't compiled to its end
        return [*row, *[""] * 6]
    row += [f"{one.moved / 1e9:.4g}", f"{one.sent / 1e9:.3g}"]
    if one.times is None or one.utilisation is None:
        return [*row, *[""] * 4]
    row += [f"{one.times.total:.4g}", one.times.bound, f"{one.utilisation:.1%}"]
    return [*row, f"{one.reckoned:.4g}" if one.reckoned else ""]


def _notes(stage: Any, every: Sequence[Estimate], layout: Layout) -> list[str]:
    """What the table has no room for: collectives by kind, kernels, and a step in all."""
    from ntjax.estimate.roofline import axes

    found = []
    for one in every:
        sums: dict[str, float] = defaultdict(float)
        for each in one.collectives:
            along = "+".join(sorted(axes(each, layout.mesh)))
            sums[f"{each.kind} along {along}"] += each.moved
        parts = [f"{name} {size / 1e9:.3g} GB" for name, size in sorted(sums.items(), key=lambda kv: -kv[1])]
        kernels = [f"{name} x {count}" for name, count in one.kernels.items()]
        said = [f"sends {', '.join(parts)}"] * bool(parts) + [f"kernels {', '.join(kernels)}"] * bool(kernels)
        if said:
            found.append(f"{stage.stage_name} {one.program}: {'; '.join(said)}")
    if all(one.times for one in every):
        spent = sum(one.calls * one.times.total for one in every if one.times)
        tokens = every[0].tokens
        found.append(
            f"{stage.stage_name}: {tokens:,} tokens a step in {spent:.3g} s, "
            f"{tokens / spent / layout.mesh.size:,.0f} tokens/s a device"
        )
    return found


def _plain(one: Estimate, layout: Layout) -> dict[str, Any]:
    """For programs."""
    from ntjax.estimate.roofline import axes

    plain = asdict(one)
    plain["collectives"] = [
        {
            "kind": each.kind,
            "bytes": each.bytes,
            "times": each.times,
            "devices": each.group,
            "axes": sorted(axes(each, layout.mesh)),
        }
        for each in one.collectives
    ]
    seconds = one.times.total if one.times else None
    return {**plain, "total": one.bytes, "fits": one.fits, "sent": one.sent, "seconds": seconds}


def _model_of(config: Config, number: int) -> dict[str, Any]:
    """The config.json of the model that a stage goes back to."""
    from ntjax.hf.files import read_config
    from ntjax.hf.hub import locate
    from ntjax.hf.peft import read_adapter_config
    from ntjax.pipeline import goes_back_to

    name = goes_back_to(config, config.stages[number])
    folder = locate(name, cache_dir=config.model.cache_dir, folders=[config.path.parent], weights=False)
    if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
        base = read_adapter_config(folder)[1]
        folder = locate(base or name, cache_dir=config.model.cache_dir, weights=False)
    return read_config(folder)


if __name__ == "__main__":
    errors.run(main)
