"""Adapters and quantised weights from the command line."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ntjax.hf.tokenizer import save_generation_config, save_tokenizer
from tests.cli.process import Result, metrics, write_rows
from tests.tiny import tiny_tokenizer

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
STAGE = {"stage_type": "sft", "max_steps": 3, "learning_rate": 1e-2, "warmup_steps": 0, "logging_steps": 1}
STAGE |= {"save_steps": 3}


@pytest.fixture(scope="session")
def adapted(place: Path) -> Callable[..., Path]:
    """adapted("name", {stage}, {stage}, model={...}): a config of SFT stages with LoRA."""

    def adapted(task: str, *stages: dict[str, Any], model: dict[str, Any] | None = None) -> Path:
        settings = {"model_name_or_path": "model", "use_lora": True, "lora_config": LORA}
        config = {
            "task_name": task,
            "base_output_dir": "out",
            "use_tensorboard": False,
            "model": settings | (model or {}),
            "datasets": {"sft": {"dataset_path": "pairs.jsonl", "max_length": 64}},
            "stages": [STAGE | stage for stage in stages or [{}]],
        }
        path = place / f"{task}.json"
        path.write_text(json.dumps(config))
        return path

    return adapted


@pytest.fixture(scope="session")
def trained(
    ntjax: Callable[..., Result], adapted: Callable[..., Path], latest: Callable[[str], Path]
) -> Path:
    """The stage folder of three steps of LoRA."""
    ended = ntjax("train", "--config", adapted("lora"))
    assert ended.code == 0, ended.err
    return latest("lora") / "sft_stage"


def test_a_stage_on_an_adapter_stops_where_the_stage_before_learned_to(
    ntjax: Callable[..., Result], adapted: Callable[..., Path], place: Path, latest: Callable[[str], Path]
) -> None:
    """As of models whose end of sequence isn't what their template ends turns with."""
    base = Path(shutil.copytree(place / "model", place / "base"))
    tokenizer = tiny_tokenizer()
    learned, tokenizer.eos_token = tokenizer.eos_token_id, "<|endoftext|>"
    save_tokenizer(tokenizer, base)
    (base / "generation_config.json").unlink()
    save_generation_config(base, None, tokenizer)

    def said(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "How?"}, {"role": "assistant", "content": answer}]

    write_rows(place / "sft.jsonl", [{"messages": said(answer)} for answer in ("so", "no", "and", "sea")])
    write_rows(place / "dpo.jsonl", [{"chosen": said("so"), "rejected": said("no")}] * 4)
    stages = [{"max_steps": 1}, {"stage_type": "dpo", "max_steps": 1}]
    config = json.loads(adapted("stops", *stages, model={"model_name_or_path": "base"}).read_text())
    config["datasets"] = {
        name: {"dataset_path": f"{name}.jsonl", "max_length": 64} for name in ("sft", "dpo")
    }
    (place / "stops.json").write_text(json.dumps(config))
    ended = ntjax("train", "--config", "stops.json")
    assert ended.code == 0, ended.err
    for stage in ("sft_stage", "dpo_stage"):
        stops = json.loads((latest("stops") / stage / "generation_config.json").read_text())["eos_token_id"]
        assert learned in stops, stage


def test_a_checkpoint_holds_what_is_trained_alone(trained: Path) -> None:
    record = json.loads((trained / "checkpoint-3" / "record" / "metadata").read_text())
    names = [name for name in record["leaves"] if name.startswith("params/")]
    ends = ("lora_A", "lora_B")
    assert sorted(names) == [f"params/blocks.{at}.{end}" for at in ("attn.q", "mlp.down") for end in ends]


def test_export_gives_what_the_stage_left(ntjax: Callable[..., Result], place: Path, trained: Path) -> None:
    merged = ntjax("export", "--checkpoint", trained, "--out", place / "merged", "--merge")
    assert merged.code == 0, merged.err
    assert "the adapter merged, safetensors" in merged.out
    alone = ntjax("export", "--checkpoint", trained, "--out", place / "alone", "--adapter-only")
    assert alone.code == 0, alone.err
    for ours, theirs in (("merged/model", "model"), ("alone/adapter_model", "adapter/adapter_model")):
        one, other = place / f"{ours}.safetensors", trained / f"{theirs}.safetensors"
        assert one.read_bytes() == other.read_bytes()


def test_the_adapter_on_its_base_answers_as_the_merged_model(
    ntjax: Callable[..., Result], place: Path, trained: Path
) -> None:
    ask = "--prompt", "What is sea 3?", "--max-new-tokens", "6", "--json"
    merged = ntjax("generate", "--model", trained, *ask)
    apart = ntjax("generate", "--model", place / "model", "--adapter", trained / "adapter", *ask)
    assert merged.code == apart.code == 0, merged.err + apart.err
    one, other = (json.loads(answer.out) for answer in (merged, apart))
    assert one["tokens"] == other["tokens"]
    np.testing.assert_allclose(one["logprobs"], other["logprobs"], atol=1e-4)


def test_an_adapter_is_trained_on_merged_into_a_new_start_or_into_full_training(
    ntjax: Callable[..., Result],
    place: Path,
    adapted: Callable[..., Path],
    latest: Callable[[str], Path],
    trained: Path,
) -> None:
    still = {"learning_rate": 0.0}
    starts: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "kept": ({"model_name_or_path": str(trained / "adapter")}, still),
        "anew": ({"model_name_or_path": str(trained)}, still | {"merge_adapter": True}),
        "whole": (
            {"model_name_or_path": str(trained / "adapter"), "use_lora": False, "lora_config": {}},
            still,
        ),
    }
    weights = load_file(trained / "model.safetensors")
    for task, (model, stage) in starts.items():
        ended = ntjax("train", "--config", adapted(f"lora_{task}", stage, model=model))
        assert ended.code == 0, ended.err
        folder = latest(f"lora_{task}") / "sft_stage"
        for name, array in load_file(folder / "model.safetensors").items():
            np.testing.assert_allclose(array, weights[name], atol=1e-6, err_msg=f"{task} {name}")
        assert (folder / "adapter").exists() == (task != "whole")
    kept, anew = (
        load_file(latest(f"lora_{task}") / "sft_stage/adapter/adapter_model.safetensors")
        for task in ("kept", "anew")
    )
    before = load_file(trained / "adapter/adapter_model.safetensors")
    assert all(np.array_equal(kept[name], before[name]) for name in before)
    assert not any(array.any() for name, array in anew.items() if "lora_B" in name)
    base = json.loads((latest("lora_anew") / "sft_stage/adapter/adapter_config.json").read_text())
    assert base["base_model_name_or_path"] == str(trained)


def test_another_adapter_than_the_settings_describe_is_refused(
    ntjax: Callable[..., Result], adapted: Callable[..., Path], trained: Path
) -> None:
    ended = ntjax(
        "train",
        "--config",
        adapted("lora_kept"),
        f"model.model_name_or_path={trained}",
        "model.lora_config.r=8",
    )
    assert ended.code == 78, ended.err
    assert "has other ranks, scales or modules" in ended.err
    assert "merge_adapter = true" in ended.err


def test_no_module_by_that_name_lists_those_there_are(
    ntjax: Callable[..., Result], adapted: Callable[..., Path]
) -> None:
    config = adapted("lora_none", model={"lora_config": {"target_modules": ["c_attn"]}})
    ended = ntjax("train", "--config", config)
    assert ended.code == 78, ended.err
    assert "lora_none.json:" in ended.err
    for name in ("c_attn", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert name in ended.err


@pytest.mark.parametrize("command", ["--merge", "--adapter-only"])
def test_export_of_an_adapter_that_is_not_there_is_refused(
    command: str, ntjax: Callable[..., Result], place: Path, whole: Path
) -> None:
    ended = ntjax("export", "--checkpoint", whole / "sft_stage", "--out", place / "none", command)
    assert ended.code == 78, ended.err
    assert "sft_stage trained no adapter" in ended.err


@pytest.fixture(scope="session")
def quantised(place: Path) -> Path:
    """The tiny model, quantised to NF4 and saved by transformers and bitsandbytes."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes warns of what isn't there to serve with
        model = AutoModelForCausalLM.from_pretrained(
            place / "model", quantization_config=how, device_map="cpu"
        )
        model.save_pretrained(place / "quantised")
    for file in (place / "model").glob("*token*"):
        shutil.copy(file, place / "quantised")
    return place / "quantised"


def test_a_checkpoint_of_bitsandbytes_trains_as_the_model_quantised_here(
    ntjax: Callable[..., Result],
    adapted: Callable[..., Path],
    latest: Callable[[str], Path],
    quantised: Path,
) -> None:
    here = {"load_in_4bit": True, "bnb_config": {"use_double_quant": True}}
    for task, model in (("there", {"model_name_or_path": str(quantised)}), ("here", here)):
        ended = ntjax("train", "--config", adapted(f"nf4_{task}", model=model))
        assert ended.code == 0, ended.err
        assert "the adapter is merged into the dequantised weights" in ended.out
    one, other = (latest(f"nf4_{task}") / "sft_stage" for task in ("there", "here"))
    assert metrics(one) == metrics(other)
    assert "quantization_config" not in json.loads((one / "config.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(one)
    assert str(merged.dtype) == "torch.float32"


def test_a_quantised_checkpoint_without_adapters_is_refused(
    ntjax: Callable[..., Result], adapted: Callable[..., Path], quantised: Path
) -> None:
    model = {"model_name_or_path": str(quantised), "use_lora": False, "lora_config": {}}
    ended = ntjax("train", "--config", adapted("nf4_full", model=model))
    assert ended.code == 78, ended.err
    assert "its weights are frozen" in ended.err
