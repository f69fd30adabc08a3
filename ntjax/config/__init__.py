"""One file of settings for a whole run: read with line numbers, checked once, frozen.

    config = load_config("run.toml", ["stages.sft.learning_rate=1e-4"])

Every problem is a `ConfigError` (exit code 78) that names file and line. Nothing here imports jax.
"""

from __future__ import annotations

from ntjax.config.load import dataset_for, load_config, local_path, refuse_unbuilt, resolve_path
from ntjax.config.schema import BnbConfig, Config, DatasetConfig, LoraConfig, MeshConfig, ModelConfig
from ntjax.config.write import differences, to_toml

__all__ = [
    "BnbConfig",
    "Config",
    "DatasetConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "dataset_for",
    "differences",
    "load_config",
    "local_path",
    "refuse_unbuilt",
    "resolve_path",
    "to_toml",
]
