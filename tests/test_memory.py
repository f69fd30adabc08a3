"""What a compiled step holds at once: never the logits of a whole batch, never the dequantised weights of all layers.

Nothing runs: a step is compiled for shapes at which what must not be there is larger than all else.
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from ntjax import lora, weights
from ntjax.config import LoraConfig
from ntjax.losses.nll import nll
from ntjax.models import Model, build
from ntjax.ops.attention import Tokens
from ntjax.ops.logprobs import PIECES, Likelihood
from ntjax.optim import direction
from ntjax.params import Params
from ntjax.quantised import BLOCK, FourBit
from ntjax.stages import dpo, pretrain, reward, sft
from ntjax.stages.base import StageConfig
from ntjax.step import Batch, Loss, initial_state, train_step, union
from ntjax.weights import einsum

VOCAB, ROWS, TIME, PAIRS = 32_000, 8, 1024, 2
LOGITS = ROWS * TIME * VOCAB
HF: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
FLOATS = r"\b(?:f32|bf16|f16|f64)"


def largest(compiled: Any, kinds: str = r"\b\w+") -> int:
    """Numbers in the largest array that a compiled function forms, of all that its program names."""
    shapes = re.findall(kinds + r"\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def abstract(model: Model) -> Params:
    return {path: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for path, spec in model.specs.items()}


def rows(*lead: int, time: int = TIME) -> Batch:
    """What every stage's batch has."""
    kinds = {"tokens": jnp.int32, "mask": jnp.bool_, "segments": jnp.int32, "positions": jnp.int32}
    return {name: jax.ShapeDtypeStruct((*lead, time), kind) for name, kind in kinds.items()}


def paired(**more: jax.ShapeDtypeStruct) -> Batch:
    """Slots of two rows, with as many rows in all as `rows` has, and two pairs each."""
    slots = ROWS // 2
    pairs = {"pairs": jax.ShapeDtypeStruct((1, slots, PAIRS), jnp.bool_)}
    return {**rows(1, slots, 2), **pairs, **more}


def step(stage: StageConfig, model: Model, loss: Loss, batch: Batch) -> Any:
    """The compiled train step of a model that is trained whole."""
    optimizer = direction(stage, model.specs)
    state = jax.eval_shape(lambda params: initial_state(params, optimizer), abstract(model))
    made = train_step(loss, optimizer, lambda _: jnp.float32(1e-3), 1.0, union)
    return jax.jit(made, donate_argnums=0).lower(state, {}, batch).compile()


LOGPS = jax.ShapeDtypeStruct((1, ROWS // 2, 2, PAIRS), jnp.float32)
STAGES: dict[str, tuple[StageConfig, Batch]] = {
    "sft": (sft.Options(stage_type="sft"), rows(1, ROWS)),
    "pretrain": (pretrain.Options(stage_type="pretrain"), rows(2, ROWS)),  # two microbatches
    "dpo": (dpo.Options(stage_type="dpo", use_weighting=True), paired(ref_logps=LOGPS)),
    "reward": (reward.Options(stage_type="reward"), paired()),
}


@pytest.mark.parametrize("name", STAGES)
def test_no_step_forms_the_logits_of_a_batch(name: str) -> None:
    """No array is larger than a chunk of them: forward, backward, or in the optimizer."""
    stage, batch = STAGES[name]
    model = build(HF, labels=int(stage.scores))
    compiled = step(stage, model, stage.loss(model), batch)
    assert largest(compiled) <= LOGITS // PIECES
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * LOGITS


def test_a_reference_is_scored_without_the_logits_of_a_batch() -> None:
    model, batch = build(HF), {name: x.update(shape=x.shape[1:]) for name, x in paired().items()}
    score = dpo.Options(stage_type="dpo").reference_scores(model)
    compiled = jax.jit(score).lower(abstract(model), batch).compile()
    assert largest(compiled) <= LOGITS // PIECES
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * LOGITS


def test_a_loss_on_whole_logits_would_be_seen() -> None:
    stage, model = sft.Options(stage_type="sft"), build(HF)

    def naive(params: Params, batch: Batch) -> Any:
        hidden = model.hidden(params, batch["tokens"], Tokens(batch["positions"], batch["segments"]))
        logp = jax.nn.log_softmax(einsum("BTD,VD->BTV", hidden, model.head(params)))
        picked = jnp.take_along_axis(logp, batch["tokens"][..., None], axis=-1)[..., 0]
        return nll(Likelihood(picked.sum(), picked.sum(), picked.sum()), batch["mask"])

    compiled = step(stage, model, naive, rows(1, ROWS))
    assert largest(compiled) >= LOGITS
    assert compiled.memory_analysis().temp_size_in_bytes >= 4 * LOGITS


LAYERS, WIDE = 6, 64
QUANTISED = HF | {
    "vocab_size": 64,
    "hidden_size": WIDE,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
STACK = LAYERS * WIDE * WIDE  # numbers in one weight of all layers


def four_bit(shape: tuple[int, ...]) -> FourBit:
    """A stack of weights [layers, *matrix] in 4 bits, doubly quantised."""
    blocks = math.prod(shape[1:]) // BLOCK
    leaves = [((blocks, 32), jnp.uint8), ((blocks,), jnp.uint8), ((1,), jnp.float32), ((), jnp.float32)]
    made = [jax.ShapeDtypeStruct((shape[0], *rest), kind) for rest, kind in leaves]
    return FourBit(*made, matrix=shape[1:], kind="nf4")


def qlora_step(time: int = 16) -> Any:
    """The compiled step of LoRA on weights in 4 bits; activations are kept, not formed again."""
    model, stage = build(QUANTISED), sft.Options(stage_type="sft")
    plan = lora.plan(LoraConfig(r=2, target_modules="all-linear"), model.specs)
    frozen = {path: four_bit(x.shape) if path in plan.ranks else x for path, x in abstract(model).items()}
    trained = plan.specs(model.specs)
    trainable = {path: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for path, spec in trained.items()}
    optimizer = direction(stage, trained)
    state = jax.eval_shape(lambda params: initial_state(params, optimizer), trainable)
    made = train_step(stage.loss(model), optimizer, lambda _: jnp.float32(1e-3), 1.0, plan.join)
    return jax.jit(made, donate_argnums=0).lower(state, frozen, rows(1, 1, time=time)).compile()


def test_dequantised_weights_are_there_for_a_layer_at_a_time() -> None:
    """Neither in the forward pass nor kept for the backward pass."""
    assert largest(qlora_step(), FLOATS) < STACK


def test_dequantised_weights_kept_for_the_backward_pass_would_be_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights.jax, "checkpoint", lambda function, **options: function)
    assert largest(qlora_step(), FLOATS) >= STACK
