"""The loss of supervised fine-tuning and of pretraining. Axes: B rows, T time."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ntjax.metrics import Mean, Metrics
from ntjax.ops.logprobs import Likelihood


def nll(sums: Likelihood, mask: jax.Array) -> Metrics:
    """Mean negative log-likelihood (nats) of the tokens where `mask` [B, T] is true, of which the sums are, with TRL's
    SFT metrics."""
    count = mask.sum(dtype=jnp.float32)
    return {
        "loss": Mean(-sums.logp, count),
        "entropy": Mean(sums.entropy, count),
        "mean_token_accuracy": Mean(sums.correct, count),
    }
