"""Training on rows with photos is TRL 1.16's: LLaVA and Qwen2.5-VL by SFT, as a whole and in parts, and by DPO."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from datasets import Dataset, Image, List
from trl import DPOConfig, SFTConfig

from ntjax.hf.files import read_config
from ntjax.hf.folder import open_weights
from ntjax.models import build
from ntjax.params import unused
from tests import vlm, vlm_reference
from tests.peft_reference import WARNINGS
from tests.trl_reference import (
    Change,
    Row,
    Runs,
    WeightedDPO,
    WeightedSFT,
    compared,
    here,
    text,
    trained,
    trainer_of,
    turn,
    write_config,
)

SETTINGS: dict[str, Any] = {"learning_rate": 2e-3, "weight_decay": 0.1, "max_grad_norm": 1.25}
SETTINGS |= {"num_train_epochs": 4, "max_length": 256}
STEPS = 20
PROJECTOR = 1e-2  # its own learning rate
CLOSE = 1e-5  # promised is 1e-3
WEIGHTS = 1e-5
KEYS = re.compile(r"vision_tower\..*\.k_proj\.bias$")

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNINGS]


class Rated(WeightedSFT):
    """TRL whose projector has a learning rate of its own."""

    def create_optimizer(self, *args: Any) -> Any:
        optimizer = super().create_optimizer(*args)
        own = {p for n, p in self.model.named_parameters() if "multi_modal_projector" in n}
        groups = [
            {**group, "params": params, "lr": rate}
            for group in optimizer.param_groups
            for params, rate in (
                ([p for p in group["params"] if p not in own], group["lr"]),  # TRL logs the first group's
                ([p for p in group["params"] if p in own], PROJECTOR),
            )
        ]
        self.optimizer = type(optimizer)(groups)
        return self.optimizer


def frozen(*parts: str) -> Change:
    """Leaves the weights of modules as they are."""

    def change(model: Any) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in parts))

    return change


def sight(rng: random.Random, shown: list[Path]) -> Row:
    """A question about up to three photos."""
    images = [str(photo) for photo in rng.choices(shown, k=rng.choice([0, 1, 1, 2, 3]))]
    return {"prompt": [turn("user", text(rng, 1, 12))], "images": images}


def answer(rng: random.Random) -> list[Row]:
    return [turn("assistant", text(rng, 1, 12))]


class Place:
    """A folder and rows of a family, and what TRL and we make of them."""

    def __init__(self, out: Path, family: vlm.Family, tower: vlm.Tower = "clip"):
        rng, self.out = random.Random(3), out
        self.folder = vlm.tiny_vlm(out / "model", family, tower)
        shown = vlm_reference.photos(out)
        self.rows = [{**sight(rng, shown), "completion": answer(rng)} for _ in range(75)]
        self.pairs = [
            {**sight(rng, shown), "chosen": answer(rng), "rejected": answer(rng)} for _ in range(80)
        ]

    def trl(
        self, kind: type, config: type, rows: list[Row], name: str, change: Change, **settings: Any
    ) -> Any:
        """TRL's run: 16 rows a step."""
        options = {**SETTINGS, "per_device_train_batch_size": 8, "gradient_checkpointing": False, **settings}
        seen = Dataset.from_list(rows).cast_column("images", List(Image()))
        options["processing_class"] = vlm_reference.processor(self.folder)
        model = vlm_reference.model(self.folder)
        model.accepts_loss_kwargs = (
            True  # else of Qwen2.5-VL a step's loss is the mean of its microbatches' means
        )
        return trained(
            trainer_of(kind, config, model, self.folder, seen, self.out / name, **options), 1, change
        )

    def ours(self, name: str, rows: list[Row], stage: str, **settings: Any) -> Path:
        """Our run, 16 rows a step on eight devices."""
        options = {**SETTINGS, "per_device_train_batch_size": 1, **settings}
        see = {"model_type": "vlm"}
        return here(
            write_config(self.folder, rows, self.out / name, stage=stage, model_settings=see, **options)
        )


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("llava"), "llava")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("qwen"), "qwen2_5_vl")


class Done(NamedTuple):
    """Runs by both, the folder that they started from, and the parts that they left as they were."""

    runs: Runs
    before: Path
    still: tuple[str, ...] = ()


TOWER, LANGUAGE = ("vision_tower",), ("language_model", "lm_head")
DOUBLE: Row = {"per_device_train_batch_size": 2}  # on half as many row groups
RATES: Row = {"learning_rates": {"projector": PROJECTOR}}
# Name -> (fixture, TRL's trainer, parts that are frozen, settings of ours)
SFT: dict[str, tuple[str, type, tuple[str, ...], Row]] = {
    "whole": ("llava", WeightedSFT, (), {}),
    "two rates": ("llava", Rated, (), RATES),
    "frozen tower": ("llava", WeightedSFT, TOWER, {"freeze": TOWER}),
    "projector": ("llava", WeightedSFT, TOWER + LANGUAGE, {"freeze": (*TOWER, "language_model")}),
    "qwen": ("qwen", WeightedSFT, (), {}),
    "zero 3 and rings": ("qwen", WeightedSFT, (), {"mesh": {"fsdp": 4, "sequence": 2}, **DOUBLE}),
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow) for name in SFT],
)
def sft(request: pytest.FixtureRequest) -> Done:
    family, kind, still, settings = SFT[request.param]
    place: Place = request.getfixturevalue(family)
    reference = place.trl(kind, SFTConfig, place.rows, f"{request.param} trl", frozen(*still))
    runs = compared(reference, place.ours(request.param, place.rows, "sft", **settings))
    return Done(runs, place.folder, still)


def test_losses_and_gradient_norms_are_trls(sft: Done) -> None:
    """Before clipping, which some steps are subject to and, where all is trained, some are not."""
    runs = sft.runs
    print({name: runs.worst(name, relative=True) for name in ("loss", "grad_norm")})
    assert runs.worst("loss", relative=True) <= CLOSE
    assert runs.worst("grad_norm", relative=True) <= CLOSE
    assert runs.worst("learning_rate") <= 1e-6 * SETTINGS["learning_rate"]
    assert all(runs.worst(name) == 0 for name in ("step", "num_tokens"))
    assert len(runs.ours) == STEPS


def test_the_exported_weights_are_those_that_trl_trained(sft: Done) -> None:
    """But for the biases of a CLIP's keys, whose gradients are nothing but rounding: Adam makes steps of them."""
    found, before, wanted = (
        open_weights(sft.runs.folder),
        open_weights(sft.before),
        sft.runs.model.state_dict(),
    )
    assert found.names() == before.names() == wanted.keys()
    moved, worst = set(), 0.0
    for name in found.names():
        ours, theirs = found.read(name), wanted[name].numpy()
        if np.array_equal(ours, before.read(name)):
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
            continue
        moved.add(name)
        if not KEYS.search(name):
            worst = max(worst, np.abs(ours - theirs).max())
    assert not any(part in name for part in sft.still for name in moved)
    specs = build(read_config(sft.before)).specs
    assert moved == {
        name
        for path, spec in specs.items()
        for _, name in spec.tensors()
        if path not in unused(specs) and not any(part in name for part in sft.still)
    }
    print(f"weights: {worst:.1e}")
    assert worst <= WEIGHTS


METRICS = ["loss", "rewards/chosen", "rewards/rejected", "rewards/margins"]
METRICS += ["logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected", "entropy"]


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen", marks=pytest.mark.slow)])
def test_dpo_is_trls(family: str, request: pytest.FixtureRequest) -> None:
    place: Place = request.getfixturevalue(family)
    settings = {"learning_rate": 1e-3, "max_grad_norm": 5.0, "num_train_epochs": 2, "beta": 0.5}
    theirs = {**settings, "ref_model": vlm_reference.model(place.folder)}
    reference = place.trl(WeightedDPO, DPOConfig, place.pairs, "dpo trl", frozen(), **theirs)
    runs = compared(reference, place.ours("dpo", place.pairs, "dpo", **settings))
    off = {
        name: max(abs(ours - theirs) / max(1, abs(theirs)) for ours, theirs in runs.pairs(name))
        for name in METRICS
    }
    norm = runs.worst("grad_norm", relative=True)
    print(off, norm)
    assert max(off.values()) <= 1e-4, off
    assert norm <= 1e-3
    assert len(runs.ours) == STEPS // 2
    assert max(abs(record["rewards/margins"]) for record in runs.ours) > 0.1
