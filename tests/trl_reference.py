"""One SFT run, by ntjax and by TRL's SFTTrainer: the same folder, rows, order and settings, in float32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import SFTConfig, SFTTrainer

from ntjax.config import load_config
from ntjax.metrics import read_metrics
from ntjax.prepare import Job, prepare
from ntjax.signals import StopRequest
from ntjax.trainer import train

Row = dict[str, Any]
SETTINGS: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
}
disable_progress_bars()


@dataclass(frozen=True)
class Reference:
    """What TRL made: a record a step, the model, and the lengths of the documents in each row."""

    records: list[Row]
    model: PreTrainedModel
    slots: list[list[int]]


@dataclass(frozen=True)
class Runs:
    """The records of both, a step each, our stage's folder, and TRL's model."""

    ours: list[Row]
    theirs: list[Row]
    folder: Path
    model: PreTrainedModel

    def pairs(self, name: str) -> list[tuple[float, float]]:
        """A metric in every step, (ours, TRL's)."""
        return [(a[name], b[name]) for a, b in zip(self.ours, self.theirs, strict=True)]

    def worst(self, name: str, *, relative: bool = False) -> float:
        """The largest difference of a metric over all steps, relative to TRL's value if asked for."""
        return max(abs(a - b) / (abs(b) if relative else 1) for a, b in self.pairs(name))


class WeightedTrainer(SFTTrainer):
    """TRL, but accuracy and entropy of a step are means over its tokens.

    TRL's own are means of the microbatches' means, in which a token counts more where there are few.
    """

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._metrics["train"]["learned"].append(int((inputs["labels"][:, 1:] != -100).sum()))
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        metrics = self._metrics["train"]
        weights = metrics.pop("learned", [])
        for name in ("entropy", "mean_token_accuracy"):
            if weights:
                metrics[name] = [
                    sum(v * w for v, w in zip(metrics[name], weights, strict=True)) / sum(weights)
                ]
        super().log(logs, start_time)


def by_trl(model: Path, rows: list[Row], out: Path, *, threads: int = 1, **settings: Any) -> Reference:
    """The run by TRL, rows in order. A tiny model is slower on more threads."""
    options: dict[str, Any] = {"optim": "adamw_torch", "bf16": False, "use_cpu": True, "disable_tqdm": True}
    options |= {"report_to": "none", "train_sampling_strategy": "sequential", "dataloader_pin_memory": False}
    trainer: Any = WeightedTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        SFTConfig(str(out), **options, **SETTINGS, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    trainer.train()
    torch.set_num_threads(before)
    examples = trainer.train_dataset
    packed = "seq_lengths" in examples.column_names
    slots = list(examples["seq_lengths"]) if packed else [[len(ids)] for ids in examples["input_ids"]]
    return Reference([r for r in trainer.state.log_history if "loss" in r], trainer.model.eval(), slots)


def write_config(model: Path, rows: list[Row], out: Path, dtype: str = "float32", **settings: Any) -> Path:
    """A config file for the run by ntjax, rows in order."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task_name": "compared",
        "base_output_dir": str(out),
        "use_tensorboard": False,
        "model": {"model_name_or_path": str(model), "dtype": dtype},
        "datasets": {"sft": {"dataset_path": "rows.jsonl", "shuffle": False}},
        "stages": [{"stage_type": "sft", **SETTINGS, **settings}],
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
    return config.parent / "compared" / "latest" / "sft_stage"


def here(config: Path) -> Path:
    """The stage folder of a run in this process, on all its devices."""
    loaded = load_config(config)
    folder = config.parent / "sft_stage"
    job = Job(loaded, loaded.stages[0], Path(loaded.model.model_name_or_path), folder)
    train(prepare(job), StopRequest())
    return folder


def compared(reference: Reference, folder: Path) -> Runs:
    """The run by TRL beside ours."""
    return Runs(read_metrics(folder), reference.records, folder, reference.model)
