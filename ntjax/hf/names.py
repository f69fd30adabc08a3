"""Names of tensors in files, and what transformers 5 calls the same modules.

Vision-language checkpoints were published under the names of an older tree of modules. transformers still writes
them and reads either; PEFT and `target_modules` see the tree of now, as `Spec.hf` does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ntjax.errors import BadData
from ntjax.hf.files import Source

LLAVA = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.", "model.vision_tower."),  # as transformers 5 writes it
    ("model.vision_tower.vision_model.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("image_newline", "model.image_newline"),
)
QWEN_VL = (
    ("visual.", "model.visual."),
    ("model.", "model.language_model."),
    ("model.visual.", "model.visual."),
    ("model.language_model.", "model.language_model."),
)
# model_type -> prefixes (in files, of modules); the first that fits a module is the one that is written.
FAMILIES: dict[object, tuple[tuple[str, str], ...]] = {
    "llava": LLAVA,
    "llava_next": LLAVA,
    "qwen2_5_vl": QWEN_VL,
}


def in_file(name: str, model_type: object) -> str:
    """What the published checkpoints of a family call a tensor of `model_type`'s modules."""
    for file, module in FAMILIES.get(model_type, ()):
        if name.startswith(module):
            return file + name.removeprefix(module)
    return name


def in_modules(name: str, model_type: object) -> str:
    """What transformers' modules call a tensor in a file; their own names stay as they are."""
    fitting = [pair for pair in FAMILIES.get(model_type, ()) if name.startswith(pair[0])]
    file, module = max(fitting, key=lambda pair: len(pair[0]), default=("", ""))
    return module + name.removeprefix(file)


class Renamed:
    """A checkpoint under the names of modules; a `Source`. Raises BadData: a tensor is there under two names."""

    def __init__(self, source: Source, model_type: object):
        self._source = source
        self._names: dict[str, str] = {}
        for name in sorted(source.names()):
            other = self._names.setdefault(in_modules(name, model_type), name)
            if other != name:
                raise BadData(
                    f"{other} and {name} are one weight", where=str(source.path), fix="leave one out"
                )

    @property
    def path(self) -> Path:
        return self._source.path

    def names(self) -> set[str]:
        return set(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._names[name])

    def dtype(self, name: str) -> np.dtype:
        return self._source.dtype(self._names[name])

    def read(self, name: str) -> np.ndarray:
        return self._source.read(self._names[name])

    def file(self, name: str) -> Path:
        return self._source.file(self._names[name])
