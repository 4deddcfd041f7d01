"""Configuration, declared once (`schema`) and loaded in one way (`load`)."""

from dti_ray.config.load import config_hash, differences, dotted_keys, from_yaml, load_config, to_yaml
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

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "DataConfig",
    "DebiasConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "PackingConfig",
    "PromptConfig",
    "ResetConfig",
    "RunConfig",
    "StorageConfig",
    "Window",
    "config_hash",
    "differences",
    "dotted_keys",
    "from_yaml",
    "load_config",
    "to_yaml",
]
