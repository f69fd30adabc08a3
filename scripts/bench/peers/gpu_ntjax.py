"""ntjax as a contestant on one accelerator, its weights random: steps as `ntjax.trainer` takes them, without its data.

It gets by without what only the data pipeline needs (grain, datasets).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import timed

Json = dict[str, Any]
RANK = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
SETTINGS = {"learning_rate": 1e-5, "lr_scheduler_type": "constant"}


def sft(
    hf: Json,
    rows: int,
    length: int,
    steps: int,
    *,
    lora: bool = False,
    four: bool = False,
    remat: bool = False,
    trace: Path | None = None,
) -> Json:
    """Full fine-tuning in bf16 on fp32 weights, or LoRA on weights in bf16 or in 4 bits."""
    from ntjax.stages.sft import Options

    stage = Options(stage_type="sft", **SETTINGS)
    trained = Trained(hf, stage, lora=lora, four=four, remat="full" if remat else "none")
    batch = trained.placed(_rows(hf, (rows, length)))
    return _measured(lambda: trained.step(batch), steps, rows * length, trace)


def dpo(hf: Json, rows: int, length: int, steps: int, *, trace: Path | None = None) -> Json:
    """Pairs of which the second half is learned; the reference scores them before each step."""
    import jax

    from ntjax.policy import reference
    from ntjax.stages.dpo import Options

    stage = Options(stage_type="dpo", **SETTINGS)
    trained = Trained(hf, stage)
    before = reference(trained.policy, continued=False, compute="bfloat16")
    score = stage.reference_scores(trained.model)
    assert score is not None
    scores = jax.jit(lambda params, batch: jax.lax.map(partial(score, params), batch))
    batch = _rows(hf, (rows, 2, length))
    batch["mask"][..., : length // 2] = False
    placed = trained.placed({**batch, "pairs": np.ones((1, rows, 1), bool)})

    def step() -> float:
        return trained.step({**placed, **scores(before, placed)})

    return _measured(step, steps, rows * 2 * length, trace)


def grpo(
    hf: Json,
    prompts: int,
    group: int,
    asked: int,
    new: int,
    micro: int,
    steps: int,
    *,
    trace: Path | None = None,
) -> Json:
    """`group` completions of `new` tokens of each prompt are drawn and trained on, `micro` at a time."""
    from ntjax.data.prompts import Prompt
    from ntjax.sampler import Sampler, Sampling
    from ntjax.stages.grpo import Options

    stage = Options(stage_type="grpo", max_completion_length=new, num_generations=group, **SETTINGS)
    trained = Trained(hf, stage)
    drawn = np.random.default_rng(0)
    given = [Prompt(drawn.integers(10, hf["vocab_size"], asked).tolist()) for _ in range(prompts)]
    count, asking = prompts * group, np.repeat([one.tokens for one in given], group, axis=0)
    sampler = Sampler(trained.model, Sampling(new), slots=count)
    whole = np.ones((count, asked + new), np.int32)
    fixed = {
        "segments": whole,
        "positions": whole.cumsum(1, dtype=np.int32) - 1,
        "start": np.full(count, asked, np.int32),
        "mask": np.ones((count, new), bool),
        "advantages": np.tile(np.linspace(-1, 1, group, dtype=np.float32), prompts),
    }

    def step() -> float:
        params = trained.policy.join(trained.frozen, trained.state.params, None)
        completions = sampler(params, given, group=group, seed=int(trained.state.step))
        tokens = np.concatenate([asking, [one.tokens for one in completions]], axis=1, dtype=np.int32)
        logps = np.array([one.logprobs for one in completions], np.float32)
        window = {**fixed, "tokens": tokens, "sampler_logps": logps}
        batch = {name: array.reshape(-1, micro, *array.shape[1:]) for name, array in window.items()}
        return trained.step(trained.placed(batch))

    return _measured(step, steps, count * new, trace)


class Trained:
    """A stage's policy of random weights, and its step, compiled."""

    def __init__(self, hf: Json, stage: Any, *, lora: bool = False, four: bool = False, remat: str = "none"):
        import jax

        from ntjax.config import BnbConfig, LoraConfig, ModelConfig
        from ntjax.models import build
        from ntjax.optim import direction, schedule
        from ntjax.step import initial_state, train_step

        adapters = {"use_lora": True, "lora_config": LoraConfig(**RANK)} if lora else {}
        bits = {"load_in_4bit": True, "bnb_config": BnbConfig(use_double_quant=True)} if four else {}
        settings = ModelConfig("random", dtype="bfloat16", **adapters, **bits)
        self.model = build(hf, dtype="bfloat16", attention="auto", remat=remat)
        self.policy = _policy(self.model, settings)
        optimizer = direction(stage, self.policy.specs)
        # All of it in its place from the start: else the second step would be compiled anew.
        self.state = self.placed(initial_state(self.policy.trainable, optimizer))
        self.frozen = self.placed(self.policy.frozen)
        take = train_step(
            stage.loss(self.model), optimizer, schedule(stage, 1000), stage.max_grad_norm, self.policy.join
        )
        self._step = jax.jit(take, donate_argnums=0)

    def placed(self, arrays: Any) -> Any:
        """Arrays on the device."""
        import jax

        return jax.device_put(arrays, jax.local_devices()[0])

    def step(self, batch: Any) -> float:
        """Takes a step, waits for it and returns its loss."""
        self.state, metrics = self._step(self.state, self.frozen, batch)
        return float(metrics["loss"].total / metrics["loss"].weight)


def _policy(model: Any, settings: Any) -> Any:
    """As `ntjax.policy.load_policy` makes it of a folder. In 4 bits the layers of a stack are the same."""
    import jax
    import jax.numpy as jnp

    from ntjax.params import initial
    from ntjax.policy import Policy, adapters, quantiser

    plan, _ = adapters(settings, model.specs, None)
    quantise = quantiser(settings, model.specs) or (lambda path, tensor: None)
    dtype = jnp.dtype(settings.dtype if settings.use_lora else settings.param_dtype)
    held = {}
    for number, (path, spec) in enumerate(model.specs.items()):
        key, stack = jax.random.key(number), spec.shape[: len(spec.stacked)]
        layer = spec.shape[len(stack) :]
        node = quantise(path, np.random.default_rng(number).normal(0, 0.02, layer).astype(np.float32))
        draw: Callable[..., Any] = jax.jit(partial(initial, {path: spec}, dtype=dtype))
        held[path] = (
            draw(key)[path]
            if node is None
            else jax.tree.map(lambda x, stack=stack: jnp.array(np.broadcast_to(x, (*stack, *x.shape))), node)
        )
    if plan is None:
        return Policy(held, {}, model.specs)
    base, trainable = plan.initial(held, model.specs, jax.random.key(1), jnp.dtype(settings.param_dtype))
    return Policy(trainable, base, plan.specs(model.specs), plan)


def _rows(hf: Json, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """One microbatch of random tokens, all learned but a row's first."""
    tokens = np.random.default_rng(0).integers(10, hf["vocab_size"], (1, *shape), np.int32)
    mask = np.ones(tokens.shape, bool)
    mask[..., 0] = False
    positions = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), tokens.shape)
    return {"tokens": tokens, "mask": mask, "segments": np.ones_like(tokens), "positions": positions}


def _measured(step: Callable[[], float], steps: int, tokens: int, trace: Path | None) -> Json:
    """With the device's peak of memory, where it keeps count; with `trace`, steps are traced into that folder."""
    import jax

    device = jax.local_devices()[0]
    if trace is not None:
        step()
        with jax.profiler.trace(str(trace)):
            step()
    found = timed(step, steps, tokens)
    stats = device.memory_stats() or {}
    peak = {"peak_gb": stats["peak_bytes_in_use"] / 1e9} if "peak_bytes_in_use" in stats else {}
    return {**found, **peak, "device": device.device_kind}


def longest(trace: Path, count: int = 15) -> list[tuple[str, float]]:
    """The HLO instructions of a traced step that take the most time, with their seconds."""
    import jax

    (path,) = trace.rglob("*.xplane.pb")
    spent: Counter[str] = Counter()
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                if name := dict(event.stats).get("hlo_op"):
                    spent[str(name)] += event.duration_ns / 1e9  # type: ignore[assignment]
    return spent.most_common(count)
