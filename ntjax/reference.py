"""What a stage is held against: the policy as it was before the first step, or another model.

A batch gets its scores before the step sees it, so a step holds no second model; with `precompute_ref_log_probs` every
example gets them before the first step, and the reference is let go.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np

from ntjax import hosts
from ntjax.data.pairs import EncodedPairs
from ntjax.feed import Planned
from ntjax.hf.folder import load_params
from ntjax.layout import placing
from ntjax.mesh import place_batch
from ntjax.params import Params
from ntjax.policy import Policy, reference
from ntjax.prepare import Setup
from ntjax.progress import Progress
from ntjax.step import Batch

SAVED = "reference_logps.npz"
Score = Callable[[Params, Batch], Batch]
log = logging.getLogger(__name__)


def reference_scores(setup: Setup) -> Score | None:
    """(the reference's weights, a batch) -> what the loss needs of it, or None for a stage that needs nothing."""
    model = setup.reference[0] if setup.reference else setup.model
    score = setup.job.stage.reference_scores(model)
    if score is None:
        return None
    return jax.jit(lambda params, batch: jax.lax.map(lambda micro: score(params, micro), batch))


def reference_params(setup: Setup, policy: Policy) -> Params:
    """The reference's weights: those of `reference_model_path`, else the policy's before its first step."""
    layout = setup.layout
    dtype = setup.job.config.reference_dtype(setup.job.stage)
    if setup.reference:
        model, folder = setup.reference
        return load_params(folder, model.specs, dtype=dtype, **placing(layout, model.specs))
    params = reference(policy, continued=setup.adapter is not None, dtype=dtype)
    return layout.put(params, setup.model.specs)


def with_reference(setup: Setup, policy: Policy) -> tuple[Setup, Params | None]:
    """The setup and the reference's weights, or the setup with every example's scores in it and None."""
    score = reference_scores(setup)
    if score is None:
        return setup, None
    if not getattr(setup.job.stage, "precompute_ref_log_probs", False):
        return setup, reference_params(setup, policy)
    saved = _saved(setup)
    if saved is None:
        params = reference_params(setup, policy)
        saved = [_scores(setup, data, score, params) for data in _parts(setup)]
        if jax.process_index() == 0:
            digests = np.array([data.examples.digest() for data in _parts(setup)])
            np.savez(setup.job.folder / SAVED, *saved, digests=digests)
    scored = [_with(data, part) for data, part in zip(_parts(setup), saved, strict=True)]
    return replace(setup, train=scored[0], evaluation=scored[1] if setup.evaluation else None), None


def _parts(setup: Setup) -> list[Planned]:
    return [data for data in (setup.train, setup.evaluation) if isinstance(data, Planned)]


def _with(data: Planned, logps: np.ndarray) -> Planned:
    assert isinstance(data.examples, EncodedPairs)
    return replace(data, examples=replace(data.examples, ref_logps=logps))


def _saved(setup: Setup) -> list[np.ndarray] | None:
    """What this stage computed before it was broken off, of the same rows."""
    path = setup.job.folder / SAVED
    if not setup.job.resume or not path.exists():
        return None
    with np.load(path) as file:
        parts = _parts(setup)
        if file["digests"].tolist() != [data.examples.digest() for data in parts]:
            return None
        return [file[f"arr_{i}"] for i in range(len(parts))]


def _scores(setup: Setup, data: Planned, score: Score, params: Params) -> np.ndarray:
    """The reference's log-probs of every example [examples, 2] fp32."""
    many = getattr(setup.job.stage, "precompute_ref_batch_size", None)
    many = many * setup.layout.rows if many else data.plan.rows_per_microbatch
    plan = replace(
        data.plan,
        rows_per_microbatch=many,
        accumulation=1,
        epochs=1.0,
        max_steps=-1,
        shuffle=False,
        packing=False,
        fills=False,
    )
    found = np.zeros((len(data.examples), 2), np.float32)
    feed, name = replace(data, plan=plan), f"{setup.job.stage.stage_name} reference"
    with Progress(name, plan.steps, shown=jax.process_index() == 0) as progress, feed.open() as rows:
        for step, fed in enumerate(rows):
            logps = score(params, place_batch(fed.batch, setup.layout.mesh))["ref_logps"]
            whole = hosts.whole(logps)[0, :, :, 0]
            for slot, values in zip(plan.slots(step)[0], whole, strict=True):
                found[slot] = values
            progress.update(step + 1)
    return found
