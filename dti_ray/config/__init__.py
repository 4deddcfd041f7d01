"""Configuration, declared once (`schema`) and loaded in one way (`load`)."""

from dti_ray.config.data import DataConfig
from dti_ray.config.load import config_hash, differences, dotted_keys, from_yaml, load_config, to_yaml, with_values
from dti_ray.config.packing import PackingConfig, Window
from dti_ray.config.schema import (
    CheckpointConfig,
    ClusterConfig,
    DebiasConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    PromptConfig,
    ResetConfig,
    RunConfig,
    StorageConfig,
)
from dti_ray.config.score import RequestColumnsConfig, ScoreConfig
from dti_ray.config.serve import ServeConfig
from dti_ray.config.study import StudyConfig, StudyRow, StudyTable
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
    "RequestColumnsConfig",
    "ResetConfig",
    "RunConfig",
    "ScoreConfig",
    "ServeConfig",
    "StorageConfig",
    "StudyConfig",
    "StudyRow",
    "StudyTable",
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
