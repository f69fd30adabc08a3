"""The loss of supervised fine-tuning and of pretraining. Axes: B rows, T time."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from ntjax.metrics import Mean, Metrics
from ntjax.ops.logprobs import TokenLogprobs


def nll(scores: TokenLogprobs, mask: jax.Array) -> Metrics:
    """Mean negative log-likelihood (nats) of the tokens where `mask` [B, T] is true, with TRL's SFT metrics."""
    chex.assert_equal_shape([scores.logp, mask])
    learned = mask.astype(jnp.float32)
    count = learned.sum()
    return {
        "loss": Mean(-(scores.logp * learned).sum(), count),
        "entropy": Mean((scores.entropy * learned).sum(), count),
        "mean_token_accuracy": Mean((scores.correct * learned).sum(), count),
    }
