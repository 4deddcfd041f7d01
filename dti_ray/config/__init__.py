"""Configuration, declared once (`schema`) and loaded in one way (`load`)."""

from dti_ray.config.load import config_hash, differences, dotted_keys, from_yaml, load_config, to_yaml, with_values
from dti_ray.config.schema import (
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    DebiasConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    PackingConfig,
    PromptConfig,
    ResetConfig,
    RunConfig,
    StorageConfig,
    Window,
)
from dti_ray.config.tune import Dimension, TuneConfig, Value

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "DataConfig",
    "DebiasConfig",
    "Dimension",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "PackingConfig",
    "PromptConfig",
    "ResetConfig",
    "RunConfig",
    "StorageConfig",
    "TuneConfig",
    "Value",
    "Window",
    "config_hash",
    "differences",
    "dotted_keys",
    "from_yaml",
    "load_config",
    "to_yaml",
    "with_values",
]
