"""What a config may not say, and how it is told so: file and line, key, value, what is allowed, one fix."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ntjax.config import Config
from ntjax.errors import ConfigError

Load = Callable[..., Config]

# The same config in three formats; {stage} and {model} are lines to be added.
FORMATS = {
    ".toml": """\
[model]
model_name_or_path = "tiny"
{model}

[datasets.sft]
dataset_path = "rows.jsonl"

[[stages]]
stage_type = "sft"
{stage}
""",
    ".yaml": """\
model:
  model_name_or_path: tiny
  {model}

datasets:
  sft: {{dataset_path: rows.jsonl}}

stages:
- stage_type: sft
  {stage}
""",
    ".json": """\
{{
"model": {{ "model_name_or_path": "tiny",
{model}
}},
"datasets": {{
"sft": {{"dataset_path": "rows.jsonl"}}
}},
"stages": [{{
"stage_type": "sft",
{stage}
}}]
}}
""",
}


def written(suffix: str, key: str, value: str) -> str:
    quoted = f'"{key}"' if suffix == ".json" else key
    return f"{quoted}{' = ' if suffix == '.toml' else ': '}{value}"


STAGE_ERRORS = {
    "misspelt": (
        "learn_rate",
        "0.1",
        "learn_rate = 0.1: there is no such setting; did you mean learning_rate?",
    ),
    "unknown": ("frobnicate", "1", "frobnicate = 1: there is no such setting\n  fix: remove frobnicate"),
    "elsewhere": (
        "use_lora",
        "true",
        "use_lora = true: there is no such setting here; it belongs to [model]",
    ),
    "at the top": ("task_name", '"x"', "it belongs to the top level"),
    "of other stages": ("dpo_beta", "0.1", "it belongs to dpo stages"),
    "text for a number": ("learning_rate", '"fast"', 'learning_rate = "fast": expected a number'),
    "float for an int": ("save_steps", "1.0", "save_steps = 1.0: expected a whole number"),
    "number for a bool": ("packing", "1", "packing = 1: expected true or false"),
    "bool for a number": ("learning_rate", "true", "learning_rate = true: expected a number"),
    "bool for an int": ("save_steps", "true", "save_steps = true: expected a whole number"),
    "number for text": ("output_dir", "3", "output_dir = 3: expected text"),
    "list for a number": ("learning_rate", "[0.1]", "learning_rate = [0.1]: expected a number"),
    "number for a table": ("lr_scheduler_kwargs", "3", "lr_scheduler_kwargs = 3: expected a table"),
    "too small": ("per_device_train_batch_size", "0", "per_device_train_batch_size = 0: must be at least 1"),
    "negative rate": ("learning_rate", "-1.0", "learning_rate = -1.0: must be at least 0"),
    "not above": ("num_train_epochs", "0", "num_train_epochs = 0: must be above 0"),
    "too large": ("adam_beta1", "1.5", "adam_beta1 = 1.5: must be at most 1"),
    "no choice": (
        "optimizer",
        '"adamv"',
        'optimizer = "adamv": allowed are adamw_torch, adafactor, lion, sgd',
    ),
    "closest choice": ("lr_scheduler_type", '"cosin"', '\n  fix: write "cosine"'),
    "default as a fix": ("save_steps", '"often"', "\n  fix: write save_steps = 500, the default"),
    "a ratio of one": ("warmup_ratio", "1.5", "warmup_ratio = 1.5: a ratio is below 1"),
    "no steps": ("max_steps", "0", "max_steps: no steps would be taken"),
    "not here": ("push_to_hub", "true", "push_to_hub = true has no counterpart here: ntjax uploads nothing"),
    "not here, by pattern": (
        "dataloader_num_workers",
        "4",
        "dataloader_num_workers = 4 has no counterpart here",
    ),
    "always so": ("average_tokens_across_devices", "false", "here it is always true"),
    "nothing to evaluate on": (
        "eval_strategy",
        '"steps"',
        "there is nothing to evaluate on in [datasets.sft]",
    ),
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(("key", "value", "message"), STAGE_ERRORS.values(), ids=STAGE_ERRORS)
def test_a_stage_setting_at_fault_is_named_with_its_line(
    load: Load, suffix: str, key: str, value: str, message: str
) -> None:
    text = FORMATS[suffix].format(model=written(suffix, "dtype", '"bf16"'), stage=written(suffix, key, value))
    with pytest.raises(ConfigError) as caught:
        load(text, suffix=suffix)
    assert caught.value.exit_code == 78
    assert str(caught.value).startswith(f"run{suffix}:10: stages.0.{key}")
    assert message in str(caught.value)


MODEL_ERRORS = {
    "misspelt": (
        "load_in_4bits",
        "true",
        "load_in_4bits = true: there is no such setting; did you mean load_in_4",
    ),
    "lists what there is": ("zzz", "1", "there are model_name_or_path, model_type,"),
    "dtype": ("dtype", '"int8"', 'dtype = "int8": allowed are float32, bfloat16'),
    "device": ("device", '"cuda:0"', 'device = "cuda:0": allowed are auto, cpu, gpu, tpu'),
    "nested table": ("lora_config", "7", "lora_config = 7: expected a table of settings"),
    "TRL's flat name": ("lora_dropout", "0.1", "write PEFT's name for it in [model.lora_config]"),
    "placement": ("device_map", '"auto"', 'device_map = "auto" has no counterpart here: the mesh places'),
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(("key", "value", "message"), MODEL_ERRORS.values(), ids=MODEL_ERRORS)
def test_a_model_setting_at_fault_is_named_with_its_line(
    load: Load, suffix: str, key: str, value: str, message: str
) -> None:
    text = FORMATS[suffix].format(model=written(suffix, key, value), stage=written(suffix, "save_steps", "5"))
    with pytest.raises(ConfigError) as caught:
        load(text, suffix=suffix)
    assert str(caught.value).startswith(f"run{suffix}:3: model.{key}")
    assert message in str(caught.value)


def test_all_problems_are_told_at_once_in_the_order_of_the_file(load_stage: Load) -> None:
    with pytest.raises(ConfigError) as caught:
        load_stage("save_steps = 0\nlogging_steps = 0\neval_steps = 0\n", "seed=-1")
    lines = [line for line in str(caught.value).splitlines() if "must be" in line]
    assert lines == [
        "run.toml:7: stages.0.save_steps = 0: must be at least 1",
        "run.toml:8: stages.0.logging_steps = 0: must be at least 1",
        "run.toml:9: stages.0.eval_steps = 0: must be at least 1",
        "command line: seed=-1: seed = -1: must be at least 0",
    ]


MODEL = '[model]\nmodel_name_or_path = "x"\n'
ROWS = '[datasets.sft]\ndataset_path = "x"\n'
STAGE = '[[stages]]\nstage_type = "sft"\n'
MISSING = {
    "model": (ROWS + STAGE, "run.toml: model: this setting must be given\n  fix: add model = ..."),
    "model path": (
        '[model]\ndtype = "bf16"\n' + ROWS + STAGE,
        "run.toml:1: model.model_name_or_path: this setting",
    ),
    "datasets": (MODEL + STAGE, "add [datasets.sft]"),
    "stages": (MODEL + ROWS, "add [[stages]] with stage_type"),
    "stage_type": (
        MODEL + ROWS + "[[stages]]\nbf16 = true",
        "run.toml:5: stages.0.stage_type: a stage has a stage_type",
    ),
}


@pytest.mark.parametrize(("text", "message"), MISSING.values(), ids=MISSING)
def test_what_must_be_there_is_asked_for(load: Load, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert message in str(caught.value)


def test_an_unknown_stage_type_lists_the_files_of_the_folder(load_tables: Load) -> None:
    with pytest.raises(ConfigError) as caught:
        load_tables(stages=[{"stage_type": "sftt"}])
    assert 'stages.0.stage_type = "sftt": a stage has a stage_type, one of dpo, grpo,' in str(caught.value)
    assert caught.value.where == "run.json:12"
    assert caught.value.fix == 'write stage_type = "sft"'


def test_a_data_set_without_a_name_of_its_own_is_explained(load_tables: Load) -> None:
    with pytest.raises(ConfigError, match=r'datasets.dataset_path = "x": expected a table for each data set'):
        load_tables(datasets={"dataset_path": "x"})


def stage(stage_type: str, **settings: object) -> dict[str, object]:
    return {"stages": [{"stage_type": stage_type, **settings}]}


def rows(**settings: object) -> dict[str, object]:
    return {"datasets": {"sft": settings}}


def streamed(**settings: object) -> dict[str, object]:
    data = {"datasets": {"text": {"dataset_path": "a", "streaming": True}}}
    return data | stage("pretrain", **settings)


def evaluated(**settings: object) -> dict[str, object]:
    """A stage that evaluates and is to choose the best."""
    chosen = {"eval_strategy": "steps", "load_best_model_at_end": True}
    return rows(dataset_path="a", validation_split_ratio=0.1) | stage("sft", **chosen | settings)


QLORA = {"model_name_or_path": "m", "use_lora": True, "load_in_4bit": True}
CONFLICTS = {
    "two precisions": (stage("sft", bf16=True, fp16=True), "stages.0.fp16: a stage computes"),
    "two quantisations": (
        {"model": {"model_name_or_path": "m", "use_lora": True, "load_in_4bit": True, "load_in_8bit": True}},
        "model.load_in_8bit: weights are held in 4 bits or in 8",
    ),
    "quantised and nothing to train": (
        {"model": {"model_name_or_path": "m", "load_in_4bit": True}},
        "model.load_in_4bit: quantised weights are frozen",
    ),
    "another compute dtype": (
        {"model": QLORA | {"dtype": "bfloat16", "bnb_config": {"bnb_4bit_compute_dtype": "float32"}}},
        'model.bnb_config.compute_dtype = "float32", but sft_stage computes in bfloat16',
    ),
    "PiSSA of quantised weights": (
        {"model": QLORA | {"lora_config": {"init_lora_weights": "pissa"}}},
        "model.lora_config: PiSSA takes the adapter out",
    ),
    "a start that is none": (
        {"model": {"model_name_or_path": "m", "lora_config": {"init_lora_weights": "random"}}},
        "init_lora_weights: allowed are",
    ),
    "a streamed sft": (
        rows(dataset_path="a", streaming=True),
        "datasets.sft.streaming = true: sft stages plan",
    ),
    "a stream without an end": (streamed(), "stages.0.max_steps: a streamed data set has no known end"),
    "a stream in epochs": (
        streamed(max_steps=3, save_strategy="epoch"),
        'save_strategy = "epoch": a streamed',
    ),
    "a stream by fit": (
        streamed(max_steps=3, packing_strategy="bfd"),
        "packing_strategy: streamed text is packed",
    ),
    "two sources": (rows(dataset_path="a", dataset_name="b"), "datasets.sft.dataset_path: a data set"),
    "no source": (rows(shuffle=True), "a data set needs either dataset_path (files) or dataset_name"),
    "two eval sources": (
        rows(dataset_path="a", eval_split="b", validation_split_ratio=0.1),
        "datasets.sft.eval_split: evaluation rows come from",
    ),
    "eval rows of nothing": (rows(dataset_path="a", eval_num_samples=3), "datasets.sft.eval_num_samples"),
    "two schedules": (
        stage("sft", lr_scheduler_kwargs={"power": 2}),
        "cosine has no power; it takes num_cycles",
    ),
    "a schedule undecided": (stage("sft", lr_scheduler_type="warmup_stable_decay"), "needs num_decay_steps"),
    "no evaluation, often": (stage("sft", do_eval=False, eval_strategy="epoch"), "asks for evaluation"),
    "two rests of a mesh": (
        {"mesh": {"data": -1, "fsdp": -1}},
        "mesh.fsdp: only one axis can be -1 (the rest), and data is",
    ),
    "an empty axis": ({"mesh": {"tensor": 0}}, "mesh.tensor: an axis has at least one device"),
    "zero_stage twice": (
        {"zero_stage": 2, "mesh": {"zero_stage": 3}},
        "zero_stage is given twice, also as mesh.zero_stage at run.json:",
    ),
    "two lengths": (
        rows(dataset_path="a", max_length=64) | stage("sft", max_length=32),
        "stages.0.max_length = 32, but 64 at run.json:",
    ),
    "prompts in and out": (
        rows(dataset_path="a", train_on_prompt=True) | stage("sft", completion_only_loss=True),
        "says train_on_prompt",
    ),
    "an escaping name": (stage("sft", stage_name="../x"), 'stages.0.stage_name = "../x_stage"'),
    "an escaping task": ({"task_name": "../../etc"}, 'task_name = "../../etc": it names a folder'),
    "remote code in kwargs": (
        rows(dataset_name="a", dataset_kwargs={"trust_remote_code": True}),
        "nothing remote is ever run",
    ),
    "the best without evaluation": (
        stage("sft", load_best_model_at_end=True),
        "load_best_model_at_end = true, but nothing is evaluated on the way",
    ),
    "the best that is not saved": (
        evaluated(save_strategy="no"),
        'but eval_strategy = "steps" and save_strategy = "no"',
    ),
    "the best between saves": (
        evaluated(eval_steps=4, save_steps=10),
        "every 10 steps one is saved, and every 4 one evaluated\n  fix: save_steps = 12",
    ),
    "text that is drawn until": (
        stage("grpo", reward_function="numeric", generation_kwargs={"top_p": 3}),
        "generation_kwargs: top_p = 3: must be at most 1",
    ),
    "a temperature beside the stage's": (
        stage("grpo", reward_function="numeric", generation_kwargs={"temperature": 0.5}),
        "generation_kwargs: temperature = 0.5, but the stage's, which losses go by, is 1.0",
    ),
    "a group of one": (stage("grpo", num_generations=1), "num_generations = 1: must be at least 2"),
    "no reward": (stage("ppo"), "a ppo stage needs reward_function or reward_model_path"),
    "vllm": (stage("grpo", vllm_mode="server"), "the sampler is the trainer's own model"),
    "weights of no losses": (stage("dpo", loss_weights=[1, 2]), "2 weights for 1 losses"),
    "null inside free settings": (rows(dataset_name="a", dataset_kwargs={"x": None}), "expected a table"),
}


@pytest.mark.parametrize(("tables", "message"), CONFLICTS.values(), ids=CONFLICTS)
def test_settings_that_cannot_be_are_refused(
    load_tables: Load, tables: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_tables(**tables)
    assert str(caught.value).startswith("run.json:")
    assert message in str(caught.value)


def test_a_setting_under_two_of_its_names_is_given_twice(load_stage: Load) -> None:
    with pytest.raises(ConfigError) as caught:
        load_stage('optim = "sgd"\noptimizer = "lion"\n')
    assert str(caught.value).startswith("run.toml:8: stages.0.optimizer: optimizer is given twice")
    assert "also as stages.0.optim at run.toml:7" in str(caught.value)


def test_a_setting_in_a_stage_and_in_its_stage_kwargs_is_given_twice(load_stage: Load) -> None:
    with pytest.raises(ConfigError) as caught:
        load_stage("max_length = 8\n[stages.stage_kwargs]\nmax_length = 9\n")
    assert "run.toml:9: stages.0.stage_kwargs.max_length: max_length is given twice" in str(caught.value)


def test_stage_kwargs_are_checked_like_the_stages_own_settings(load_stage: Load) -> None:
    with pytest.raises(ConfigError) as caught:
        load_stage("[stages.stage_kwargs]\nmax_lenght = 9\n")
    assert str(caught.value).startswith(
        "run.toml:8: stages.0.stage_kwargs.max_lenght = 9: there is no such setting"
    )


def test_a_python_config_is_checked_without_lines(load: Load) -> None:
    text = "def get_config(): return {'model': {}, 'datasets': {'a': {'dataset_path': 'x'}}, 'stages': [{}]}"
    with pytest.raises(ConfigError) as caught:
        load(text, suffix=".py")
    assert "run.py: model.model_name_or_path: this setting must be given" in str(caught.value)


def test_an_answer_to_a_mistake_comes_at_once_and_without_jax(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('[model]\nmodel_name = "x"\n[[stages]]\nstage_type = "sft"\nbeta = 1')
    script = (
        "import sys, time; from ntjax.config import load_config; from ntjax.errors import ConfigError\n"
        f"try: load_config({str(config)!r})\n"
        "except ConfigError as error: assert 'belongs to dpo' in str(error), error\n"
        "heavy = {'jax', 'flax', 'numpy', 'transformers', 'datasets', 'ml_collections'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert time.process_time() < 1.0, time.process_time()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
