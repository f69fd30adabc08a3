"""What the documents say is so: their links lead somewhere, their settings are read, their commands run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ntjax import lookup
from ntjax.__main__ import COMMANDS
from ntjax.config import load_config, refuse_unbuilt
from ntjax.config.schema import Config, DatasetConfig, ModelConfig
from ntjax.config.settings import names_of
from tests.docs.blocks import PAGES, ROOT, STORIES, Block, blocks, workplace

MODEL = '[model]\nmodel_name_or_path = "m"\n'
DATA = '[datasets.any]\ndataset_path = "d.jsonl"\n'
RUN = {"bash": ("bash", "-euo", "pipefail", "-c"), "python": (sys.executable, "-c")}
BLOCKS = [block for page in PAGES for block in blocks(page)]
SETTINGS = [block for block in BLOCKS if block.language == "toml"]


def whole(block: Block) -> str:
    """A config that says what the block says: a fragment is given the tables it leaves out."""
    if "stage" in block.asked:
        vlm = 'model_type = "vlm"\n' if "vision" in block.text else ""
        return f'{MODEL}{vlm}\n{DATA}\n[[stages]]\nstage_type = "{block.asked["stage"]}"\n{block.text}'
    tables = tomllib.loads(block.text)
    missing = {"model": MODEL, "datasets": DATA, "stages": '[[stages]]\nstage_type = "sft"\n'}
    return block.text + "".join(f"\n{text}" for name, text in missing.items() if name not in tables)


@pytest.mark.parametrize("block", SETTINGS, ids=lambda block: block.where)
def test_settings_are_read(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(whole(block))
    refuse_unbuilt(load_config(path))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            name, _, anchor = target.partition("#")
            there = (page.parent / name) if name else page
            assert there.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(there), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """What links to headings of a page are called, as GitHub calls them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def mentioned() -> set[tuple[str, str]]:
    """(command, flag) of every command line in the documents."""
    found = set()
    for page in PAGES:
        for line in page.read_text().replace("\\\n", " ").splitlines():
            for name, rest in re.findall(r"(?:ntjax |python -m ntjax\.)([a-z]+)\b([^`|#]*)", line):
                if name in COMMANDS:
                    rest = rest.partition(" -- ")[0]
                    found |= {(name, flag) for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", rest)}
    return found


def test_commands_have_the_flags_that_are_mentioned() -> None:
    flags: dict[str, set[str]] = {}
    for name, flag in mentioned():
        flags.setdefault(name, set()).add(flag)
    environment = {**os.environ, "COLUMNS": "200"}
    for name, wanted in flags.items():
        command = [sys.executable, "-m", f"ntjax.{name}", "--help"]
        said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment).stdout
        assert wanted <= set(re.findall(r"--[a-z][\w-]*", said)), name


@pytest.mark.slow
@pytest.mark.parametrize("page", STORIES, ids=lambda page: page.name)
def test_commands_run(page: Path, tmp_path: Path) -> None:
    environment = workplace(tmp_path)
    for block in blocks(page):
        if "file" in block.asked:
            path = tmp_path / block.asked["file"]
            path.parent.mkdir(exist_ok=True)
            path.write_text(block.text)
        elif block.language in RUN and "not-run" not in block.asked:
            done = subprocess.run(
                [*RUN[block.language], block.text],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=900,
            )
            assert done.returncode == 0, f"{block.where}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_every_setting_of_the_pytorch_module_is_known() -> None:
    page = (ROOT / "docs" / "from-neurotrain.md").read_text()
    table = page.partition("## The settings")[2].partition("Every option")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    names = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    stages = [lookup.stage_options(kind) for kind in lookup.stage_types()]
    known = set().union(*(names_of(table) for table in (Config, ModelConfig, DatasetConfig, *stages)))
    assert names - known == {"model_kwargs", "stage_kwargs"}  # which are tables of further settings
    assert len(names) > 60
