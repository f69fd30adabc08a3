"""DeepSpeed's JSON: what it says becomes settings, or is listed, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ntjax.config import Config, load_config, refuse_unbuilt
from ntjax.errors import ConfigError, InputMissing

SHIPPED = Path(__file__).parents[2] / "configs" / "deepspeed"
CONFIG = """
[model]
model_name_or_path = "m"
[datasets.sft]
dataset_path = "d.jsonl"
[[stages]]
stage_type = "sft"
deepspeed = "ds.json"
"""


def loaded(folder: Path, said: dict[str, Any], more: str = "") -> Config:
    (folder / "ds.json").write_text(json.dumps(said, indent=1))
    (folder / "run.toml").write_text(CONFIG + more)
    return load_config(folder / "run.toml")


def test_what_it_says_becomes_settings(tmp_path: Path) -> None:
    config = loaded(
        tmp_path,
        {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 8,
            "gradient_clipping": 0.5,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.8, 0.95], "eps": 1e-7}},
            "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 7}},
        },
    )
    (stage,) = config.stages
    assert (stage.per_device_train_batch_size, stage.gradient_accumulation_steps) == (2, 8)
    assert (stage.max_grad_norm, stage.bf16, stage.learning_rate) == (0.5, True, 1e-4)
    assert (stage.adam_beta1, stage.adam_beta2, stage.adam_epsilon) == (0.8, 0.95, 1e-7)
    assert (stage.lr_scheduler_type, stage.warmup_steps) == ("linear", 7)
    assert (config.mesh.zero, config.mesh.offload_optimizer) == (3, True)
    (warning,) = config.warnings
    assert warning.endswith("and not read: zero_optimization.offload_optimizer.pin_memory")


@pytest.mark.parametrize("word", ["adamw_torch", "adamw", "adamw_torch_fused"])
def test_an_optimizer_has_several_names(tmp_path: Path, word: str) -> None:
    said = {"optimizer": {"type": "AdamW"}}
    (stage,) = loaded(tmp_path, said, f'optimizer = "{word}"\n').stages
    assert stage.optimizer == "adamw_torch"
    with pytest.raises(ConfigError, match='says "adamw_torch"'):
        loaded(tmp_path, said, 'optimizer = "lion"\n')


def test_weights_are_offloaded_in_stage_3(tmp_path: Path) -> None:
    offload = {"offload_param": {"device": "cpu"}}
    assert loaded(tmp_path, {"zero_optimization": {"stage": 3, **offload}}).mesh.offload_param
    with pytest.raises(ConfigError, match="zero_stage is 2"):
        loaded(tmp_path, {"zero_optimization": {"stage": 2, **offload}})


@pytest.mark.parametrize("stage", [2, 3])
def test_ours_leave_all_but_the_stage_to_the_config(stage: int, tmp_path: Path) -> None:
    said = json.loads((SHIPPED / f"ds_config_zero{stage}.json").read_text())
    plain, config = loaded(tmp_path, {"steps_per_print": 1}), loaded(tmp_path, said)
    assert config.stages == plain.stages
    assert config.mesh.zero == stage
    refuse_unbuilt(config)
    (warning,) = config.warnings
    assert "zero_optimization.overlap_comm" in warning
    assert "auto" not in warning


def test_auto_leaves_a_setting_as_the_config_has_it(tmp_path: Path) -> None:
    config = loaded(tmp_path, {"gradient_clipping": "auto"}, "max_grad_norm = 0.3\n")
    assert config.stages[0].max_grad_norm == 0.3


def test_the_same_said_twice_is_no_contradiction(tmp_path: Path) -> None:
    config = loaded(tmp_path, {"gradient_clipping": 1}, "max_grad_norm = 1.0\n")
    assert config.stages[0].max_grad_norm == 1.0


@pytest.mark.parametrize(
    ("said", "more", "message"),
    [
        ({"gradient_clipping": 0.5}, "max_grad_norm = 1.0\n", "ds.json:2 says 0.5"),
        ({"zero_optimization": {"stage": 5}}, "", "zero_stage = 5"),
        ({"zero_optimization": {"stage": 2}}, "[mesh]\nzero_stage = 3\n", "ds.json:3 says 2"),
        ({"optimizer": {"type": "Lamb"}}, "", '"Lamb" isn\'t there'),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "", "allowed are cpu and none"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "", "allowed are cpu and none"),
    ],
)
def test_what_cannot_be_is_refused(said: dict[str, Any], more: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, said, more)
    assert message in str(caught.value)


def test_fp16_is_read_and_refused_as_in_a_stage(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="float16 with loss scaling"):
        refuse_unbuilt(loaded(tmp_path, {"fp16": {"enabled": True}}))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(CONFIG)
    with pytest.raises(InputMissing, match=r"ds\.json"):
        load_config(tmp_path / "run.toml")
