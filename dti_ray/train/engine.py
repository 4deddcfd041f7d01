"""The optimizer step, by DeepSpeed on a cluster or by plain PyTorch in one process.

Stage: engine; the only module that imports DeepSpeed. In: a `ClickModel` and the configuration. Out: an
`Engine`: forward, backward, step, save, load.
Invariant: both engines minimise the same number: the loss handed to `backward` is (sum over this pass's
targets) / (targets of the step on all ranks), and gradients are summed over passes and ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from dti_ray.config import OptimConfig, RunConfig
from dti_ray.errors import Fault, RunError
from dti_ray.model.backbone import ClickModel
from dti_ray.model.batch import PackedBatch
from dti_ray.model.speed import speed_up

TORCH_STATE = "engine.pt"
TAG = "engine"


class Engine(Protocol):
    """What the loop needs of whoever owns weights and optimizer."""

    device: torch.device
    model: ClickModel

    def forward(self, batch: PackedBatch) -> Tensor:
        """Return log-odds [B, S]."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of one pass."""
        ...

    def step(self, lr: float) -> float:
        """Apply the accumulated gradients; return their global norm before clipping."""
        ...

    def set_training(self, is_training: bool) -> None:
        """Switch dropout on or off."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Return all trainable weights on the CPU; every rank must call it."""
        ...

    def save(self, folder: Path) -> None:
        """Write this rank's part of the training state; every rank must call it."""
        ...

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; `folder` holds every rank's part."""
        ...


def build_engine(model: ClickModel, config: RunConfig, passes: int, device: torch.device) -> Engine:
    """Return the engine that `train.engine` names.

    Args:
        model: on the CPU, in fp32.
        config: of the run.
        passes: forward passes of one step on this rank.
        device: of this rank.

    Raises:
        ConfigError: `model.liger` cannot be had here.
    """
    speed_up(model.decoder, config.model, device)
    if config.train.engine == "torch":
        return TorchEngine(model, config, device)
    return DeepSpeedEngine(model, config, passes, device)


def as_trained(model: ClickModel, config: RunConfig) -> Callable[[PackedBatch], Tensor]:
    """Return a model's forward pass in the very precision that its engine trains in.

    Under bf16 a frozen layer's rounding hides small adapters; fp32 would bring them back and change predictions.
    """
    if config.train.precision == "fp32":
        return model
    if config.train.engine == "deepspeed":
        for parameter in model.parameters():  # buffers, such as rotary frequencies, stay as they are
            parameter.data = parameter.data.to(torch.bfloat16)
        return model

    def forward(batch: PackedBatch) -> Tensor:
        with torch.autocast(batch.tokens.device.type, torch.bfloat16):
            return model(batch)

    return forward


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, object]]:
    """Return matrices with weight decay, and all else (norms, biases) without; LoRA has no such else."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, object]] = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW as the configuration describes it."""
    return torch.optim.AdamW(
        parameter_groups(model, optim), lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps
    )


class TorchEngine:
    """One process, plain PyTorch: benches, tests, notebooks. bf16 runs under autocast over fp32 weights."""

    def __init__(self, model: ClickModel, config: RunConfig, device: torch.device) -> None:
        self.device = device
        self.model = model.to(device)
        self.optimizer = adamw(model, config.optim)
        self.grad_clip = config.optim.grad_clip
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16")

    def forward(self, batch: PackedBatch) -> Tensor:
        """See `Engine`."""
        with self.autocast:
            return self.model(batch)

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        loss.backward()

    def step(self, lr: float) -> float:
        """See `Engine`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def set_training(self, is_training: bool) -> None:
        """See `Engine`."""
        self.model.train(is_training)

    def weights(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return {name: parameter.detach().cpu() for name, parameter in self.model.trained().items()}

    def save(self, folder: Path) -> None:
        """See `Engine`."""
        state = {"weights": self.weights(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, folder / TORCH_STATE)

    def load(self, folder: Path) -> None:
        """See `Engine`."""
        state = torch.load(folder / TORCH_STATE, map_location=self.device, weights_only=True)
        self.model.load_trained(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])


class DeepSpeedEngine:
    """ZeRO over all ranks of the process group that Ray Train has set up."""

    def __init__(self, model: ClickModel, config: RunConfig, passes: int, device: torch.device) -> None:
        if device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # read once, when DeepSpeed is imported
        import deepspeed

        # On CPUs DeepSpeed would compile a shared-memory reduction for a minute, needs a compiler for it, and a
        # run killed meanwhile leaves a lock that every later run waits for. gloo reduces as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

        self.device = device
        self.model = model.to(device)
        self.engine, optimizer, *_ = deepspeed.initialize(
            model=model,
            optimizer=adamw(model, config.optim),
            config=deepspeed_config(config, passes),
            dist_init_required=not torch.distributed.is_initialized(),
        )
        self.optimizer = cast("torch.optim.Optimizer", optimizer)  # a wrapper of ours with the same groups
        self.world = torch.distributed.get_world_size()
        self.zero_stage = config.train.zero_stage

    def forward(self, batch: PackedBatch) -> Tensor:
        """See `Engine`."""
        return self.engine(batch)

    def backward(self, loss: Tensor) -> None:
        """See `Engine`; DeepSpeed averages over ranks, so the loss is multiplied by their number."""
        self.engine.backward(loss * self.world, scale_wrt_gas=False)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # DeepSpeed counts passes here

    def step(self, lr: float) -> float:
        """See `Engine`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        return float(self.engine.get_global_grad_norm() or 0.0)

    def set_training(self, is_training: bool) -> None:
        """See `Engine`."""
        self.model.train(is_training)

    def weights(self) -> dict[str, Tensor]:
        """See `Engine`."""
        from deepspeed.runtime.zero import GatheredParameters

        trained = self.model.trained()
        with GatheredParameters(list(trained.values()), enabled=self.zero_stage == 3):
            weights = {name: parameter.detach().float().cpu().clone() for name, parameter in trained.items()}
        empty = [name for name, weight in weights.items() if weight.numel() == 0]
        if empty:  # known of ZeRO 3 with adapters; such a checkpoint would be worth nothing
            raise RunError(Fault("checkpoint", f"{len(empty)} weights are empty, {empty[0]} first"))
        return weights

    def save(self, folder: Path) -> None:
        """See `Engine`."""
        self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
        for script in folder.glob("*.py"):  # DeepSpeed's converters, the same in every checkpoint
            script.unlink(missing_ok=True)

    def load(self, folder: Path) -> None:
        """See `Engine`."""
        self.engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)


def deepspeed_config(config: RunConfig, passes: int) -> dict[str, object]:
    """Derive DeepSpeed's JSON from our configuration: the one place where its keys are known.

    Batches are counted in targets and divided by us; DeepSpeed is told passes only.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": config.optim.grad_clip,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "zero_optimization": {"stage": config.train.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
