"""TRL's trainers as contestants, in fp32 on the CPU, without gradient checkpointing, else with their defaults."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset, disable_progress_bars
from peers.clock import Clock
from peers.rows import digits
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

Json = dict[str, Any]
NAMES = {"sft": "SFT", "reward": "Reward", "dpo": "DPO", "grpo": "GRPO"}
OPTIONS: Json = {
    "bf16": False,
    "use_cpu": True,
    "activation_checkpointing": False,
    "train_sampling_strategy": "sequential",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


class Listener(TrainerCallback):
    """Marks the clock after every step."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """What a step logs has its loss; what is logged at the end has not."""
        if logs and "loss" in logs:
            self.clock.mark(logs["loss"], logs["num_tokens"])


def stage(clock: Clock, folder: Path, kind: str, rows: Sequence[Json], **settings: Any) -> None:
    """Trains a stage on the rows in their order."""
    disable_progress_bars()
    given: Json = {"processing_class": AutoTokenizer.from_pretrained(folder)}
    if kind == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if kind == "dpo":
        given["ref_model"] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if kind == "grpo":
        given["reward_funcs"] = [digits]
    with tempfile.TemporaryDirectory() as out:
        trainer = getattr(trl, f"{NAMES[kind]}Trainer")(
            model=model,
            args=getattr(trl, f"{NAMES[kind]}Config")(out, **OPTIONS, **settings),
            train_dataset=Dataset.from_list(list(rows)),
            callbacks=[Listener(clock)],
            **given,
        )
        trainer.train()
