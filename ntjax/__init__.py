"""ntjax trains language models through a chain of stages, in JAX, from one config file.

From Python: `load`, `loss`, `stepper` and `run`, which `ntjax.api` has; they are imported, and jax with them, when they
are first asked for.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ntjax.api import LoadedModel, Run, Stepper, load, loss, run, stepper

# transformers says at import that there is no torch, which is as it should be.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
__all__ = ["LoadedModel", "Run", "Stepper", "__version__", "load", "loss", "run", "stepper"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from ntjax import api

        return getattr(api, name)
    raise AttributeError(f"module 'ntjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
