"""transformers' models in torch as contestants: the step alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from harness import Absent


def step(
    folder: Path, ids: np.ndarray, *, lora: bool = False, dtype: str = "float32", compiled: bool = False
) -> Callable[[], float]:
    """A function that takes one step on `ids` [rows, length] and returns its loss.

    `lora` is PEFT's; a `dtype` is what all is held in, or "autocast": computed in bf16 from fp32 weights; `compiled` is
    torch.compile.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if compiled and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise Absent("torch.compile finds no C++ compiler")
    held_in = torch.float32 if dtype == "autocast" else getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=held_in).train()
    if lora:
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, settings)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)
    tokens = torch.tensor(ids, dtype=torch.long)
    call = torch.compile(model) if compiled else model

    def run() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            loss = call(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run
