"""Every setting outside the stages: the run, the model, the data sets, the mesh."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntjax.config import remat
from ntjax.config.settings import Table, place_of, setting

if TYPE_CHECKING:
    from ntjax.stages.base import StageConfig

DTYPE_WORDS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"} | {
    f"torch.{name}": name for name in ("float32", "bfloat16", "float16")
}

MESH_AXES = ("data", "fsdp", "tensor", "sequence")
WEIGHT_AXES = ("embed", "vocab", "heads", "kv_heads", "head_dim", "mlp", "layers", "rank")

_OTHER_LORA = "this variant of LoRA is not among those ntjax trains"


@dataclass(frozen=True)
class LoraConfig(Table):
    """`[model.lora_config]`, under PEFT's names and with PEFT's defaults."""

    r: int = setting(8, at_least=1, aliases=("lora_r",))
    lora_alpha: float = setting(8.0, above=0)
    lora_dropout: float = setting(0.0, at_least=0, at_most=0.99)
    target_modules: str | tuple[str, ...] | None = setting(None, aliases=("lora_target_modules",))
    exclude_modules: str | tuple[str, ...] | None = setting(None)
    modules_to_save: tuple[str, ...] | None = setting(None)
    bias: str = setting("none", choices=("none", "all", "lora_only"))
    task_type: str | None = setting(None, choices=("CAUSAL_LM", "SEQ_CLS"))
    use_rslora: bool = setting(False)
    use_dora: bool = setting(False)
    init_lora_weights: bool | str = setting(True)
    layers_to_transform: tuple[int, ...] | None = setting(None)
    rank_pattern: dict[str, int] = setting({}, at_least=1)
    alpha_pattern: dict[str, float] = setting({}, above=0)

    absent = {
        "eva_config": _OTHER_LORA,
        "corda_config": _OTHER_LORA,
        "loftq_config": _OTHER_LORA,
        "use_qalora": _OTHER_LORA,
        "layer_replication": _OTHER_LORA,
        "trainable_token_indices": _OTHER_LORA,
        "layers_pattern": "layers are stacked, and layers_to_transform counts them",
        "megatron_*": "there is no Megatron in ntjax",
        "fan_in_fan_out": "the layout of a weight is known from its declaration",
        "inference_mode": "whether a model is trained is the command's business",
    }

    def conflicts(self) -> Iterator[tuple[str, str]]:
        word = self.init_lora_weights
        if isinstance(word, str) and not re.fullmatch(r"gaussian|pissa(_niter_[1-9]\d*)?", word):
            yield "init_lora_weights", 'allowed are true, false, "gaussian", "pissa", "pissa_niter_16"'


@dataclass(frozen=True)
class BnbConfig(Table):
    """`[model.bnb_config]`: how frozen weights are quantised, in bitsandbytes' words."""

    quant_type: str = setting("nf4", choices=("nf4", "fp4"), aliases=("bnb_4bit_quant_type",))
    use_double_quant: bool = setting(False, aliases=("bnb_4bit_use_double_quant", "use_bnb_nested_quant"))
    compute_dtype: str | None = setting(
        None, choices=("float32", "bfloat16"), synonyms=DTYPE_WORDS, aliases=("bnb_4bit_compute_dtype",)
    )


@dataclass(frozen=True)
class ModelConfig(Table):
    """`[model]`. Trainable weights are held in `param_dtype` and computed with in `dtype`."""

    model_name_or_path: str = setting()
    model_type: str = setting("llm", choices=("llm", "vlm"))
    model_revision: str | None = setting(None, aliases=("revision",), later="a choice of hub revision")
    dtype: str = setting(
        "float32",
        choices=("float32", "bfloat16", "float16", "auto"),
        synonyms=DTYPE_WORDS,
        aliases=("torch_dtype",),
        later={"float16": "float16 with loss scaling", "auto": "taking the dtype from the checkpoint"},
    )
    param_dtype: str = setting("float32", choices=("float32", "bfloat16"), synonyms=DTYPE_WORDS)
    use_lora: bool = setting(False, aliases=("use_peft",))
    lora_config: LoraConfig = setting(LoraConfig())
    load_in_4bit: bool = setting(False)
    load_in_8bit: bool = setting(False)
    bnb_config: BnbConfig = setting(BnbConfig())
    gradient_checkpointing: bool = setting(False)
    remat: str | tuple[str, ...] = setting("auto")
    use_flash_attention: bool = setting(False)
    attention: str = setting("auto", choices=("auto", "xla", "blocked", "cudnn", "splash"))
    image_max_pixels: int | None = setting(None, at_least=1)
    image_min_pixels: int | None = setting(None, at_least=1)
    cache_dir: str | None = setting(None)
    device: str = setting("auto", choices=("auto", "cpu", "gpu", "tpu"), synonyms={"cuda": "gpu"})
    trust_remote_code: bool = setting(False)

    merged = "model_kwargs"
    absent = {
        "attn_implementation": "attention names the kernel",
        "device_map": "the mesh places the weights",
        "max_memory": "the mesh places the weights",
        "use_cache": "training keeps no key-value cache",
        "lora_*": "write PEFT's name for it in [model.lora_config]",
        "bnb_4bit_quant_storage": "codes are stored as they are",
        "quantization_config": "write load_in_4bit and [model.bnb_config]",
    }
    inherent = {"low_cpu_mem_usage": True, "use_safetensors": True}

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> ModelConfig:
        """The settings that `dataclasses.asdict` made plain, out of JSON."""
        tables = {"lora_config": LoraConfig, "bnb_config": BnbConfig}
        plain = {
            key: tables[key](**_tuples(value)) if key in tables else value for key, value in saved.items()
        }
        return cls(**plain)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from remat.conflicts(self.remat, self.gradient_checkpointing or None)
        for name in ("image_max_pixels", "image_min_pixels"):
            if getattr(self, name) is not None and self.model_type != "vlm":
                yield name, 'only model_type = "vlm" has a use for it'
        if self.load_in_4bit and self.load_in_8bit:
            yield "load_in_8bit", "weights are held in 4 bits or in 8, not in both"
        for name in ("load_in_4bit", "load_in_8bit"):
            if getattr(self, name) and not self.use_lora:
                yield name, "quantised weights are frozen, and nothing would be trained; set use_lora = true"
        pissa = str(self.lora_config.init_lora_weights).startswith("pissa")
        if self.use_lora and pissa and (self.load_in_4bit or self.load_in_8bit):
            yield (
                "lora_config",
                "PiSSA takes the adapter out of the weights, which can't be quantised before that",
            )
        if self.use_flash_attention and self.attention == "xla":
            yield "use_flash_attention", 'attention = "xla" holds whole scores; leave one of the two out'


def _tuples(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}


@dataclass(frozen=True)
class DatasetConfig(Table):
    """`[datasets.NAME]`: where rows come from, and which columns mean what where names don't tell."""

    dataset_name: str | None = setting(None)
    dataset_path: str | None = setting(None)
    dataset_split: str | None = setting(None, aliases=("split",))
    eval_dataset_path: str | None = setting(None)
    eval_split: str | None = setting(None)
    eval_num_samples: int | None = setting(None, at_least=1)
    validation_split_ratio: float | None = setting(None, above=0, at_most=0.5, aliases=("val_size",))
    text_field: str | None = setting(None, aliases=("dataset_text_field",))
    messages_field: str | None = setting(None)
    prompt_field: str | None = setting(None)
    response_field: str | None = setting(None, aliases=("completion_field",))
    chosen_field: str | None = setting(None)
    rejected_field: str | None = setting(None)
    image_field: str | None = setting(None)
    txt_delimiter: str | None = setting(None)
    txt_field_names: tuple[str, ...] | None = setting(None)
    train_on_prompt: bool = setting(False)
    max_length: int | None = setting(None, at_least=2, aliases=("max_seq_length",))
    num_samples: int | None = setting(None, at_least=1, aliases=("max_samples",))
    max_bad_rows: int = setting(0, at_least=0)
    shuffle: bool = setting(True)
    streaming: bool = setting(False)
    formatting_func: str | None = setting(None)
    preprocessing_num_workers: int | None = setting(None, at_least=1, aliases=("dataset_num_proc",))
    dataset_kwargs: dict[str, Any] = setting({})

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if (self.dataset_name is None) == (self.dataset_path is None):
            yield "dataset_path", "a data set needs either dataset_path (files) or dataset_name (hub)"
        sources = [self.eval_dataset_path, self.eval_split, self.validation_split_ratio]
        if sum(source is not None for source in sources) > 1:
            yield (
                "eval_split",
                "evaluation rows come from eval_dataset_path, eval_split or validation_split_ratio",
            )
        if self.eval_num_samples is not None and not self.has_eval:
            yield "eval_num_samples", "there are no evaluation rows to choose from; give eval_split as well"
        if self.streaming and (self.num_samples is not None or self.validation_split_ratio is not None):
            name = "num_samples" if self.num_samples is not None else "validation_split_ratio"
            yield name, "a streamed data set is not counted beforehand; max_steps ends the stage"
        if self.dataset_kwargs.get("trust_remote_code"):
            yield "dataset_kwargs", "trust_remote_code is not passed on: nothing remote is ever run"

    @property
    def has_eval(self) -> bool:
        """Whether there are rows to evaluate on."""
        return any(
            s is not None for s in (self.eval_dataset_path, self.eval_split, self.validation_split_ratio)
        )


@dataclass(frozen=True)
class MeshConfig(Table):
    """`[mesh]`: devices along each axis, -1 for the rest; `zero_stage` is the short form (0 to 3).

    It says what the devices along `fsdp` share out, and puts all of them there if no axis is named. `rules` change
    which axis of a weight is split over which of these; `dcn_data` and `dcn_fsdp` say over how many slices of a pod
    these two go.
    """

    data: int | None = setting(None, at_least=-1)
    fsdp: int | None = setting(None, at_least=-1)
    tensor: int | None = setting(None, at_least=-1)
    sequence: int | None = setting(None, at_least=-1)
    zero_stage: int | None = setting(None, at_least=0, at_most=3)
    rules: dict[str, str] = setting({})
    dcn_data: int = setting(1, at_least=1)
    dcn_fsdp: int = setting(1, at_least=1)
    offload_optimizer: bool = setting(False)
    offload_param: bool = setting(False)

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis; the rest is along `fsdp` if it is to share something out, else along `data`."""
        given = {name: size for name in MESH_AXES if (size := getattr(self, name)) is not None}
        if -1 in given.values():
            return given
        rest = "fsdp" if (self.zero_stage or self.offload_param) and self.fsdp is None else "data"
        return given if rest in given else {**given, rest: -1}

    @property
    def zero(self) -> int:
        """The ZeRO stage: 3 where weights are offloaded or devices put along `fsdp`, and none is named."""
        if self.zero_stage is not None:
            return self.zero_stage
        return 0 if self.fsdp in (None, 1) and not self.offload_param else 3

    def conflicts(self) -> Iterator[tuple[str, str]]:
        sizes = {name: getattr(self, name) for name in MESH_AXES}
        for name, axis in self.rules.items():
            if name not in WEIGHT_AXES:
                yield "rules", f"weights have no axis {name}; they have {', '.join(WEIGHT_AXES)}"
            if axis not in ("fsdp", "tensor", "none"):
                yield "rules", f'{name} = "{axis}": allowed are "fsdp", "tensor" and "none"'
        if self.zero_stage == 0 and self.fsdp not in (None, 1):
            yield (
                "zero_stage",
                "0 shares nothing out, which is what fsdp is for; put these devices along data",
            )
        if self.offload_param and self.zero < 3:
            yield "offload_param", f"weights are offloaded in ZeRO stage 3, and zero_stage is {self.zero}"
        for name, size in sizes.items():
            if size == 0:
                yield name, "an axis has at least one device, or -1 for the rest"
        rest = [name for name, size in sizes.items() if size == -1]
        if len(rest) > 1:
            yield rest[1], f"only one axis can be -1 (the rest), and {rest[0]} is"


@dataclass(frozen=True)
class TimeoutsConfig(Table):
    """`[timeouts]`, in seconds, of runs of several processes: `start` is for all to come, and a process that sends no
    sign of life for `heartbeat` is given up; the others say how long a phase may take until it counts as hung."""

    start: float = setting(300.0, at_least=1)
    heartbeat: float = setting(100.0, at_least=1)
    restore: float = setting(3600.0, above=0)
    compile: float = setting(3600.0, above=0)
    step: float = setting(900.0, above=0)
    rollout: float = setting(3600.0, above=0)
    eval: float = setting(3600.0, above=0)
    save: float = setting(3600.0, above=0)


@dataclass(frozen=True)
class Config(Table):
    """A whole run, resolved and checked. `where` gives the place in the file that a setting came from."""

    model: ModelConfig = setting()
    datasets: dict[str, DatasetConfig] = setting()
    stages: tuple[StageConfig, ...] = setting()
    mesh: MeshConfig = setting(MeshConfig())
    timeouts: TimeoutsConfig = setting(TimeoutsConfig())
    compile_cache: str = setting("auto")
    task_name: str = setting("run")
    seed: int = setting(42, at_least=0, at_most=2**32 - 1)
    base_output_dir: str | None = setting(None)
    use_wandb: bool = setting(False)
    wandb_project: str | None = setting(None)
    wandb_entity: str | None = setting(None)
    use_trackio: bool = setting(False)
    use_tensorboard: bool = setting(True)
    logging_dir: str | None = setting(None)
    resume_from_checkpoint: str | None = setting(None)
    ignore_data_skip: bool = setting(False, later="resuming without the data position")
    deepspeed: str | dict[str, Any] | None = setting(None)

    path: Path = field(default=Path("run.toml"), compare=False)
    places: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    warnings: tuple[str, ...] = field(default=(), compare=False)

    def where(self, key: str) -> str:
        """The place of a setting like "stages.0.learning_rate" ("run.toml:12"), or of the table around it."""
        return place_of(key, self.places, str(self.path))

    def compute_dtype(self, stage: StageConfig) -> str:
        """What a stage computes in: "bfloat16" where it says bf16, else the model's dtype."""
        return "bfloat16" if stage.bf16 else self.model.dtype

    def reference_dtype(self, stage: StageConfig) -> str:
        """What a reference's matrices are held in: that which they are multiplied in, but the policy's own where it
        follows in small steps, which bf16 would round away."""
        moves = getattr(stage, "sync_ref_model", False)
        return self.model.param_dtype if moves else self.compute_dtype(stage)
