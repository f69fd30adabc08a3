"""Twenty steps of SFT with LoRA are those of TRL 1.16 with PEFT 0.21, on plain and on quantised weights."""

from __future__ import annotations

import logging
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file
from transformers import PreTrainedModel

from ntjax.record import read_record
from tests.peft_reference import WARNINGS
from tests.tiny import tiny_model
from tests.trl_reference import (
    Row,
    Runs,
    by_command,
    by_trl,
    causal,
    compared,
    here,
    smollm2_folder,
    text,
    write_config,
)

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNINGS]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SETTINGS: dict[str, Any] = {"learning_rate": 3e-3, "weight_decay": 0.1, "max_grad_norm": 0.5}
SETTINGS |= {"max_length": 64, "num_train_epochs": 4}
# Of losses; promised is 1e-3. Adam's first steps on B = 0 make more of rounding in gradient norms, up to 6e-5.
CLOSE = 1e-5
CASES: dict[str, tuple[Any, Row]] = {
    "plain": (ATTENTION, {}),
    "4 bits": ("all-linear", {"load_in_4bit": True, "bnb_config": {"use_double_quant": True}}),
    "8 bits": (ATTENTION, {"load_in_8bit": True}),
}
IDS = torch.from_numpy(np.random.default_rng(0).integers(5, 300, (2, 40)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def round_trip(weight: torch.Tensor, settings: Row) -> torch.Tensor:
    """What bitsandbytes makes of a matrix, dequantised.

    In a matrix its 4-bit kernel for CPUs takes wrong absmaxes where rows aren't blocks: the numbers go in a row.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes.functional as bnb
    if settings.get("load_in_8bit"):
        codes, scale, _ = bnb.int8_vectorwise_quant(weight.half())
        return bnb.int8_vectorwise_dequant(codes, scale)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    state.shape = torch.Size((weight.numel(),))
    return bnb.dequantize_4bit(packed.reshape(-1, 1), state).reshape(weight.shape)


def base(folder: Path, settings: Row) -> PreTrainedModel:
    """The model in float32, the weights of its layers quantised and dequantised by bitsandbytes if settings say so."""
    model = causal(folder)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # else bitsandbytes' mean of absmaxes differs in its last bit
    with torch.no_grad():
        for name, module in model.named_modules():
            if settings and isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.copy_(round_trip(module.weight, settings))
    torch.set_num_threads(before)
    return model


def peft_adapter(folder: Path, out: Path, targets: Any) -> Path:
    """A PEFT folder with a new adapter of rank 8 on the model in a folder: A random, B zero."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=64, target_modules=targets, task_type="CAUSAL_LM")
    peft.get_peft_model(causal(folder), config).save_pretrained(out)
    return out


def lora(targets: Any, settings: Row) -> Row:
    """Our [model] settings for it."""
    return {"use_lora": True, "lora_config": {"r": 8, "lora_alpha": 64, "target_modules": targets}} | settings


@pytest.fixture(
    scope="module",
    params=["plain", "4 bits", pytest.param("8 bits", marks=pytest.mark.slow)],
)
def runs(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """80 prompts and completions, 16 a step, from the same adapter, on eight devices."""
    rng, out = random.Random(0), tmp_path_factory.mktemp("lora")
    rows = [{"prompt": text(rng, 1, 10), "completion": text(rng, 1, 20)} for _ in range(80)]
    targets, settings = CASES[request.param]
    adapter = peft_adapter(model, out / "adapter", targets)
    theirs = peft.PeftModel.from_pretrained(base(model, settings), adapter, is_trainable=True)
    reference = by_trl(model, rows, out / "trl", model=theirs, per_device_train_batch_size=8, **SETTINGS)
    options = {"per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 20}
    config = write_config(
        model, rows, out / "ntjax", model_settings=lora(targets, settings), **SETTINGS, **options
    )
    return compared(reference, here(config, adapter))


def test_losses_and_gradient_norms_are_trls(runs: Runs) -> None:
    assert runs.worst("loss", relative=True) <= CLOSE
    assert runs.worst("grad_norm", relative=True) <= 1e-3
    assert len(runs.ours) == 20
    assert runs.ours[-1]["loss"] < runs.ours[0]["loss"] - 0.09
    norms = [record["grad_norm"] for record in runs.ours]
    assert min(norms) < SETTINGS["max_grad_norm"] < max(norms)


@pytest.mark.parametrize("name", ["entropy", "mean_token_accuracy", "num_tokens", "learning_rate"])
def test_metrics_are_trls(runs: Runs, name: str) -> None:
    assert runs.worst(name) <= 1e-3


def test_the_trained_adapter_is_the_one_that_trl_trains(runs: Runs) -> None:
    ours = load_file(runs.folder / "adapter" / "adapter_model.safetensors")
    theirs = peft.get_peft_model_state_dict(runs.model)
    assert ours.keys() == theirs.keys()
    worst = max(np.abs(ours[name] - theirs[name].numpy()).max() for name in ours)
    moved = max(np.abs(ours[name]).max() for name in ours if "lora_B" in name)
    assert worst <= 1e-4 < 0.02 < moved


def test_peft_loads_the_adapter_onto_the_base_and_has_the_merged_folders_logits(
    runs: Runs, model: Path, request: pytest.FixtureRequest
) -> None:
    settings = CASES[request.node.callspec.params["runs"]][1]
    adapted = peft.PeftModel.from_pretrained(base(model, settings), runs.folder / "adapter").eval()
    with torch.no_grad():
        merged, found = causal(runs.folder).eval()(IDS).logits, adapted(IDS).logits
        plain = causal(model).eval()(IDS).logits
    assert (merged - found).abs().max() <= 1e-4
    assert (merged - plain).abs().max() > 0.1


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(runs: Runs) -> None:
    """A and B, two moments of each, and three counters: the step, the optimizer's and the one of the schedule."""
    leaves = read_record(runs.folder, 20)["leaves"]
    adapter = {path.partition("/")[2] for path in leaves if path.startswith("params/")}
    assert adapter
    assert all(path.endswith((".lora_A", ".lora_B")) for path in adapter)
    others = [path for path in leaves if not any(path.endswith(name) for name in adapter)]
    assert len(leaves) - len(others) == 3 * len(adapter)
    assert all(leaves[path][1] == [] for path in others), others


@pytest.mark.slow
def test_smollm2_is_trained_as_by_trl(tmp_path: Path) -> None:
    """Six steps of two short rows each, from PEFT's own adapter, whose folder is all that our config names."""
    smollm2, rng = smollm2_folder(tmp_path / "smollm2"), random.Random(0)
    rows = [{"prompt": text(rng, 1, 6), "completion": text(rng, 4, 8)} for _ in range(24)]
    settings = {**SETTINGS, "learning_rate": 1e-3, "num_train_epochs": 1, "max_length": 32}
    settings |= {"per_device_train_batch_size": 2, "warmup_steps": 2}
    adapter = peft_adapter(smollm2, tmp_path / "adapter", "all-linear")
    theirs = peft.PeftModel.from_pretrained(causal(smollm2), adapter, is_trainable=True)
    reference = by_trl(smollm2, rows, tmp_path / "trl", threads=2, model=theirs, **settings)
    config = write_config(
        adapter, rows, tmp_path / "ntjax", model_settings=lora("all-linear", {}), **settings
    )
    runs = compared(reference, by_command(config))
    found = {name: runs.worst(name, relative=True) for name in ("loss", "grad_norm")}
    print(found, runs.pairs("loss"))
    assert max(found.values()) <= 1e-3, found
    assert len(runs.ours) == 6
    assert runs.ours[-1]["loss"] < runs.ours[0]["loss"] - 0.5
