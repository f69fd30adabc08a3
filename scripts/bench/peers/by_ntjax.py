"""ntjax as a contestant: the step alone, and a stage as `python -m ntjax.train` runs it."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peers.clock import Clock

Json = dict[str, Any]


def step(folder: Path, ids: np.ndarray, dtype: str = "float32", **model_settings: Any) -> Callable[[], float]:
    """A function that takes one step on `ids` [rows, length], every token learned, and returns its loss."""
    import jax

    from ntjax.config import ModelConfig
    from ntjax.hf.files import read_config
    from ntjax.models import build
    from ntjax.optim import direction, schedule
    from ntjax.policy import adapters, load_policy
    from ntjax.stages.sft import Options
    from ntjax.step import initial_state, train_step

    stage = Options(stage_type="sft", learning_rate=1e-5, lr_scheduler_type="constant")
    settings = ModelConfig(model_name_or_path=str(folder), dtype=dtype, **model_settings)
    model = build(read_config(folder), dtype=dtype, attention=settings.attention)
    plan, _ = adapters(settings, model.specs, None)
    policy = load_policy(folder, model, settings, plan=plan)
    optimizer = direction(stage, policy.specs)
    state = initial_state(policy.trainable, optimizer)
    take = train_step(stage.loss(model), optimizer, schedule(stage, 1000), 1.0, policy.join)
    compiled = jax.jit(take, donate_argnums=0)
    mask = np.ones(ids.shape, bool)
    mask[:, 0] = False
    batch = {
        "tokens": ids[None],
        "mask": mask[None],
        "segments": np.ones((1, *ids.shape), np.int32),
        "positions": np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), (1, *ids.shape)),
    }

    def run() -> float:
        nonlocal state
        state, metrics = compiled(state, policy.frozen, batch)
        return float(metrics["loss"].total / metrics["loss"].weight)

    return run


def lora_step(folder: Path, ids: np.ndarray, **model_settings: Any) -> Callable[[], float]:
    """The same with adapters of rank 16 on every linear map inside the layers."""
    from ntjax.config import LoraConfig

    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    return step(folder, ids, use_lora=True, lora_config=lora, **model_settings)


def qlora_step(folder: Path, ids: np.ndarray) -> Callable[[], float]:
    """The same on 4-bit weights."""
    from ntjax.config import BnbConfig

    return lora_step(folder, ids, load_in_4bit=True, bnb_config=BnbConfig(use_double_quant=True))


class Listener(logging.Handler):
    """Told of every step's metrics, as train.log is, it marks the clock."""

    def __init__(self, clock: Clock):
        super().__init__(logging.DEBUG)
        self.clock = clock

    def emit(self, record: logging.LogRecord) -> None:
        """Marks, if it is metrics that are logged."""
        match record.args:
            case (_, {"loss": loss, "num_tokens": tokens}):
                self.clock.mark(loss, tokens)


def stage(clock: Clock, folder: Path, kind: str, rows: Sequence[Json], **settings: Any) -> None:
    """Trains a stage in fp32 on the rows in their order."""
    from ntjax.train import main

    with tempfile.TemporaryDirectory() as out:
        (Path(out) / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = {
            "task_name": "bench",
            "base_output_dir": out,
            "use_tensorboard": False,
            "compile_cache": "none",
            "model": {"model_name_or_path": str(folder.resolve()), "dtype": "float32"},
            "datasets": {kind: {"dataset_path": "rows.jsonl", "shuffle": False}},
            "stages": [{"stage_type": kind, "logging_steps": 1, "save_strategy": "no", **settings}],
        }
        (Path(out) / "config.json").write_text(json.dumps(config))
        logging.getLogger("ntjax.loop").addHandler(Listener(clock))
        main(["--config", str(Path(out) / "config.json")])
