"""What a stage leaves: a Hugging Face folder, its adapter beside it, and what a checkpoint says of frozen weights."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

import safetensors.numpy

from ntjax import hosts
from ntjax.data.encode import learned_stops
from ntjax.feed import Planned
from ntjax.hf.files import replacing
from ntjax.hf.folder import save_params
from ntjax.hf.peft import save_adapter
from ntjax.hf.processor import save_words
from ntjax.hf.tokenizer import pad_id, save_generation_config
from ntjax.hosts import whole
from ntjax.params import Params
from ntjax.policy import VALUE, VALUE_FILE, Policy, is_quantised
from ntjax.prepare import Setup

log = logging.getLogger(__name__)


def export(setup: Setup, policy: Policy, trainable: Params) -> None:
    """The stage's folder becomes a Hugging Face model, in `model.dtype`; an adapter is merged, and beside it."""
    job, stage = setup.job, setup.job.stage
    dtype = job.config.model.dtype
    config = setup.model.exported(pad_id(setup.tokenizer))
    joined = policy.join(policy.frozen, trainable, None)
    params = {path: joined[path] for path in setup.model.specs}
    save_params(job.folder, params, setup.model.specs, dtype=dtype, config=config)
    if VALUE in trainable:
        head = {policy.specs[VALUE].hf: whole(trainable[VALUE])}
        with replacing(job.folder, VALUE_FILE, discard=not hosts.first()) as create:
            create(VALUE_FILE).write(safetensors.numpy.save(head))
    if hosts.first():
        save_words(setup.tokenizer, setup.vision, job.folder)
        if not stage.scores:
            save_generation_config(job.folder, job.before, setup.tokenizer, _stops(setup))
    if policy.plan is not None:
        if any(is_quantised(w) for w in policy.frozen.values()):
            log.info("%s: the adapter is merged into the dequantised weights", stage.stage_name)
        save_adapter(
            job.folder / "adapter",
            policy.plan,
            {path: trainable[path] for path in policy.plan.specs(setup.model.specs)},
            setup.model.specs,
            job.config.model.lora_config,
            job.base,
            task_type="SEQ_CLS" if stage.scores else "CAUSAL_LM",
            start=policy.start,
        )


def _stops(setup: Setup) -> list[int]:
    """The tokens that rows were learned to end with, which may be others than the tokenizer's end."""
    if not (setup.job.stage.learns_to_stop and isinstance(setup.train, Planned)):
        return []
    return learned_stops(setup.train.examples, setup.tokenizer) or []


def origin(setup: Setup) -> dict[str, Any]:
    """What a checkpoint says of the weights that aren't in it, for `export`."""
    job = setup.job
    return {
        "source": str(job.source),
        "base": job.base,
        "adapter": str(job.adapter) if job.adapter else None,
        "model": asdict(job.config.model),
        "seed": job.stage.seed,
        "scores": job.stage.scores,
        "hf": setup.model.hf,
    }
