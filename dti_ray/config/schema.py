"""Every setting of the system, declared once: name, unit, range, default, meaning.

Stage: below all but errors. In: plain values. Out: a frozen `RunConfig`.
Invariant: no torch, no ray, nothing read from the environment; what validates here can be run.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from dti_ray.config.data import DataConfig
from dti_ray.config.packing import PackingConfig
from dti_ray.config.score import ScoreConfig
from dti_ray.config.section import Fraction, OpenFraction, PositiveInt, Section
from dti_ray.config.serve import ServeConfig
from dti_ray.config.study import StudyConfig
from dti_ray.config.telemetry import TelemetryConfig
from dti_ray.config.tune import TuneConfig


class PromptConfig(Section):
    """How an interaction becomes text, and a text becomes tokens."""

    item_template: str | None = Field(
        default=None,
        min_length=1,
        description="item text; {column} names a column of the catalogue; null: all text columns, joined by a comma",
    )
    time: Literal["off", "gap"] = Field(
        default="off", description="gap: an interaction's text starts with the time since the one before, as words"
    )
    word_break: str = Field(
        default=r"\s+", description="regular expression between two words; for the tokenizer built from the catalogue"
    )
    prefix: str = Field(default="", description="text before the first interaction, read once by every prompt")
    prefix_position: Literal["pinned", "first"] = Field(
        default="pinned",
        description="pinned: all read the prefix unrotated, as if at distance 0; first: at its place in front of the "
        "prompt, as a plain language model does, and then laws 2 and 4 do not hold: its distance grows along a prompt",
    )
    yes_token: str = Field(default="<yes>", min_length=1, description="feedback of a click; must be one token")
    no_token: str = Field(default="<no>", min_length=1, description="feedback of no click; must be one token")
    max_item_tokens: PositiveInt = Field(default=64, description="item texts are cut here (tokens)")
    context: Literal["ordered", "strictly_earlier"] = Field(
        default="ordered", description="may a target see feedback that carries its own timestamp?"
    )


class ModelConfig(Section):
    """Which decoder predicts, and what reads its answer."""

    name_or_path: str | None = Field(
        default=None, description="Hugging Face name or folder; null: the tiny Llama below, from scratch"
    )
    gguf_file: str | None = Field(
        default=None, description="GGUF file within name_or_path that holds weights and tokenizer; null: safetensors"
    )
    hidden_size: PositiveInt = Field(default=128, description="width, from scratch only")
    layers: PositiveInt = Field(default=4, description="decoder layers, from scratch only")
    heads: PositiveInt = Field(default=4, description="attention heads, from scratch only")
    kv_heads: PositiveInt = Field(default=4, description="key/value heads, from scratch only")
    intermediate_size: PositiveInt = Field(default=384, description="width of the MLP, from scratch only")
    head: Literal["yes_no", "linear"] = Field(default="yes_no", description="two label rows, or one linear unit")
    attention: Literal["auto", "dense", "banded", "flex"] = Field(
        default="auto", description="attention backend; auto: flex on CUDA, banded on CPUs"
    )
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.0, description="dropout of token embeddings while training (share)"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="compute each layer again in the backward pass: less memory, one forward pass more"
    )
    compile: bool = Field(default=False, description="torch.compile for norms and MLPs while training")
    liger: bool = Field(default=False, description="Liger's kernels for norms and MLPs while training; CUDA only")

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.hidden_size % (2 * self.heads):
            raise ValueError("hidden_size must be a multiple of 2 x heads (rotary needs an even head width)")
        if self.heads % self.kv_heads:
            raise ValueError("heads must be a multiple of kv_heads")
        if self.gguf_file is not None and self.name_or_path is None:
            raise ValueError("gguf_file needs name_or_path, the folder or repository that it lies in")
        if self.compile and self.liger:
            raise ValueError("compile and liger both replace norms and MLPs; choose one")
        return self


class LoraConfig(Section):
    """Low-rank adapters instead of full fine-tuning: the decoder stays frozen, markers and head are trained."""

    rank: PositiveInt | None = Field(default=None, description="rank of each adapter; null: train all weights")
    alpha: PositiveInt = Field(default=32, description="adapters count alpha / rank times")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.0, description="dropout in front of adapters while training (share)"
    )
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear", min_length=1,
        description="linear layers with an adapter: all-linear, or names such as q_proj,v_proj",
    )  # fmt: skip

    @field_validator("targets", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        is_names = isinstance(value, str) and value not in ("", "all-linear")
        return [name.strip() for name in str(value).split(",")] if is_names else value


class DebiasConfig(Section):
    """Bottleneck 2, positional-bias overfitting: what a [SUM] query knows of order."""

    strength: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0, description="lambda of the distance bias on [SUM] scores; 0 is no debias"
    )
    distance: Literal["linear", "log1p"] = Field(default="linear", description="g(d), d in interactions")
    rotary: Literal["keep", "drop"] = Field(default="keep", description="rotate [SUM] queries and their keys, or not")


class ResetConfig(Section):
    """Bottleneck 1, hidden-state leakage: how far context states return to their embeddings."""

    mode: Literal["off", "uniform", "distance", "constant"] = Field(default="off", description="rule of the return")
    alpha: Fraction = Field(default=0.1, description="alpha, or alpha_max of `distance`")


class OptimConfig(Section):
    """AdamW, its schedule, and the step, which is counted in targets."""

    lr: Annotated[float, Field(gt=0.0)] = Field(default=1.5e-3, description="peak learning rate")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(default=0.01, description="decoupled; matrices only")
    beta1: OpenFraction = Field(default=0.9, description="AdamW")
    beta2: OpenFraction = Field(default=0.98, description="AdamW")
    eps: Annotated[float, Field(gt=0.0)] = Field(default=1e-8, description="AdamW")
    warmup: Fraction = Field(default=0.05, description="share of all targets over which the rate rises")
    final_lr: Fraction = Field(default=0.05, description="rate at the end, as a share of the peak (cosine)")
    grad_clip: Annotated[float, Field(gt=0.0)] = Field(default=1.0, description="global gradient norm, L2")
    targets_per_step: PositiveInt = Field(default=512, description="targets of one optimizer step, all ranks (count)")
    epochs: PositiveInt = Field(default=3, description="passes over the training targets")
    sliding_tail: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.0, description="last share of the targets, trained as stand-alone prompts"
    )
    text_weight: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0,
        description="weight of a second loss: each target's text, predicted from what is before it, summed over tokens",
    )


class TrainConfig(Section):
    """The run: its name, its seed, its engine and its pace of reporting."""

    run: str = Field(default="run", pattern=r"^[A-Za-z0-9._-]+$", description="name of the run below <root>/runs")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(default=0, description="the one seed")
    engine: Literal["deepspeed", "torch"] = Field(default="deepspeed", description="torch: one process, no DeepSpeed")
    precision: Literal["bf16", "fp32"] = Field(default="bf16", description="of weights in compute; AdamW keeps fp32")
    zero_stage: Literal[0, 1, 2, 3] = Field(default=1, description="DeepSpeed ZeRO stage")
    rows_per_pass: PositiveInt = Field(
        default=4, description="rows of one forward pass at most; more rows of a step are accumulated (count)"
    )
    peak_tflops: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None, description="peak of one device (TFLOP/s), for MFU; null: its data sheet's, where that is known"
    )
    log_targets: PositiveInt = Field(default=5_000, description="a line of metrics every so many targets (count)")
    max_failures: Annotated[int, Field(ge=0)] = Field(
        default=3, description="times that dead or failed workers are started again by one command (count)"
    )
    on_nonfinite: Literal["fail", "skip"] = Field(
        default="fail", description="what a step with a loss or gradient that is not finite does to the run"
    )
    max_skipped: PositiveInt = Field(
        default=10, description="steps that `on_nonfinite: skip` leaves out at most; one more fails (count)"
    )


class EvalConfig(Section):
    """When a run is evaluated, and under which protocol."""

    every_targets: PositiveInt = Field(default=40_000, description="validation every so many targets (count)")
    max_valid_targets: PositiveInt | None = Field(
        default=None, description="validate during training on a fixed sample of at most so many targets; null: all"
    )
    protocol: Literal["sliding", "streaming", "both"] = Field(
        default="both", description="prompts that `evaluate` asks: stand-alone ones, those of training, or either"
    )
    n: PositiveInt | None = Field(default=None, description="context interactions at inference; null: packing.n")
    row_tokens: PositiveInt = Field(default=4096, description="capacity of a row at inference (tokens)")
    bootstrap: Annotated[int, Field(ge=100)] = Field(default=1000, description="bootstrap replicates over users")


class CheckpointConfig(Section):
    """When the state of a run is saved, and how much of it is kept."""

    every_steps: PositiveInt | None = Field(
        default=None, description="a state every so many optimizer steps (count); null: at validations only"
    )
    keep_last: PositiveInt = Field(default=2, description="newest states kept (count)")
    keep_best: PositiveInt = Field(default=1, description="best states by validation AUC kept (count)")
    max_gb: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None, description="budget of a run's states (GB, 10^9 bytes); the newest is kept whatever its size"
    )
    queue: PositiveInt = Field(
        default=1, description="states that may wait in memory for their upload; one more makes training wait (count)"
    )
    patience_s: Annotated[float, Field(gt=0.0)] = Field(
        default=120.0, description="how long an operation on a state is tried again before the run fails (s)"
    )


class StorageConfig(Section):
    """Where everything lies."""

    root: str = Field(default="outputs", min_length=1, description="folder, file://, s3:// or gs:// URI")


class ClusterConfig(Section):
    """What the run asks of Ray."""

    address: str | None = Field(default=None, description="Ray address; null: RAY_ADDRESS's cluster or a local one")
    workers: PositiveInt = Field(default=2, description="training workers (count)")
    cpus_per_worker: Annotated[float, Field(gt=0)] = Field(default=1, description="CPUs of each training worker")
    gpus_per_worker: Annotated[float, Field(ge=0)] = Field(default=0, description="GPUs of each training worker")
    data_cpus: PositiveInt = Field(default=1, description="CPUs left for packing beside the trainers (count)")
    object_store_mb: PositiveInt = Field(default=256, description="object store of a local cluster (MB)")
    collective_timeout_s: Annotated[int, Field(ge=5)] = Field(
        default=300, description="how long a worker waits for the others, or stands still, before it fails (s)"
    )
    setup_timeout_s: Annotated[int, Field(ge=5)] = Field(
        default=1800, description="how long a worker may take until its first step: model files, kernels, rows (s)"
    )


class RunConfig(Section):
    """The root: one section per concern."""

    data: DataConfig = DataConfig()
    prompt: PromptConfig = PromptConfig()
    packing: PackingConfig = PackingConfig()
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    debias: DebiasConfig = DebiasConfig()
    reset: ResetConfig = ResetConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    storage: StorageConfig = StorageConfig()
    cluster: ClusterConfig = ClusterConfig()
    serve: ServeConfig = ServeConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    tune: TuneConfig = TuneConfig()
    score: ScoreConfig = ScoreConfig()
    study: StudyConfig = StudyConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        if self.packing.streams % self.cluster.workers:
            raise ValueError("packing.streams must be a multiple of cluster.workers")
        if self.train.engine == "torch" and self.cluster.workers != 1:
            raise ValueError("train.engine=torch runs in one process; set cluster.workers=1")
        if self.checkpoint.patience_s >= self.cluster.collective_timeout_s:
            raise ValueError(
                "checkpoint.patience_s must be below cluster.collective_timeout_s: the others wait so long"
            )
        if self.optim.targets_per_step < self.packing.streams:
            raise ValueError("optim.targets_per_step must be at least packing.streams")
        return self

    @property
    def eval_n(self) -> int:
        """Context interactions of a prompt at inference."""
        return self.eval.n if self.eval.n is not None else self.packing.n

    @property
    def protocols(self) -> tuple[str, ...]:
        """Protocols of an evaluation, the main one first; with k = 1 both are one."""
        if self.eval.protocol == "both":
            return ("sliding", "streaming") if self.packing.k != 1 else ("sliding",)
        return (self.eval.protocol,)
