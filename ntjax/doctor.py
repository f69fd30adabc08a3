"""`python -m ntjax.doctor`: what of this machine a run can use, what is missing, and one thing to do about it."""

from __future__ import annotations

import argparse
import glob
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ntjax import errors
from ntjax.compiling import FRACTION, TPU_ARGS, defaults, keep_compiled, set_defaults
from ntjax.errors import ConfigError

OK, NOTE, PROBLEM = "ok", "note", "problem"
STYLES = {OK: "green", NOTE: "yellow", PROBLEM: "bold red"}
SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "grain")
EXTRAS = {"cuda": "NVIDIA GPUs", "tpu": "TPUs"}  # they matter where such devices are
NVIDIA, TPU = ("/dev/nvidia[0-9]*", "/proc/driver/nvidia/version"), ("/dev/accel*", "/dev/vfio/[0-9]*")
PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"
TUNABLES = "GLIBC_TUNABLES"
SETTINGS = ("JAX_PLATFORMS", "XLA_FLAGS", TPU_ARGS, PREALLOCATE, FRACTION, TUNABLES)
ADDED = {FRACTION: "GPUs, which it takes whole", TPU_ARGS: "TPUs"}
PATIENCE = 3.0  # seconds the hub has to answer
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ROOM = 10 * 2**30  # bytes of disk below which a run may not have room for its checkpoints


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it stands, what was seen, and one thing to do about it."""

    check: str
    status: str
    said: str
    fix: str = ""


def main(argv: Sequence[str]) -> None:
    """Prints every finding; raises ConfigError where something is broken."""
    parser = argparse.ArgumentParser(
        "ntjax doctor",
        description="Looks at this machine as a run would: packages, devices, memory, caches, the hub, extras.",
        epilog="exit code: 0 if nothing is broken, else 78; what is missing and optional is a note.\n\n"
        "example:\n  ntjax doctor --json | jq 'select(.status != \"ok\")'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help='{"check", "status", "said", "fix"} a line')
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    broken = []
    for finding in findings():
        _show(finding, as_json=args.json)
        if finding.status == PROBLEM:
            broken.append(finding.check)
    if broken:
        raise ConfigError(f"broken: {', '.join(broken)}", fix="do what stands below each of them")


def findings() -> Iterator[Finding]:
    """Every finding, in the order in which they depend on each other."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        *(versions, settings, devices, host, cache, hub, extras),
    )
    for check in checks:
        try:
            yield from check()
        except Exception as error:  # a doctor goes on: what one check meets says nothing of the others
            reason = str(error).strip().partition("\n")[0]
            yield Finding(check.__name__, PROBLEM, f"{type(error).__name__}: {reason}", "see the lines above")


def _show(finding: Finding, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(finding), ensure_ascii=False), flush=True)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    line = Text(f"{finding.status:8}", STYLES[finding.status]).append(f" {finding.check:17}", "bold")
    console.print(line.append(finding.said, "default"))
    if finding.fix:
        console.print(Text(f"{'':25} fix: {finding.fix}"))


def versions() -> Iterator[Finding]:
    """Python, ntjax, and what it needs."""
    from importlib import metadata

    from packaging.requirements import Requirement

    from ntjax import __version__

    python = ".".join(map(str, sys.version_info[:3]))
    fits = (3, 11) <= sys.version_info[:2] < (3, 14)
    fix = "" if fits else "use Python 3.11, 3.12 or 3.13"
    yield Finding("python", OK if fits else PROBLEM, f"{python}, {sys.executable}", fix)
    try:
        wanted = [Requirement(line) for line in metadata.requires("ntjax") or []]
    except metadata.PackageNotFoundError:
        yield Finding("ntjax", NOTE, f"{__version__}, not installed", 'pip install -e "." in its folder')
        wanted = []
    else:
        yield Finding("ntjax", OK, f"{__version__}, {Path(__file__).parent}")
    needed = {one.name: one for one in wanted if not one.marker or one.marker.evaluate({"extra": ""})}
    for name in dict.fromkeys([*SHOWN, *needed]):
        version, needs = _version(name), needed.get(name)
        if version is None:
            asked = f'"{needs.name}{needs.specifier}"' if needs else name
            yield Finding(name, PROBLEM, "missing", f"pip install {asked}")
        elif needs and not needs.specifier.contains(version, prereleases=True):
            yield Finding(name, PROBLEM, f"{version}, but {needs} is needed", f'pip install -U "{needs}"')
        elif name in SHOWN:
            yield Finding(name, OK, version)


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def settings() -> Iterator[Finding]:
    """What the environment tells JAX and XLA, and what `ntjax.train` adds."""
    said = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    yield Finding("environment", OK, ", ".join(said) or "nothing is set for JAX")
    for name, value in defaults().items():
        yield Finding("environment", OK, f"train adds {name}={value}, for {ADDED[name]}")


def devices() -> Iterator[Finding]:
    """What JAX sees, what it should see, how fast it multiplies, and its attention kernel."""
    set_defaults()
    os.environ.setdefault(PREALLOCATE, "false")  # of what training takes, nothing beforehand
    import jax

    from ntjax.ops.attention import chosen

    try:
        found = jax.devices()
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        yield Finding("devices", PROBLEM, reason, "end the process that holds them, or set JAX_PLATFORMS=cpu")
        return
    first = found[0]
    memory = (first.memory_stats() or {}).get("bytes_limit") if first.platform != "cpu" else None
    each = f", {memory / 2**30:.1f} GiB each" if memory else ""
    yield Finding("devices", OK, f"{len(found)} x {first.device_kind} ({first.platform}){each}")
    yield from unseen(first.platform)
    yield from pages(first.platform)
    kind = "fp32" if first.platform == "cpu" else "bf16"
    yield Finding("speed", OK, f"{_speed(first) / 1e12:.2f} TFLOP/s of {kind} matmuls on one device")
    yield Finding("attention", OK, f"auto is {chosen('auto', first.platform)!r} here")


def unseen(platform: str) -> Iterator[Finding]:
    """Accelerators that are there while JAX runs on CPUs."""
    if platform != "cpu":
        return
    chosen = "cpu" in os.environ.get("JAX_PLATFORMS", "")
    for extra, what, places in (("cuda", "an NVIDIA GPU", NVIDIA), ("tpu", "a TPU", TPU)):
        if any(glob.glob(place) for place in places) or (extra == "cuda" and shutil.which("nvidia-smi")):
            fix = "unset JAX_PLATFORMS" if chosen else f'pip install "ntjax[{extra}]"'
            yield Finding("devices", NOTE if chosen else PROBLEM, f"{what} is here, and JAX uses CPUs", fix)


def pages(platform: str) -> Iterator[Finding]:
    """Large pages of memory that CPUs would work in, if they were asked for: a process can't once it has started."""
    if platform != "cpu" or "hugetlb" in os.environ.get(TUNABLES, "") or not LARGE_PAGES.exists():
        return
    if "[madvise]" in LARGE_PAGES.read_text():
        said = "of 4 KiB; with large ones a step takes 6 to 9% less, and starting 2 s more"
        yield Finding("memory pages", NOTE, said, f"export {TUNABLES}=glibc.malloc.hugetlb=1")


def _speed(device: Any, seconds: float = 0.5) -> float:
    """FLOP/s of square matmuls, bf16 on accelerators and fp32 on CPUs."""
    import jax
    import jax.numpy as jnp

    size, dtype = (1024, jnp.float32) if device.platform == "cpu" else (8192, jnp.bfloat16)
    x = jax.device_put(jnp.ones((size, size), dtype), device)
    multiply = jax.jit(lambda a, b: a @ b)
    multiply(x, x).block_until_ready()
    began, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds:
        multiply(x, x).block_until_ready()
        count += 1
    return 2 * size**3 * count / passed


def host() -> Iterator[Finding]:
    """Cores, memory, and disk in the working folder."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's
    if limit.is_file() and (allowed := limit.read_text().strip()).isdigit():
        memory = min(memory, int(allowed))
    yield Finding("host", OK, f"{cores} cores, {memory / 2**30:.1f} GiB of memory")
    free = shutil.disk_usage(Path.cwd()).free
    said = f"{free / 2**30:.1f} GiB free in {Path.cwd()}"
    if free < ROOM:
        yield Finding("disk", NOTE, said, "set save_total_limit, or write runs elsewhere with --output-dir")
    else:
        yield Finding("disk", OK, said)


def cache() -> Iterator[Finding]:
    """The folder of compiled programs."""
    import jax

    keep_compiled("auto")
    told: Any = jax.config
    folder = Path(told.jax_compilation_cache_dir or os.environ["JAX_COMPILATION_CACHE_DIR"])
    files = [file.stat().st_size for file in folder.rglob("*") if file.is_file()] if folder.is_dir() else []
    said = f"{folder}: {sum(files) / 2**20:.0f} MiB in {len(files)} files"
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if os.access(existing, os.W_OK):
        yield Finding("compile cache", OK, said)
    else:
        fix = 'set compile_cache to a folder of yours, or to "none"'
        yield Finding("compile cache", NOTE, f"{said}; it can't be written to: every run compiles anew", fix)


def hub() -> Iterator[Finding]:
    """Where models of the hub come from."""
    from huggingface_hub import constants, get_token

    said = [f"cache {constants.HF_HUB_CACHE}", "a token is set" if get_token() else "no token"]
    names = ("HF_ENDPOINT", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "NO_PROXY")
    said += [f"{name}={_public(os.environ[name])}" for name in names if os.environ.get(name)]
    yield Finding("hub", OK, ", ".join(said))
    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", OK, "HF_HUB_OFFLINE is set: folders and models in the cache are found")
        return
    reason = _unreachable(constants.ENDPOINT)
    if reason is None:
        yield Finding("hub", OK, f"{_public(constants.ENDPOINT)} answers")
    else:
        from ntjax.hf.hub import WAYS_OUT

        yield Finding("hub", NOTE, f"{_public(constants.ENDPOINT)} doesn't answer: {reason}", WAYS_OUT)


def _public(url: str) -> str:
    """A URL without the name and password it may hold."""
    return re.sub(r"(?<=//)[^/@]*@", "", url)


def _unreachable(url: str) -> str | None:
    """Why the hub can't be reached, None if it can. Looking a name up has no limit of its own, so a thread waits."""
    import threading
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    answer: list[str | None] = []

    def ask() -> None:
        try:
            with urlopen(Request(url, method="HEAD"), timeout=PATIENCE):
                answer.append(None)
        except HTTPError:
            answer.append(None)  # whatever it says, it is there
        except Exception as error:
            answer.append(_public(str(getattr(error, "reason", error))))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return answer[0] if answer else f"nothing within {PATIENCE:.0f} s"


def extras() -> Iterator[Finding]:
    """Optional parts of ntjax, and how to get each."""
    from importlib import metadata

    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in metadata.requires("ntjax") or []]
    except metadata.PackageNotFoundError:
        return
    for extra in metadata.metadata("ntjax").get_all("Provides-Extra") or []:
        if extra == "test":
            continue
        needed = [
            r for r in wanted if r.marker and r.marker.evaluate({"extra": extra}) and "extra" in str(r.marker)
        ]
        missing = [name for one in needed for name in _packages(one) if _version(name) is None]
        if not missing:
            yield Finding("extra", OK, extra)
        else:
            why = f", for {EXTRAS[extra]}" if extra in EXTRAS else ""
            said = f"{extra} isn't installed{why}: {', '.join(missing)}"
            yield Finding("extra", NOTE, said, f'pip install "ntjax[{extra}]"')


def _packages(requirement: Any) -> list[str]:
    """The packages that a requirement brings: of jax[tpu], what JAX asks for there."""
    from importlib import metadata

    from packaging.requirements import Requirement

    if not requirement.extras or _version(requirement.name) is None:
        return [requirement.name]
    inner = [Requirement(line) for line in metadata.requires(requirement.name) or []]
    return [
        one.name
        for one in inner
        for extra in requirement.extras
        if one.marker and "extra" in str(one.marker) and one.marker.evaluate({"extra": extra})
    ]


if __name__ == "__main__":
    errors.run(main)
