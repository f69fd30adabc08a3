"""Runs from Python: configs as dicts, functions as they are, and what a run left."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ntjax import cells
from ntjax.config import Config, load_config
from ntjax.config.tables import COMMAND_LINE
from ntjax.errors import ConfigError

if TYPE_CHECKING:
    from ntjax.api import LoadedModel

CELLS = Path("cells")  # of the working folder: functions that were given as they are


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run left in `folder`; `stages` are the folders of its stages by name, in order.

    A stage goes by its name or its type, as in "sft"; by default it is the last.
    """

    folder: Path
    stages: Mapping[str, Path]

    def metrics(self, stage: str | None = None) -> list[dict[str, Any]]:
        """The lines of a stage's metrics.jsonl: a dict each, with a `step`. pandas.DataFrame takes them as they are."""
        from ntjax.metrics import read_metrics

        return read_metrics(self._folder(stage))

    def curve(self, metric: str, stage: str | None = None) -> tuple[list[int], list[float]]:
        """Steps at which a metric was written, and its values; KeyError, with those there are, where none was."""
        lines = self.metrics(stage)
        found = [(line["step"], line[metric]) for line in lines if metric in line]
        if not found:
            raise KeyError(
                f"{metric}; there are {', '.join(dict.fromkeys(name for line in lines for name in line))}"
            )
        return [step for step, _ in found], [value for _, value in found]

    def completions(self, stage: str | None = None) -> list[dict[str, Any]]:
        """The lines of completions.jsonl, of a stage that drew some: prompt, completion, rewards, reward, advantage."""
        path = self._folder(stage) / "completions.jsonl"
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    def load(self, stage: str | None = None, **options: Any) -> LoadedModel:
        """The model that a stage made, an adapter merged; `options` are `ntjax.load`'s."""
        from ntjax.api import load

        return load(self._folder(stage), **options)

    def _folder(self, stage: str | None) -> Path:
        if stage is None:
            return list(self.stages.values())[-1]
        for name in (stage, f"{stage}_stage"):
            if name in self.stages:
                return self.stages[name]
        raise KeyError(f"{stage}; there are {', '.join(self.stages)}")


def run(
    config: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    resume: str | Path | None = None,
    stages: Sequence[str] = (),
    quiet: bool = False,
) -> Run:
    """Runs the stages of a config, as `ntjax train` does, in this process.

    `config` is a file, or the same as a dict: {"model": {...}, "datasets": {...}, "stages": [{...}]}. Its paths are
    seen from the file's folder, then from the working folder. `overrides` are {"stages.sft.max_steps": 2} or
    ["stages.sft.max_steps=2"]. Where the name of a function stands, as in reward_function, the function itself can be
    given: its source is written to the folder `cells` (see `cells.written`).

    `resume` is a run, a stage, a checkpoint or "auto"; `stages` are those to run, all by default. The log goes to
    train.log, and unless `quiet` is printed too; progress is printed to stderr.

    Raises the UserErrors that the command prints.
    """
    found = configured(config, overrides)

    from ntjax import pipeline
    from ntjax.compiling import keep_compiled, set_defaults

    set_defaults()
    keep_compiled(found.compile_cache)
    resume = resume or found.resume_from_checkpoint
    with contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext():
        folder = pipeline.run(found, resume=None if resume is None else str(resume), stages=stages)
    chosen = pipeline.chosen_stages(found, stages)
    return Run(folder, {stage.stage_name: pipeline.stage_folder(found, stage, folder) for stage in chosen})


def configured(
    config: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | Sequence[str] = ()
) -> Config:
    """A config that is a file or a dict, checked; see `run`. Raises ConfigError and InputMissing."""
    asked = overrides
    if isinstance(overrides, Mapping):
        asked = [f"{key}={_literal(_named(value))}" for key, value in overrides.items()]
    if not isinstance(config, Mapping):
        return load_config(config, list(asked))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(_named(config)), encoding="utf-8")
        try:
            found = load_config(path, list(asked))
        except ConfigError as error:
            place = {f"{path}:1": "config", COMMAND_LINE: ""}
            raise ConfigError(
                _replaced(error.message, place),
                where=_replaced(error.where or "config", place),
                fix=error.fix,
            ) from None
    places = {key: place for key, place in found.places.items() if place.startswith(COMMAND_LINE)}
    return dataclasses.replace(found, path=Path.cwd() / "config", places=places)


def _named(value: Any) -> Any:
    """A value of a config, functions in it by their names, paths as text."""
    if isinstance(value, Mapping):
        return {key: _named(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_named(one) for one in value]
    if callable(value):
        return cells.written(value, CELLS)
    return str(value) if isinstance(value, Path) else value


def _literal(value: Any) -> str:
    """A value as the command line takes it."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _replaced(text: str, places: Mapping[str, str]) -> str:
    for written, said in places.items():
        text = text.replace(written, said)
    return text
