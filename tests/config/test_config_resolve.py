"""What a config that says little means, and what is found for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ntjax.config import Config, dataset_for, load_config, local_path, refuse_unbuilt, resolve_path
from ntjax.errors import ConfigError, InputMissing
from tests.config.conftest import SMALLEST

Load = Callable[..., Config]
EXAMPLES = Path(__file__).parents[2] / "configs"


def test_the_defaults_are_the_contracts(load_stage: Load) -> None:
    config = load_stage("")
    assert (config.task_name, config.seed, config.base_output_dir) == ("run", 42, "runs/llm")
    assert (config.use_tensorboard, config.use_wandb, config.use_trackio) == (True, False, False)
    assert (config.model.dtype, config.model.param_dtype, config.model.attention) == (
        "float32",
        "float32",
        "auto",
    )
    (stage,) = config.stages
    assert (stage.stage_type, stage.stage_name) == ("sft", "sft_stage")
    assert (stage.num_train_epochs, stage.max_steps, stage.per_device_train_batch_size) == (3, -1, 4)
    assert (stage.learning_rate, stage.warmup_steps, stage.lr_scheduler_type) == (2e-5, 100, "cosine")
    assert (stage.optimizer, stage.max_grad_norm, stage.gradient_accumulation_steps) == (
        "adamw_torch",
        1.0,
        1,
    )
    assert (stage.logging_steps, stage.save_steps, stage.save_total_limit) == (10, 500, None)
    assert (config.datasets["sft"].shuffle, config.datasets["sft"].max_bad_rows) == (True, 0)
    refuse_unbuilt(config)


def test_what_a_stage_leaves_open_comes_from_the_rest(load_tables: Load) -> None:
    (stage,) = load_tables(
        seed=7,
        model={"model_name_or_path": "m", "gradient_checkpointing": True},
        datasets={"a": {"dataset_path": "rows", "max_length": 64, "eval_split": "test"}},
        stages=[{"stage_type": "sft", "per_device_train_batch_size": 2, "logging_steps": 5, "do_eval": True}],
    ).stages
    assert (stage.seed, stage.gradient_checkpointing, stage.max_length) == (7, True, 64)
    assert (stage.per_device_eval_batch_size, stage.eval_steps, stage.do_eval) == (2, 5, True)


@pytest.mark.parametrize(("moves", "dtype"), [(False, "bfloat16"), (True, "float32")])
def test_a_reference_that_moves_in_small_steps_is_held_as_the_policy_is(
    load_tables: Load, moves: bool, dtype: str
) -> None:
    config = load_tables(stages=[{"stage_type": "dpo", "bf16": True, "sync_ref_model": moves}])
    assert config.reference_dtype(config.stages[0]) == dtype


IDLE: dict[str, tuple[dict[str, object], str]] = {
    "moments": ({"stage_type": "sft", "optimizer": "sgd", "adam_beta1": 0.8}, "sgd has no use for it"),
    "warm-up": (
        {"stage_type": "sft", "lr_scheduler_type": "constant", "warmup_steps": 9},
        "constant_with_warmup",
    ),
    "no evaluation": (
        {"stage_type": "sft", "eval_steps": 50},
        "eval_steps has no effect: nothing is evaluated",
    ),
    "another loss's": (
        {"stage_type": "grpo", "reward_function": "numeric", "sapo_temperature_pos": 0.5},
        'loss_type = "dapo" has no use for it',
    ),
    "a still reference": ({"stage_type": "dpo", "ref_model_sync_steps": 9}, "sync_ref_model = true"),
}


@pytest.mark.parametrize("name", IDLE)
def test_settings_that_change_nothing_are_told(name: str, load_tables: Load) -> None:
    stage, why = IDLE[name]
    (warning,) = load_tables(stages=[stage]).warnings
    assert warning.startswith("run.json:")
    assert why in warning


def test_a_setting_that_says_what_is_so_anyway_is_no_matter(load_tables: Load) -> None:
    quiet = {"stage_type": "sft", "lr_scheduler_type": "constant", "warmup_steps": 0, "adam_beta1": 0.9}
    assert not load_tables(stages=[quiet | {"optimizer": "sgd"}]).warnings


def test_what_a_stage_says_itself_stays(load_tables: Load) -> None:
    said = {"seed": 1, "gradient_checkpointing": False, "per_device_eval_batch_size": 8, "eval_steps": 3}
    model = {"model_name_or_path": "m", "gradient_checkpointing": True}
    (stage,) = load_tables(seed=7, model=model, stages=[{"stage_type": "sft"} | said]).stages
    assert said == {name: getattr(stage, name) for name in said}


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_an_eval_strategy_asks_for_evaluation(load_tables: Load, strategy: str) -> None:
    data = {"a": {"dataset_path": "rows", "validation_split_ratio": 0.1}}
    stages = [{"stage_type": "sft", "evaluation_strategy": strategy}]
    assert load_tables(datasets=data, stages=stages).stages[0].do_eval is True


ALIASES = {
    'optim = "lion"': ("optimizer", "lion"),
    'optim = "adamw_torch_fused"': ("optimizer", "adamw_torch"),
    'optimizer = "adamw"': ("optimizer", "adamw_torch"),
    "warmup_ratio = 0.03": ("warmup_steps", 0.03),
    "warmup_steps = 0.03": ("warmup_steps", 0.03),
    'learning_rate = "1e-5"': ("learning_rate", 1e-5),
    "learning_rate = 1": ("learning_rate", 1.0),
    "num_train_epochs = 1": ("num_train_epochs", 1.0),
    "max_seq_length = 64": ("max_length", 64),
    'packing_strategy = "first_fit"': ("packing_strategy", "bfd"),
    "stage_kwargs = {packing = true}": ("packing", True),
    'save_total_limit = "none"': ("save_total_limit", None),
    "bf16 = true": ("bf16", True),
    'loss_type = "chunked_nll"': ("loss_type", "nll"),
    'stage_name = "warm"': ("stage_name", "warm_stage"),
    'stage_name = "warm_stage"': ("stage_name", "warm_stage"),
    'lr_scheduler_kwargs = {num_cycles = "0.5"}': ("lr_scheduler_kwargs", {"num_cycles": 0.5}),
    'push_to_hub = false\nreport_to = "none"': ("save_steps", 500),
    "average_tokens_across_devices = true": ("save_steps", 500),
}


@pytest.mark.parametrize(("line", "meant"), ALIASES.items(), ids=list(ALIASES))
def test_other_names_and_spellings_mean_the_same(
    load_stage: Load, line: str, meant: tuple[str, object]
) -> None:
    value = getattr(load_stage(line).stages[0], meant[0])
    assert value == meant[1]
    assert type(value) is type(meant[1])


def test_kwargs_of_the_model_are_settings_of_the_model(load_tables: Load) -> None:
    model = {
        "model_name_or_path": "m",
        "model_kwargs": {"torch_dtype": "torch.bfloat16", "low_cpu_mem_usage": True},
    }
    config = load_tables(model=model)
    assert config.model.dtype == "bfloat16"
    assert config.where("model.dtype") == "run.json:5"


def test_cuda_is_a_gpu_and_null_tables_are_absent_ones(load_tables: Load) -> None:
    model = {"model_name_or_path": "m", "device": "cuda", "lora_config": None, "cache_dir": None}
    config = load_tables(model=model, stages=[{"stage_type": "sft", "lr_scheduler_kwargs": None}])
    assert (config.model.device, config.model.lora_config.r, config.stages[0].lr_scheduler_kwargs) == (
        "gpu",
        8,
        {},
    )


@pytest.mark.parametrize("text", ['reward_function = "a.py:f"', 'reward_funcs = ["a.py:f"]'])
def test_one_reward_function_is_a_list_of_one(load: Load, text: str) -> None:
    start = '[model]\nmodel_name_or_path = "m"\n[datasets.a]\ndataset_path = "x"\n[[stages]]\n'
    assert load(f'{start}stage_type = "grpo"\n{text}').stages[0].reward_function == ("a.py:f",)


@pytest.mark.parametrize(("dtype", "bf16", "computed"), [
    ("float32", None, "float32"), ("float32", True, "bfloat16"),
    ("bfloat16", None, "bfloat16"), ("bfloat16", False, "bfloat16"),
])  # fmt: skip
def test_a_stage_computes_in_bf16_if_it_or_the_model_says_so(
    load_tables: Load, dtype: str, bf16: bool | None, computed: str
) -> None:
    model, stages = {"model_name_or_path": "m", "dtype": dtype}, [{"stage_type": "sft", "bf16": bf16}]
    config = load_tables(model=model, stages=stages)
    assert config.compute_dtype(config.stages[0]) == computed


def test_zero_stage_may_stand_at_the_top_or_in_the_mesh(load_tables: Load) -> None:
    assert load_tables(zero_stage=2) == load_tables(mesh={"zero_stage": 2})
    assert load_tables(zero_stage=2).where("mesh.zero_stage") == "run.json:15"


def test_the_command_line_s_zero_stage_goes_before_the_file_s(load: Load, load_stage: Load) -> None:
    assert load_stage("[mesh]\nzero_stage = 1\n", "zero_stage=3").mesh.zero_stage == 3
    assert load("zero_stage = 1\n" + SMALLEST, "mesh.zero_stage=3").mesh.zero_stage == 3


def test_every_setting_knows_its_place(load_stage: Load) -> None:
    config = load_stage('optim = "sgd"\n[stages.stage_kwargs]\nmax_length = 64\n')
    places = {
        "model.model_name_or_path": "run.toml:2",
        "model": "run.toml:1",
        "model.lora_config.r": "run.toml:1",
        "datasets.sft.dataset_path": "run.toml:4",
        "stages.0.optimizer": "run.toml:7",
        "stages.0.max_length": "run.toml:9",
        "stages.0.save_steps": "run.toml:5",
        "seed": "run.toml",
    }
    assert {key: config.where(key) for key in places} == places


DATASETS = [
    ("llm", "first", ["first_stage", "first", "sft", "vlm_sft"], "first_stage"),
    ("llm", "first", ["first", "sft", "vlm_sft"], "first"),
    ("llm", "first", ["sft", "vlm_sft"], "sft"),
    ("vlm", "first", ["other", "vlm_sft"], "vlm_sft"),
    ("vlm", "first", ["vlm_sft", "sft"], "sft"),
    ("llm", "first", ["anything"], "anything"),
    ("llm", "sft", ["sft", "dpo"], "sft"),
]


@pytest.mark.parametrize(("model_type", "stage_name", "names", "chosen"), DATASETS)
def test_a_stage_finds_its_data_set(
    load_tables: Load, model_type: str, stage_name: str, names: list[str], chosen: str
) -> None:
    config = load_tables(
        model={"model_name_or_path": "m", "model_type": model_type},
        datasets={name: {"dataset_path": name} for name in names},
        stages=[{"stage_type": "sft", "stage_name": stage_name}],
    )
    name, dataset = dataset_for(config, config.stages[0])
    assert (name, dataset.dataset_path) == (chosen, chosen)


def test_a_stage_without_a_data_set_says_what_it_looked_for(load_tables: Load) -> None:
    with pytest.raises(ConfigError) as caught:
        load_tables(
            datasets={"a": {"dataset_path": "x"}, "vlm_sft": {"dataset_path": "y"}},
            stages=[{"stage_type": "sft", "stage_name": "first"}],
        )
    assert (
        "no data set for stage first_stage: looked for first_stage, first, sft; there are a, vlm_sft"
        in str(caught.value)
    )
    assert caught.value.where == "run.json:14"


def test_two_stages_of_one_name_are_refused(load_tables: Load) -> None:
    with pytest.raises(ConfigError, match="a second stage named sft_stage") as caught:
        load_tables(stages=[{"stage_type": "sft"}, {"stage_type": "sft"}])
    assert caught.value.where == "run.json:14"


def test_paths_are_seen_from_the_config_then_from_the_working_folder(
    load_stage: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_stage("")
    there, here = tmp_path, tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    config = load_config("../run.toml")
    (here / "rows.jsonl").touch()
    assert resolve_path(config, "rows.jsonl").resolve() == here / "rows.jsonl"
    (there / "rows.jsonl").touch()
    assert resolve_path(config, "rows.jsonl").resolve() == there / "rows.jsonl"
    assert local_path(config, "owner/name") is None


def test_a_path_that_is_nowhere_is_missing_input_at_its_setting(load_stage: Load, tmp_path: Path) -> None:
    config = load_stage("")
    with pytest.raises(InputMissing) as caught:
        resolve_path(config, "rows.jsonl", "datasets.sft.dataset_path")
    assert caught.value.exit_code == 66
    assert str(caught.value).startswith('run.toml:4: datasets.sft.dataset_path = "rows.jsonl": looked in')
    assert "has run.toml" in str(caught.value)


def test_remote_code_is_accepted_and_warned_about(load_tables: Load) -> None:
    config = load_tables(model={"model_name_or_path": "m", "trust_remote_code": True})
    assert config.warnings == (
        "run.json:4: trust_remote_code = true has no effect: nothing remote is ever run",
    )
    refuse_unbuilt(config)


@pytest.mark.parametrize(("table", "needed"), [("lora_config", "use_lora"), ("bnb_config", "load_in_4bit")])
def test_settings_without_their_switch_are_warned_about(load_tables: Load, table: str, needed: str) -> None:
    settings = {"lora_config": {"r": 4}, "bnb_config": {"use_double_quant": True}}[table]
    config = load_tables(model={"model_name_or_path": "m", table: settings})
    assert config.warnings == (f"run.json:4: {table} has no effect without {needed} = true",)


UNBUILT = {
    "fp16 = true": "float16 with loss scaling (stages.0.fp16)",
    "neftune_noise_alpha = 5": "NEFTune noise (stages.0.neftune_noise_alpha)",
    'packing_strategy = "wrapped"': "packing that splits rows (stages.0.packing_strategy)",
    'optim = "adagrad"': "Adagrad (stages.0.optimizer)",
    'lr_scheduler_type = "greedy"': "schedules that watch the loss (stages.0.lr_scheduler_type)",
}


@pytest.mark.parametrize(("line", "message"), UNBUILT.items(), ids=list(UNBUILT))
def test_what_is_not_built_is_accepted_and_then_refused(load_stage: Load, line: str, message: str) -> None:
    config = load_stage(line)
    with pytest.raises(ConfigError) as caught:
        refuse_unbuilt(config)
    assert str(caught.value) == f"run.toml:7: not built yet: {message}"


@pytest.mark.parametrize("tables", [
    {"model": {"model_name_or_path": "m", "dtype": "fp16"}},
    {"stages": [{"stage_type": "ppo", "reward_function": "a:b", "value_model_path": "x"}]},
    {"stages": [{"stage_type": "grpo", "reward_function": "a:b", "entropy_coef": 0.1}]},
])  # fmt: skip
def test_no_feature_to_come_is_let_through(load_tables: Load, tables: dict[str, object]) -> None:
    config = load_tables(**tables)
    with pytest.raises(ConfigError, match="not built yet"):
        refuse_unbuilt(config)


@pytest.mark.parametrize("suffix", ["toml", "yaml", "json"])
def test_the_familiar_example_is_the_same_in_every_language(suffix: str) -> None:
    config = load_config(EXAMPLES / f"llm_training_example.{suffix}")
    assert config == load_config(EXAMPLES / "llm_training_example.toml")
    assert [stage.stage_type for stage in config.stages] == ["sft", "dpo"]
    assert config.model.use_flash_attention


def test_a_kernel_that_the_devices_lack_is_refused_at_its_line(load_tables: Load) -> None:
    from ntjax.prepare import layout_of

    config = load_tables(model={"model_name_or_path": "m", "attention": "splash"})
    with pytest.raises(ConfigError, match=r'run.json:4: attention = "splash": the devices are cpu'):
        layout_of(config)
