"""What a run reads, opened and checked before it is asked for: its data set, its tokens, its shape.

Stage: before launch; free of Ray. In: a `RunConfig`. Out: `Inputs`, and a configuration that passed.
Invariant: a run whose rows cannot hold a prompt, or whose model cannot be built or trained where it shall run, is
refused here.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dti_ray.config import RunConfig, StorageConfig
from dti_ray.data.asked import open_asked
from dti_ray.data.interactions import TRAIN, VALID, Dataset, verify_dataset
from dti_ray.data.packing import check_capacity, pack_spec
from dti_ray.data.prompts import TokenTable
from dti_ray.errors import ConfigError, Fault, InputError
from dti_ray.infer.evaluate import protocol_specs, sliding_spec
from dti_ray.model.attention import choose_backend
from dti_ray.model.decoder import absolute_name
from dti_ray.model.shape import build_shape
from dti_ray.storage import Storage, absolute
from dti_ray.train.tokens import tokenizer_and_table


@dataclass(frozen=True)
class Inputs:
    """What runs on one data set share: opened and verified once, tokenised once."""

    dataset: Dataset
    table: TokenTable
    tokenizer: PreTrainedTokenizerBase


def anywhere(config: RunConfig) -> RunConfig:
    """Return a configuration that means the same in a process with another working directory."""
    model = config.model.model_copy(update={"name_or_path": absolute_name(config.model.name_or_path)})
    return config.model_copy(update={"storage": StorageConfig(root=absolute(config.storage.root)), "model": model})


def open_inputs(config: RunConfig, storage: Storage) -> Inputs:
    """Open and verify the data set, and tokenise its catalogue.

    Raises:
        ConfigError: tokenizer or template do not fit.
        InputError: the data set is not prepared, was prepared another way than the configuration says, or has no
            training or validation targets.
    """
    dataset = open_asked(config.data, storage)
    verify_dataset(dataset)
    for split, number in (("train", TRAIN), ("valid", VALID)):
        if dataset.targets[number] == 0:
            raise InputError(Fault(f"data set {dataset.name}", f"has no {split} targets", hint="check data.split"))
    tokenizer, table = tokenizer_and_table(config, storage, dataset)
    return Inputs(dataset, table, tokenizer)


def check_fits(config: RunConfig, inputs: Inputs) -> None:
    """Refuse rows that cannot hold a prompt, and a model that cannot be built or trained where it shall run.

    Raises:
        ConfigError: with what does not fit.
    """
    check_capacity(pack_spec(config.packing, config.prompt.context, TRAIN), inputs.table)
    for spec in (sliding_spec(config, "valid"), *protocol_specs(config, "valid").values()):
        check_capacity(spec, inputs.table, where="eval.row_tokens")
    _check_model(config, inputs.table)


def shares_inputs(base: RunConfig, config: RunConfig) -> bool:
    """Say whether two runs read the same tokens."""
    names = ("name_or_path", "gguf_file")
    are_same_models = all(getattr(base.model, name) == getattr(config.model, name) for name in names)
    return base.prompt == config.prompt and are_same_models


def _check_model(config: RunConfig, table: TokenTable) -> None:
    """Refuse here what would fail in a worker: the architecture, adapters, kernels that the devices lack."""
    build_shape(config, table)
    has_gpus = config.cluster.gpus_per_worker > 0
    choose_backend(config.model.attention, "cuda" if has_gpus else "cpu")
    needs_gpu = {"model.attention": config.model.attention == "flex", "model.liger": config.model.liger}
    faults = [
        Fault(name, "trains on GPUs only, and cluster.gpus_per_worker is 0", "auto or false, or GPUs")
        for name, asked in needs_gpu.items()
        if asked and not has_gpus
    ]
    if faults:
        raise ConfigError(*faults)
