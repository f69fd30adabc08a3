"""What `remat` may say: a policy, or which activations of a layer are kept for the backward pass (`ops/remat.py`)."""

from __future__ import annotations

from collections.abc import Iterator

POLICIES = ("none", "full", "minimal", "dots", "offload")
NAMES = ("query", "key", "value", "attention", "attention_out", "gate", "up", "mlp_out")


def conflicts(value: str | tuple[str, ...], checkpointing: bool | None) -> Iterator[tuple[str, str]]:
    """(setting, what is wrong) of a `remat`, and of `gradient_checkpointing` beside it."""
    names = value if isinstance(value, tuple) else ()
    if isinstance(value, str) and value not in (*POLICIES, "auto"):
        yield "remat", f'"{value}": allowed are {", ".join(POLICIES)}, or a list of {", ".join(NAMES)}'
    for name in names:
        if name not in NAMES:
            yield "remat", f'"{name}" is no activation of a layer; they are {", ".join(NAMES)}'
    if value != "auto" and checkpointing is not None and checkpointing == (value == "none"):
        yield "gradient_checkpointing", f"{str(checkpointing).lower()}, but remat = {value}; keep remat"
