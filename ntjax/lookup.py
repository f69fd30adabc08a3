"""Functions and stages by name.

A user's function is `module:function` or `path/to/file.py:function`; files are loaded by their location,
so that no name in the working folder can take the place of a standard module. The stages are the files of
ntjax/stages that have a class `Options`: the folder is the registry.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ntjax.errors import ConfigError, UserCodeError


def function(name: str, folder: Path, where: str | None = None) -> Callable[..., Any]:
    """The callable that `name` means, seen from a config in `folder`.

    A file is looked for in `folder`, then in the working folder; a module there as well, then among the
    installed ones. `where` is the place of the setting, for errors.
    """
    target, colon, attribute = name.rpartition(":")
    if not colon or not target:
        raise ConfigError(
            f"{name!r} is not a function's name",
            where=where,
            fix="write module:function or path/to/file.py:function",
        )
    if not attribute.isidentifier() or attribute.startswith("_"):
        raise ConfigError(f"{attribute!r} can't be used: name a public function", where=where)
    module = _module(target, folder, where)
    if attribute not in vars(module):
        raise _no_such_function(module, attribute, target, where)
    found = vars(module)[attribute]
    if not callable(found):
        raise ConfigError(f"{name} is not a function but {type(found).__name__}", where=where)
    if _is_standard(found):
        raise ConfigError(
            f"{name} is Python's own, and not written for this",
            where=where,
            fix="write a function of your own that calls it",
        )
    return found


def load_file(path: Path) -> ModuleType:
    """The module in `path`, run now, under a name that no other module has."""
    path = path.resolve()
    spec = importlib.util.spec_from_file_location(f"_ntjax_user_{path.stem}", path)
    assert spec, path
    assert spec.loader, path
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last: its neighbours can be imported, but shadow nothing
    sys.modules[spec.name] = module
    with blaming(path, "importing the file"):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def blaming(path: Path, action: str) -> Iterator[None]:
    """Turns what user code in `path` raises into an error that names its line."""
    try:
        yield
    except SyntaxError as error:
        place = f"{error.filename}:{error.lineno}"
        raise ConfigError(f"not Python: {error.msg}", where=place) from error
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename) == path.resolve()]
        place = f"{path}:{lines[-1]}" if lines else str(path)
        raise UserCodeError(f"{action} raised {type(error).__name__}: {error}", where=place) from error


def stage_types() -> tuple[str, ...]:
    """The stage types there are: ("dpo", "grpo", ...)."""
    files = sorted((Path(__file__).parent / "stages").glob("*.py"))
    return tuple(file.stem for file in files if "\nclass Options(" in file.read_text(encoding="utf-8"))


def stage_options(stage_type: str) -> Any:
    """The class of a stage's settings."""
    return importlib.import_module(f"ntjax.stages.{stage_type}").Options


def _module(target: str, folder: Path, where: str | None) -> ModuleType:
    is_file = target.endswith(".py")
    relative = target if is_file else target.replace(".", "/") + ".py"
    for candidate in (folder / relative, Path.cwd() / relative):
        if candidate.is_file():
            return load_file(candidate)
    if is_file:
        raise ConfigError(
            f"there is no file {target}: looked in {folder} and the working folder", where=where
        )
    if target.split(".")[0] in sys.stdlib_module_names:
        raise ConfigError(
            f"{target} is one of Python's own modules", where=where, fix="name a module of yours"
        )
    try:
        installed = importlib.util.find_spec(target)
    except (ModuleNotFoundError, ValueError):
        installed = None
    if installed is None:
        raise ConfigError(
            f"there is no module {target}: looked for {relative} in {folder} and the working folder, "
            "then for an installed module",
            where=where,
            fix="give the file as path/to/file.py:function",
        )
    with blaming(Path(installed.origin or target), f"importing {target}"):
        return importlib.import_module(target)


def _is_standard(found: Any) -> bool:
    if not (inspect.isroutine(found) or inspect.isclass(found)):
        return False
    return (found.__module__ or "builtins").split(".")[0] in sys.stdlib_module_names


def _no_such_function(module: ModuleType, attribute: str, target: str, where: str | None) -> ConfigError:
    own = [
        name for name, value in vars(module).items() if _is_own(value, module) and not name.startswith("_")
    ]
    close = difflib.get_close_matches(attribute, own, n=1)
    return ConfigError(
        f"{target} has no function {attribute}; it has {', '.join(own) or 'none'}",
        where=where,
        fix=f"write {target}:{close[0]}" if close else None,
    )


def _is_own(value: Any, module: ModuleType) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__
