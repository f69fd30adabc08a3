"""TRL's trainers as contestants on one GPU, on the models of `gpu_torch` and texts of random letters, a token each."""

from __future__ import annotations

import random
import tempfile
import time
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

from harness import Absent, measured
from peers.gpu_torch import DEVICE, built, peak

Json = dict[str, Any]


def dpo(hf: Json, rows: int, length: int, steps: int) -> Json:
    """Pairs that are longer than `length`, and are cut."""
    half = {"prompt": length // 2, "chosen": length, "rejected": length}
    settings = {"per_device_train_batch_size": rows, "max_length": length, "learning_rate": 1e-6}
    return _trained("DPO", hf, half, steps, rows * 2 * length, settings)


def grpo(hf: Json, prompts: int, group: int, asked: int, new: int, micro: int, steps: int) -> Json:
    """Completions that nothing ends."""
    settings = {"per_device_train_batch_size": micro, "num_generations": group, "learning_rate": 1e-6}
    settings |= {"gradient_accumulation_steps": prompts * group // micro, "max_completion_length": new}
    settings |= {"generation_kwargs": {"min_new_tokens": new}}
    return _trained("GRPO", hf, {"prompt": asked}, steps, prompts * group * new, settings)


def rewarded(completions: list[str], **_: Any) -> list[float]:
    """A reward that completions differ in."""
    return [float(len(text)) for text in completions]


def _trained(kind: str, hf: Json, lengths: dict[str, int], steps: int, tokens: int, settings: Json) -> Json:
    """`steps` of a trainer after its first; texts of so many letters."""
    if missing := [name for name in ("trl", "datasets") if not find_spec(name)]:
        raise Absent(f"{' and '.join(missing)} not installed")
    import torch
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    marks, losses = [(time.perf_counter(), time.process_time())], []

    class Marks(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                marks.append((time.perf_counter(), time.process_time()))
                losses.append(logs["loss"])

    drawn = random.Random(0)
    rows = [{name: _text(drawn, count) for name, count in lengths.items()} for _ in range(512)]
    options: Json = {"bf16": True, "use_cpu": DEVICE == "cpu", "activation_checkpointing": False}
    options |= {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    given: Json = {"model": built(hf, torch.float32), "processing_class": _letters()}
    if kind == "DPO":
        given["ref_model"] = built(hf, torch.bfloat16)
    else:
        given["reward_funcs"] = [rewarded]
    with tempfile.TemporaryDirectory() as out:
        arguments = getattr(trl, f"{kind}Config")(out, max_steps=steps + 1, **options, **settings)
        data = Dataset.from_list(rows)
        getattr(trl, f"{kind}Trainer")(
            args=arguments, train_dataset=data, callbacks=[Marks()], **given
        ).train()
    spent = [[b - a for a, b in pairwise(column)] for column in zip(*marks, strict=True)]
    seconds, cpu = (column[1:] for column in spent)
    found = measured(seconds, cpu, tokens=[tokens] * steps, first_s=spent[0][0], loss=losses[:3])
    return peak(found)


def _text(drawn: random.Random, count: int) -> str:
    return "".join(drawn.choices("abcdefghijklmnopqrstuvwxyz", k=count))


def _letters() -> Any:
    """A tokenizer for which every letter is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: n for n, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
