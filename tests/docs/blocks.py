"""The fenced blocks of the documents, and the folder their commands are run in.

What stands after a fence's language says what a test does with the block: `file=NAME` writes it, `stage=TYPE` takes it
for settings of such a stage, `not-run` lets it be read only.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "README.zh-CN.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
STORIES = [ROOT / "README.md", ROOT / "README.zh-CN.md"] + [
    ROOT / "docs" / name for name in ("LLM_VLM_TRAINING_GUIDE.md", "from-trl.md", "from-neurotrain.md")
]
HUB = "models--HuggingFaceTB--SmolLM2-135M-Instruct"

# Every run of the documents' commands is cut short: it is to show that they work, not what they teach.
SHIM = """#!{python}
import sys
from ntjax.config import load_config

arguments = sys.argv[1:] if {name!r} == "ntjax" else [a for a in sys.argv[1:] if a != "-m"]
module = arguments.pop(0).removeprefix("ntjax.")
if module == "train":
    config = arguments[arguments.index("--config") + 1]
    for index, stage in enumerate(load_config(config).stages):
        short = {{"max_steps": 2, "logging_steps": 1}}
        if stage.rolls_out:
            short |= {{"max_steps": 1, "per_device_train_batch_size": 8}}
            short["max_completion_length" if stage.stage_type == "grpo" else "response_length"] = 4
        arguments += [f"stages.{{index}}.{{key}}={{value}}" for key, value in short.items()]
import importlib
from ntjax import errors
errors.run(importlib.import_module("ntjax." + module).main, arguments)
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language, what is asked of it, its text."""

    where: str
    language: str
    asked: dict[str, str]
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = []
    source = page.read_text()
    for match in re.finditer(r"^```([^\n]*)\n(.*?)^```$", source, re.MULTILINE | re.DOTALL):
        language, *words = match[1].split() or [""]
        asked = {key: value for key, _, value in (word.partition("=") for word in words)}
        line = source.count("\n", 0, match.start()) + 1
        found.append(Block(f"{page.name}:{line}", language, asked, match[2]))
    return found


def workplace(folder: Path) -> dict[str, str]:
    """Makes `folder` what the documents take for granted: the repository's configs, a model beside them that the hub's
    cache has too (a tiny one), and commands that train for two steps. Returns the environment."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    model = tiny_model(folder / "models" / "smollm2-135m-instruct")
    snapshot = folder / "hub" / HUB / "snapshots" / "0"
    shutil.copytree(model, snapshot)
    (folder / "hub" / HUB / "refs").mkdir()
    (folder / "hub" / HUB / "refs" / "main").write_text("0")
    (folder / "bin").mkdir()
    for name in ("ntjax", "python"):
        shim = folder / "bin" / name
        shim.write_text(SHIM.format(python=sys.executable, name=name))
        shim.chmod(0o755)
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith(("XLA_", "NTJAX_"))},
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "HF_HUB_CACHE": str(folder / "hub"),
        "JAX_PLATFORMS": "cpu",
        "NO_COLOR": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
