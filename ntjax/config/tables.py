"""From tables as written to frozen dataclasses, collecting every problem on the way."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ntjax.config.settings import Declared, Table, UnfitError, check, names_of, place_of, settings_of, shown
from ntjax.errors import ConfigError

T = TypeVar("T", bound=Table)
COMMAND_LINE = "command line: "


@dataclass
class Reader:
    """Builds tables. `places` is where each dotted key was written, `homes` finds the tables of a name."""

    file: str
    places: dict[str, str]
    homes: Callable[[str], list[str]]
    problems: list[ConfigError] = field(default_factory=list)

    def where(self, path: str) -> str:
        """The place of a setting, or of the table around it."""
        return place_of(path, self.places, self.file)

    def blame(self, path: str, message: str, fix: str | None = None) -> None:
        """Adds a problem, to be raised with all others."""
        self.problems.append(ConfigError(f"{path}{message}", where=self.where(path), fix=fix))

    def finish(self) -> None:
        """Raises the problems found, if any: one as it is, several in one message, one a line."""
        if len(self.problems) == 1:
            raise self.problems[0]
        if self.problems:
            in_order = map(str, sorted(self.problems, key=_line))
            raise ConfigError(f"{len(self.problems)} problems\n" + "\n".join(in_order))

    def build(self, table: type[T], raw: Any, path: str) -> T | None:
        """The table at `path`, or None where something is wrong with it."""
        before = len(self.problems)
        if not isinstance(raw, dict):
            self.blame(
                path,
                f" = {shown(raw)}: expected a table of settings",
                f"write [{path}] and settings below it",
            )
            return None
        given = self._given(table, raw, path)
        settings = settings_of(table)
        values = {name: self._value(settings[name], *given[name]) for name in given}
        for name, declared in settings.items():
            if name not in given and declared.default is dataclasses.MISSING:
                self.blame(_join(path, name), ": this setting must be given", f"add {name} = ...")
        if len(self.problems) > before:
            return None
        built = table(**values)
        for name, conflict in built.conflicts():
            self.blame(_join(path, name), f": {conflict}")
        return built if len(self.problems) == before else None

    def _given(self, table: type[T], raw: dict[str, Any], path: str) -> dict[str, tuple[str, Any]]:
        """The settings given: name -> (path as written, value), aliases and merged tables resolved."""
        names = names_of(table)
        written = [(_join(path, key), key, value) for key, value in raw.items() if key != table.merged]
        if table.merged in raw:
            inner = raw[table.merged]
            if isinstance(inner, dict):
                written += [
                    (f"{_join(path, table.merged)}.{key}", key, value) for key, value in inner.items()
                ]
            elif inner is not None:
                self.blame(_join(path, table.merged), f" = {shown(inner)}: expected a table of settings")
        given: dict[str, tuple[str, Any]] = {}
        for at, key, value in written:
            if key not in names:
                self._refuse_unknown(table, at, key, value)
            elif names[key] not in given or self.outranks(at, given[names[key]][0], names[key]):
                given[names[key]] = (at, value)
        self.places |= {_join(path, name): self.where(at) for name, (at, _) in given.items()}
        return given

    def outranks(self, at: str, other: str, name: str) -> bool:
        """Whether the setting as written at `at` replaces the one at `other`: only the command line does."""
        if self.where(at).startswith(COMMAND_LINE):
            return True
        if self.where(other).startswith(COMMAND_LINE):
            return False
        self.blame(
            at, f": {name} is given twice, also as {other} at {self.where(other)}", "keep one of the two"
        )
        return False

    def _value(self, declared: Declared, at: str, value: Any) -> Any:
        if value is None and isinstance(declared.default, Table | dict):
            return declared.default
        if isinstance(declared.kind, type) and issubclass(declared.kind, Table):
            return self.build(declared.kind, value, at)
        try:
            checked = check(value, declared)
            name = at.rpartition(".")[2]
            if name.endswith("_ratio") and name in declared.rules.aliases and checked >= 1:
                raise UnfitError("a ratio is below 1")  # from 1 on, warmup_steps is a count
            return checked
        except UnfitError as unfit:
            self.blame(at, f" = {shown(value)}: {unfit}", _way_out(declared, value))
            return None

    def _refuse_unknown(self, table: type[T], at: str, key: str, value: Any) -> None:
        if key in table.inherent:
            if value != table.inherent[key]:
                only = shown(table.inherent[key])
                self.blame(
                    at, f" = {shown(value)}: here it is always {only}", f"remove {key}, or write {only}"
                )
            return
        for pattern, reason in table.absent.items():
            if fnmatch.fnmatchcase(key, pattern):
                if value and value != "none":
                    self.blame(at, f" = {shown(value)} has no counterpart here: {reason}", f"remove {key}")
                return
        self._suggest(table, at, key, value)

    def _suggest(self, table: type[T], at: str, key: str, value: Any) -> None:
        unknown = f" = {shown(value)}: there is no such setting"
        homes = self.homes(key)
        close = difflib.get_close_matches(key, names_of(table), n=1)
        if homes:
            self.blame(at, f"{unknown} here; it belongs to {' and '.join(homes)}", "move it there")
        elif close:
            self.blame(at, f"{unknown}; did you mean {close[0]}?", f"write {close[0]}")
        else:
            known = settings_of(table)
            listed = f"; there are {', '.join(known)}" if len(known) <= 30 else ""
            self.blame(at, f"{unknown}{listed}", f"remove {key}")


def _line(problem: ConfigError) -> float:
    """The line at fault; the command line comes last."""
    line = str(problem.where).rpartition(":")[2]
    return int(line) if line.isdecimal() else math.inf


def _way_out(declared: Declared, value: Any) -> str | None:
    close = difflib.get_close_matches(str(value), map(str, declared.rules.choices), n=1)
    if close:
        return f'write "{close[0]}"'
    if declared.default in (None, dataclasses.MISSING):
        return None
    return f"write {declared.name} = {shown(declared.default)}, the default"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
