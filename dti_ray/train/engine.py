"""The optimizer step, by DeepSpeed on a cluster or by plain PyTorch in one process.

Stage: engine; the only module that imports DeepSpeed. In: a `ClickModel` and the configuration. Out: an
`Engine`: forward, backward, step, state and back.
Invariant: both engines minimise the same number: the loss handed to `backward` is (sum over this pass's
targets) / (targets of the step on all ranks), and gradients are summed over passes and ranks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from dti_ray.config import OptimConfig, RunConfig
from dti_ray.model.backbone import ClickModel
from dti_ray.model.batch import PackedBatch
from dti_ray.model.speed import speed_up
from dti_ray.train.shards import fill, held_by_deepspeed, held_whole, refresh_parameters, snapshot
from dti_ray.train.state import EngineState, StateFiles


class Engine(Protocol):
    """What the loop needs of whoever owns weights and optimizer."""

    device: torch.device
    model: ClickModel

    def forward(self, batch: PackedBatch) -> Tensor:
        """Return log-odds [B, S]."""
        ...

    def forward_training(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Return log-odds [B, S], and the weighted loss of the targets' texts, summed."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of one pass."""
        ...

    def step(self, lr: float) -> float:
        """Apply the accumulated gradients; return their global norm before clipping.

        Where the norm is not finite, on every rank alike, they are dropped and nothing changes.
        """
        ...

    def set_training(self, is_training: bool) -> None:
        """Switch dropout on or off."""
        ...

    def state(self) -> EngineState:
        """Return this rank's share of weights and optimizer, copied to the CPU; all ranks' shares make the state."""
        ...

    def load_state(self, files: StateFiles) -> None:
        """Go to the state that files of all ranks hold, however many ranks wrote them; every rank must call it."""
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

    def forward_training(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """See `Engine`."""
        with self.autocast:
            return self.model(batch, is_text_asked=True)

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        loss.backward()

    def step(self, lr: float) -> float:
        """See `Engine`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        if norm.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def set_training(self, is_training: bool) -> None:
        """See `Engine`."""
        self.model.train(is_training)

    def state(self) -> EngineState:
        """See `Engine`."""
        trained = self.model.trained()
        return snapshot(held_whole(trained), self.optimizer.state, trained)

    def load_state(self, files: StateFiles) -> None:
        """See `Engine`."""
        fill(held_whole(self.model.trained()), self.optimizer.state, files)


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
        self.inner = adamw(model, config.optim)
        self.engine, optimizer, *_ = deepspeed.initialize(
            model=model,
            optimizer=self.inner,
            config=deepspeed_config(config, passes),
            dist_init_required=not torch.distributed.is_initialized(),
        )
        self.optimizer = cast("torch.optim.Optimizer", optimizer)  # a wrapper of ours with the same groups
        self.world = torch.distributed.get_world_size()
        self.zero_stage = config.train.zero_stage

    def forward(self, batch: PackedBatch) -> Tensor:
        """See `Engine`."""
        return self.engine(batch)

    def forward_training(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """See `Engine`."""
        return self.engine(batch, is_text_asked=True)

    def backward(self, loss: Tensor) -> None:
        """See `Engine`; DeepSpeed averages over ranks, so the loss is multiplied by their number."""
        self.engine.backward(loss * self.world, scale_wrt_gas=False)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # DeepSpeed counts passes here

    def step(self, lr: float) -> float:
        """See `Engine`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.optimizer is self.inner:  # nothing around it that knows a norm and leaves a bad step out
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            norm = float(nn.utils.get_total_norm(gradients))
            if not math.isfinite(norm):
                self.engine.zero_grad()
            self.engine.step()
            return norm
        self.engine.step()
        return float(self.engine.get_global_grad_norm() or 0.0)

    def set_training(self, is_training: bool) -> None:
        """See `Engine`."""
        self.model.train(is_training)

    def state(self) -> EngineState:
        """See `Engine`."""
        trained = self.model.trained()
        held = held_by_deepspeed(self.optimizer, trained)
        if self.zero_stage == 0 and torch.distributed.get_rank() > 0:
            held = []  # every rank has all of it; the first one writes
        return snapshot(held, self.inner.state, trained)

    def load_state(self, files: StateFiles) -> None:
        """See `Engine`."""
        fill(held_by_deepspeed(self.optimizer, self.model.trained()), self.inner.state, files)
        refresh_parameters(self.optimizer)


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
