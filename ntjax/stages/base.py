"""The settings that all stages share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ntjax.config import remat
from ntjax.config.settings import Table, setting
from ntjax.stages.absent import ABSENT

if TYPE_CHECKING:
    from ntjax.config import DatasetConfig
    from ntjax.data.files import Rows
    from ntjax.data.loader import Examples
    from ntjax.data.pictures import Vision
    from ntjax.models import Model
    from ntjax.ops.attention import Tokens
    from ntjax.params import Params
    from ntjax.step import Batch, Loss

# Schedule -> the names that lr_scheduler_kwargs may hold for it.
SCHEDULES = {
    "linear": (),
    "cosine": ("num_cycles",),
    "constant": (),
    "constant_with_warmup": (),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps", "num_stable_steps", "min_lr_ratio", "num_cycles"),
    "cosine_warmup_with_min_lr": (),
    "reduce_lr_on_plateau": (),
    "greedy": (),
}
OPTIMIZERS = ("adamw_torch", "adafactor", "lion", "sgd", "muon", "adamw_8bit", "lion_8bit")
FIRST_MOMENTS = ("adamw_torch", "lion", "muon")  # those that keep one in floating point
OPTIMIZERS_LATER = {"adagrad": "Adagrad", "rmsprop": "RMSprop"}
# bitsandbytes' that move moments to the host's memory when a GPU's is short -> what to write instead.
PAGED = {
    "paged_adamw": "adamw_torch",
    "paged_adamw_32bit": "adamw_torch",
    "paged_adamw_8bit": "adamw_8bit",
    "paged_lion_32bit": "lion",
    "paged_lion_8bit": "lion_8bit",
}
BEST_MODEL = "choosing the best checkpoint"
# Optimizer -> settings that it has no use for.
_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
UNREAD = {"adafactor": _ADAM, "sgd": _ADAM, "lion": _ADAM[2:], "lion_8bit": _ADAM[2:]}


def still(moves: bool) -> Iterator[tuple[str, str]]:
    """Of `StageConfig.idle`, for a reference that doesn't move."""
    if not moves:
        for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            yield name, "the reference moves with sync_ref_model = true"


@dataclass(frozen=True)
class StageConfig(Table):
    """What every stage can be told. Left at None, a setting takes its value from the rest of the config."""

    stage_type: str = setting()
    stage_name: str = setting("")
    load_from: str | None = setting(None)
    output_dir: str | None = setting(None)
    merge_adapter: bool = setting(False)  # of the stage before; else it is trained on

    num_train_epochs: float = setting(3.0, above=0)
    max_steps: int = setting(-1, at_least=-1)
    per_device_train_batch_size: int = setting(4, at_least=1)
    per_device_eval_batch_size: int | None = setting(None, at_least=1)
    gradient_accumulation_steps: int = setting(1, at_least=1)

    learning_rate: float = setting(2e-5, at_least=0)
    warmup_steps: float = setting(
        100.0, at_least=0, aliases=("warmup_ratio",)
    )  # below 1: a share of all steps
    lr_scheduler_type: str = setting(
        "cosine",
        choices=tuple(SCHEDULES),
        later={
            "cosine_warmup_with_min_lr": "this schedule",
            "reduce_lr_on_plateau": "schedules that watch the loss",
            "greedy": "schedules that watch the loss",
        },
    )
    lr_scheduler_kwargs: dict[str, float] = setting({})
    learning_rates: dict[str, float] = setting({}, at_least=0)  # of parts of the model (`ntjax.parts`)
    freeze: tuple[str, ...] = setting(())
    optimizer: str = setting(
        "adamw_torch",
        choices=(*OPTIMIZERS, *PAGED, *OPTIMIZERS_LATER),
        synonyms={
            **dict.fromkeys(("adamw", "adamw_torch_fused", "adamw_hf"), "adamw_torch"),
            **{"adamw_bnb_8bit": "adamw_8bit", "lion_bnb_8bit": "lion_8bit", "lion_32bit": "lion"},
        },
        aliases=("optim",),
        later=OPTIMIZERS_LATER,
    )
    weight_decay: float = setting(0.0, at_least=0)
    adam_beta1: float = setting(0.9, at_least=0, at_most=1)
    adam_beta2: float = setting(0.999, at_least=0, at_most=1)
    adam_epsilon: float = setting(1e-8, above=0)
    mu_dtype: str | None = setting(None, choices=("float32", "bfloat16"))  # of first moments; the weights'
    max_grad_norm: float = setting(1.0, at_least=0)
    label_smoothing_factor: float = setting(0.0, at_least=0, at_most=1, later="label smoothing")
    neftune_noise_alpha: float | None = setting(None, above=0, later="NEFTune noise")

    bf16: bool | None = setting(None)
    fp16: bool = setting(False, later="float16 with loss scaling")
    gradient_checkpointing: bool | None = setting(None)
    remat: str | tuple[str, ...] = setting("auto")
    activation_offloading: bool = setting(False, later="activation offloading")
    deepspeed: str | dict[str, Any] | None = setting(None)

    pad_to_multiple_of: int | str | None = setting("auto", at_least=1, later="a choice of padded lengths")
    seed: int | None = setting(None, at_least=0, at_most=2**32 - 1)
    data_seed: int | None = setting(None, at_least=0, later="a seed for the data alone")

    logging_strategy: str = setting(
        "steps",
        choices=("no", "steps", "epoch"),
        later={"no": "other logging rhythms", "epoch": "other logging rhythms"},
    )
    logging_steps: int = setting(10, at_least=1)
    logging_first_step: bool = setting(False, later="other logging rhythms")
    do_eval: bool | None = setting(None)
    eval_strategy: str = setting("no", choices=("no", "steps", "epoch"), aliases=("evaluation_strategy",))
    eval_steps: int | None = setting(None, at_least=1)
    eval_delay: float = setting(0.0, at_least=0, later="delayed evaluation")
    eval_on_start: bool = setting(False, later="evaluation before training")
    save_strategy: str = setting(
        "steps", choices=("no", "steps", "epoch", "best"), later={"best": BEST_MODEL}
    )
    save_steps: int = setting(500, at_least=1)
    save_total_limit: int | None = setting(None, at_least=1)
    load_best_model_at_end: bool = setting(False)
    metric_for_best_model: str | None = setting(None)
    greater_is_better: bool | None = setting(None)

    scores: ClassVar[bool] = False  # whether the model gives a score instead of the next token
    likelihood: ClassVar[bool] = False  # whether the loss is a token's, and its exponential a perplexity
    rolls_out: ClassVar[bool] = False  # whether the policy draws what it is trained on
    values: ClassVar[bool] = False  # whether the policy has a head of values
    best_metric: ClassVar[str] = "loss"
    streams: ClassVar[bool] = False  # whether data may be read while it is trained on
    learns_to_stop: ClassVar[bool] = False  # whether rows should end with a stop token that is learned
    merged = "stage_kwargs"
    absent = ABSENT
    inherent = {
        "average_tokens_across_devices": True,  # losses are sums with counts
        "prediction_loss_only": True,
        "remove_unused_columns": True,
        "logging_nan_inf_filter": False,  # what isn't finite is reported as it is
        "log_on_each_node": True,
        "save_safetensors": True,
        "enable_jit_checkpoint": True,  # a stop signal saves
        "do_train": True,
    }

    @property
    def row_length(self) -> int:
        """Tokens of the longest row a batch may have."""
        raise NotImplementedError

    @property
    def packs(self) -> bool:
        """Whether several examples share a row."""
        return False

    @property
    def fills(self) -> bool:
        """Whether examples of a step share rows, each step having those it would have anyway."""
        return False

    @property
    def packs_in_order(self) -> bool:
        """Whether rows are packed in the order of the file, never in one drawn from the seed."""
        return False

    def encode(
        self,
        rows: Rows,
        tokenizer: Any,
        dataset: DatasetConfig,
        formatting_func: Callable[..., Any] | None,
        vocab: int,
        vision: Vision | None = None,
    ) -> Examples:
        """Every row as tokens, and which of them are learned; `vocab` is the number the model has, and `vision` what it
        makes of images. On the host."""
        raise NotImplementedError

    def loss(self, model: Model) -> Loss:
        """(params, batch) -> metrics, pure; `losses/` has what they are made of."""
        raise NotImplementedError

    def reference_scores(self, model: Model) -> Callable[[Params, Batch], Batch] | None:
        """(the reference's weights, a microbatch) -> arrays that the loss needs of it; None where it needs none."""
        return None

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from remat.conflicts(self.remat, self.gradient_checkpointing)
        if self.bf16 and self.fp16:
            yield "fp16", "a stage computes in bf16 or in fp16, not in both"
        if isinstance(self.pad_to_multiple_of, str) and self.pad_to_multiple_of != "auto":
            yield "pad_to_multiple_of", 'expected a whole number or "auto"'
        if self.optimizer in PAGED:
            yield (
                "optimizer",
                f"{self.optimizer} pages its state to the host's memory, which XLA does not: write "
                f"{PAGED[self.optimizer]}, and offload_optimizer = true in [mesh] keeps the state there",
            )
        if self.mu_dtype is not None and self.optimizer not in FIRST_MOMENTS:
            yield "mu_dtype", f"{self.optimizer} keeps no first moment in floating point"
        if self.max_steps == 0:
            yield "max_steps", "no steps would be taken; -1 means as many as num_train_epochs gives"
        yield from _expressions("freeze", self.freeze)
        yield from _expressions("learning_rates", self.learning_rates)
        if self.learning_rates and not self.learning_rate:
            yield "learning_rates", "they follow learning_rate in its schedule, which is 0 from the start"
        unknown = set(self.lr_scheduler_kwargs) - set(SCHEDULES[self.lr_scheduler_type])
        if unknown:
            known = ", ".join(SCHEDULES[self.lr_scheduler_type]) or "none"
            yield "lr_scheduler_kwargs", f"{self.lr_scheduler_type} has no {min(unknown)}; it takes {known}"
        if (
            self.lr_scheduler_type == "warmup_stable_decay"
            and "num_decay_steps" not in self.lr_scheduler_kwargs
        ):
            yield "lr_scheduler_kwargs", "warmup_stable_decay needs num_decay_steps"
        floors = {"min_lr", "min_lr_rate"} & set(self.lr_scheduler_kwargs)
        if self.lr_scheduler_type == "cosine_with_min_lr" and len(floors) != 1:
            yield "lr_scheduler_kwargs", "cosine_with_min_lr needs min_lr or min_lr_rate, one of them"
        end = self.lr_scheduler_kwargs.get("lr_end", 1e-7)
        if self.lr_scheduler_type == "polynomial" and self.learning_rate <= end:
            yield "learning_rate", f"polynomial decays to lr_end ({end}), which must be below it"
        if self.do_eval is False and self.eval_strategy != "no":
            yield "do_eval", f"eval_strategy = {self.eval_strategy!r} asks for evaluation"

    def idle(self) -> Iterator[tuple[str, str]]:
        """(setting, why) of settings that change nothing beside the others, whatever they say."""
        for name in UNREAD.get(self.optimizer, ()):
            yield name, f"{self.optimizer} has no use for it"
        if self.lr_scheduler_type == "constant" and self.warmup_steps > 0:
            yield "warmup_steps", 'lr_scheduler_type = "constant" has no warm-up; "constant_with_warmup" has'
        if self.save_strategy != "steps":
            yield "save_steps", f'save_strategy = "{self.save_strategy}"'
        if not self.do_eval:
            named = ["eval_steps"] if self.eval_steps != self.logging_steps else []
            for name in (*named, "metric_for_best_model", "greater_is_better"):
                yield name, "nothing is evaluated; eval_strategy says when"


def _expressions(name: str, patterns: Iterable[str]) -> Iterator[tuple[str, str]]:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            yield name, f"{pattern!r} is no regular expression: {error}"


def standing(batch: Batch) -> Tokens:
    """Where a batch's tokens stand, [rows, time] each."""
    from ntjax.ops.attention import Tokens

    time = batch["tokens"].shape[-1]
    segments, positions = (batch[name].reshape(-1, time) for name in ("segments", "positions"))
    return Tokens(positions, segments, batch["prefixes"].reshape(-1, time) if "prefixes" in batch else None)


def next_token_loss(model: Model) -> Loss:
    """Negative log-likelihood of the learned tokens, each predicted from those before it."""
    import jax.numpy as jnp

    from ntjax.losses.nll import nll
    from ntjax.models.vision.pictures import Pictures
    from ntjax.ops.attention import Tokens

    def loss(params: Any, batch: Any) -> Any:
        at = Tokens(batch["positions"], batch["segments"])
        hidden = model.hidden(params, batch["tokens"], at, Pictures.of(batch))
        # Position t predicts token t + 1; the last one predicts nothing, and no row learns its first token.
        targets, mask = (jnp.roll(batch[name], -1, axis=1) for name in ("tokens", "mask"))
        return nll(model.likelihood(params, hidden, targets, mask), mask)

    return loss
