"""A notebook's functions as files: rewards run in processes of their own, which find a function by its file."""

from __future__ import annotations

import builtins
import hashlib
import inspect
import symtable
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from ntjax.errors import ConfigError

FUTURE = "from __future__ import annotations\n\n"  # hints name what only the cells know


def written(function: Callable[..., Any], folder: Path) -> str:
    """Writes a function's source into `folder` and gives its name for a config, "FILE.py:function".

    Modules that it uses are imported in the file under the names that they have beside it. A file's name has a digest
    of its text, so another version of the function is another file.

    Raises ConfigError: it isn't made by a plain `def`, its source isn't there, or it uses other values from around it.
    """
    name = getattr(function, "__name__", "")
    if not isinstance(function, FunctionType) or not name.isidentifier():
        raise _unfit(function, "it isn't a function made by def")
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError) as error:
        raise _unfit(function, f"its source isn't there: {error}") from None
    around = {**function.__globals__, **inspect.getclosurevars(function).nonlocals}
    imports, strangers = [], []
    for used in sorted(names(symtable.symtable(FUTURE + source, name, "exec")) & around.keys()):
        if isinstance(around[used], ModuleType):
            imports.append(f"import {around[used].__name__} as {used}\n")
        elif not hasattr(builtins, used):
            strangers.append(used)
    if strangers:
        raise _unfit(function, f"it uses {', '.join(strangers)}, which the other process hasn't got")
    text = "".join([FUTURE, *imports, "\n\n" if imports else "", source])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.absolute() / f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:8]}.py"
    path.write_text(text)
    return f"{path}:{name}"


def names(table: symtable.SymbolTable) -> set[str]:
    """What a piece of code uses and doesn't make itself, the functions within it included."""
    outside = {
        symbol.get_name()
        for symbol in table.get_symbols()
        if symbol.is_referenced() and (symbol.is_global() or symbol.is_free() or table.get_type() == "module")
    }
    return outside.union(*map(names, table.get_children())) - _made(table)


def _made(table: symtable.SymbolTable) -> set[str]:
    """Names that a module defines: of a cell's function, its own."""
    if table.get_type() != "module":
        return set()
    return {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned()}


def _unfit(function: Any, why: str) -> ConfigError:
    return ConfigError(
        f"{getattr(function, '__name__', function)} can't be sent to another process: {why}",
        fix="define or import what it uses within it; or write it to a file (%%writefile reward.py) and name it "
        '"reward.py:function"',
    )
