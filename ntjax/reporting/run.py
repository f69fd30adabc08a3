"""What a run's folder says of the run, finished or not: read as far as it is whole."""

from __future__ import annotations

import json
import re
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from ntjax.errors import BadData, InputMissing
from ntjax.metrics import LOG_NAME
from ntjax.record import best_step, better, saved_metrics, saved_steps
from ntjax.reporting.series import Series
from ntjax.runs import DONE

ENVIRONMENT = "environment.json"
LOG_LINES = 40  # of the log's about a stage: some of these are complaints about rows


class Best(NamedTuple):
    """The checkpoint that evaluated best, by which metric."""

    step: int
    metric: str
    value: float


@dataclass
class Curves:
    """A metrics.jsonl: its curves, and the seconds that its steps and evaluations took."""

    series: defaultdict[str, Series] = field(default_factory=lambda: defaultdict(Series))
    first: int = 0
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Stage:
    """A stage as it is on disk; `steps` is how many it will have, None where nothing says it. `said` are the lines of
    the log about what it starts from and its data."""

    name: str
    kind: str
    folder: Path
    done: bool
    steps: int | None
    curves: Curves
    checkpoints: list[int]
    best: Best | None
    said: str

    @property
    def step(self) -> int:
        """How far it is known to be."""
        return max([self.curves.step, *self.checkpoints])

    @property
    def begun(self) -> bool:
        """Whether there is anything of it."""
        return bool(self.done or self.step or self.said)

    @property
    def state(self) -> str:
        """For people."""
        if not self.begun:
            return "not started"
        of = "" if self.steps is None else f" of {self.steps:,}"
        return f"done, {self.step:,} steps" if self.done else f"at step {self.step:,}{of}"


@dataclass(frozen=True)
class Run:
    """A run, or one stage of it: `config` is the text of config.toml, "" where there is none."""

    folder: Path
    task: str
    model: str
    began: str
    config: str
    environment: dict[str, Any]
    stages: list[Stage]


def read_run(folder: Path) -> Run:
    """The run in `folder`, which may be that of one stage.

    Raises InputMissing for a folder that isn't there or is neither, BadData for a file in it that can't be read.
    """
    if not folder.is_dir():
        raise InputMissing(f"there is no folder {folder}", fix="name a run's folder, as runs/llm/TASK/latest")
    folder = folder.resolve()
    if (folder / "config.toml").is_file():
        return _run(folder, folder, None)
    if not any((folder / name).exists() for name in (LOG_NAME, DONE)) and not saved_steps(folder):
        latest = folder / "latest"
        raise InputMissing(
            f"{folder} is no run: there is neither config.toml in it nor {LOG_NAME}",
            fix=f"name {latest}"
            if latest.exists()
            else "name the folder with config.toml, or a stage's in it",
        )
    return _run(folder, folder.parent, folder)


def _run(folder: Path, home: Path, only: Path | None) -> Run:
    """What lies in the run folder `home`, of all stages or of the one in `only`."""
    path = home / "config.toml"
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        config = tomllib.loads(text)
    except ValueError as error:
        raise BadData(f"not TOML: {error}", where=str(path), fix="put back what the run wrote") from error
    tables = {_folder(home, table): table for table in config.get("stages", ())}
    if only is not None:
        if only not in tables:  # the run that a stage's `output_dir` belongs to isn't known
            text, config = "", {}
        tables = {only: tables.get(only, {"stage_name": only.name})}
    said = read_log(home / "train.log", [table.get("stage_name", "") for table in tables.values()])
    return Run(
        folder,
        config.get("task_name", folder.name),
        config.get("model", {}).get("model_name_or_path", ""),
        _began(home.name),
        text,
        read_environment(home),
        [_stage(place, table, said) for place, table in tables.items()],
    )


def _folder(home: Path, table: Mapping[str, Any]) -> Path:
    own = table.get("output_dir")
    return Path(own).resolve() if own else home / table.get("stage_name", "")


def _began(name: str) -> str:
    """When a run folder of that name was made."""
    with suppress(ValueError):
        return time.strftime("%Y-%m-%d %H:%M:%S", time.strptime(name[:15], "%Y%m%d_%H%M%S"))
    return ""


def _stage(folder: Path, table: Mapping[str, Any], logs: Mapping[str, str]) -> Stage:
    name = table.get("stage_name", folder.name)
    said, done = logs.get(name, ""), (folder / DONE).exists()
    planned = re.findall(rf"^{re.escape(name)}: (\d+) steps on ", said, re.MULTILINE)
    steps = int(planned[-1]) if planned else max(table.get("max_steps", -1), 0) or None
    curves = read_curves(folder / LOG_NAME)
    kind = table.get("stage_type", "")
    return Stage(name, kind, folder, done, steps, curves, saved_steps(folder), _best(folder, table), said)


def _best(folder: Path, table: Mapping[str, Any]) -> Best | None:
    """The checkpoint that evaluated best."""
    if not table.get("do_eval"):
        return None
    default = import_module(f"ntjax.stages.{table['stage_type']}").Options.best_metric
    metric = f"eval_{table.get('metric_for_best_model', default).removeprefix('eval_')}"
    metrics = saved_metrics(folder)
    step = best_step(metrics, better(metric, table.get("greater_is_better")))
    return None if step is None else Best(step, metric, metrics[step] or 0.0)


def read_curves(path: Path) -> Curves:
    """The curves of a metrics.jsonl, of which only what shows is held; a last line cut short is left out.

    Raises BadData with the line for one that is no record.
    """
    curves = Curves()
    if not path.exists():
        return curves
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                _add(curves, json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
                raise BadData(
                    f"not a record of metrics: {line[:60].decode(errors='replace').strip()!r}",
                    where=f"{path}:{number}",
                    fix="a record is an object of numbers with a step; take the line out",
                ) from error
    return curves


def _add(curves: Curves, record: dict[str, Any]) -> None:
    step = int(record["step"])
    passed, curves.first = step - curves.step, curves.first or step
    curves.step = step
    curves.tokens = record.get("num_tokens") or curves.tokens
    curves.seconds += (record.get("step_time") or 0.0) * passed + (record.get("eval_runtime") or 0.0)
    for name, value in record.items():
        if name not in ("step", "epoch", "num_tokens"):
            curves.series[name].add(step, None if value is None else float(value))


def read_log(path: Path, names: Iterable[str]) -> dict[str, str]:
    """What a train.log says of each stage between its last start and its first step."""
    found: dict[str, list[str]] = {}
    names, current = set(names), ""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            name, _, rest = line.partition(" ")
            if rest.startswith("starts from ") and name in names:
                found[name], current = [line], name
            elif line.startswith((f"{current} {{", "{", "done: ")):  # a step, a completion, the end
                current = ""
            elif current and len(found[current]) < LOG_LINES:
                found[current].append(line)
    return {name: "".join(lines) for name, lines in found.items()}


def read_environment(home: Path) -> dict[str, Any]:
    """What `live.Live` wrote of the devices and versions; nothing where an older ntjax wrote none."""
    path = home / ENVIRONMENT
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise BadData(f"not a JSON object: {error}", where=str(path), fix="take the file away") from error
