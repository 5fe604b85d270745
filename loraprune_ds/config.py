"""One YAML file = one run, read into frozen dataclasses.

Every value is checked once, here, and the message names the key; the rest of the package trusts the types.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from loraprune_ds.config_checks import Checks, require
from loraprune_ds.errors import UserError

DTYPES = ("bfloat16", "float16", "float32")
CRITERIA = ("lora", "lora_squared", "gradient", "magnitude", "random")
RANKINGS = ("uniform", "global")
NORMALIZATIONS = ("l2", "none")
COMPENSATIONS = ("none", "bias", "least_squares")
SCHEDULERS = ("linear", "cosine", "constant")
DATA_FORMATS = ("text", "instruction")


@dataclass(frozen=True)
class ModelConfig:
    """Which network. `path`: a local folder, a hub id, or `embedded` (SmolLM2-135M from the PyPI package)."""

    path: str = "embedded"
    revision: str | None = None
    dtype: str = "bfloat16"
    attn_implementation: str = "sdpa"
    adapter: str | None = None  # folder of a PEFT LoRA adapter to start from

    def __post_init__(self) -> None:
        Checks("model", self).one_of("dtype", DTYPES)


@dataclass(frozen=True)
class LoraConfig:
    """PEFT's own names. The criterion needs LoRA on all seven linears of a decoder layer, so they are not a choice."""

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.05

    def __post_init__(self) -> None:
        check = Checks("lora", self)
        check.at_least(1, "r")
        check.positive("lora_alpha")
        check.within("[0, 1)", "lora_dropout")


@dataclass(frozen=True)
class DataConfig:
    """What to tune on and what to hold out.

    `path`: `embedded` (Python's own help topics), a file or a glob of `.txt`, `.json`, `.jsonl`, or a `datasets` name.
    """

    path: str = "embedded"
    name: str | None = None  # configuration of a `datasets` dataset
    split: str = "train"
    format: str = "text"  # text: documents packed to windows; instruction: the prompt is masked out of the loss
    text_field: str = "text"
    prompt_field: str = "instruction"
    input_field: str | None = "input"
    response_field: str = "response"
    window: int = 512  # tokens of one sample
    held_out: str | None = None  # text, JSON or JSONL file for perplexity; None: a part of `path`
    held_out_fraction: float = 0.1
    max_samples: int | None = None

    def __post_init__(self) -> None:
        check = Checks("data", self)
        check.one_of("format", DATA_FORMATS)
        check.at_least(2, "window")
        check.within("(0, 1)", "held_out_fraction")
        check.at_least(1, "max_samples")


@dataclass(frozen=True)
class PruneConfig:
    """What to cut, when, and by which score (shared names with the LoRAPrune paper where it has one)."""

    ratio: float = 0.5  # fraction of all decoder-layer linear parameters that is gone at the end
    head_ratio: float | None = None  # of the open layers' heads; the channels give the rest. None: both give alike
    criterion: str = "lora"
    ranking: str = "uniform"
    normalize: str | None = None  # of a module's scores; None: l2 for uniform, none for global
    joint_budget: bool = False  # global only: heads and channels compete per parameter
    moving_average: float = 0.9
    prune_every: int = 10
    warmup_fraction: float = 0.1  # of the steps, before the first cut
    cooldown_fraction: float = 0.1  # of the steps, after the last cut
    protected_first: int | None = None  # None: the first 10 % of the layers, at least one
    protected_last: int = 1
    min_heads: int = 1  # key-value groups a layer keeps at least
    min_channels: int = 1
    max_layer_ratio: float = 1.0  # of its own linear parameters that one layer may lose
    channel_multiple: int = 1  # channel counts are rounded to a multiple of this
    gradient_every: int = 1  # criterion gradient: steps from one scoring to the next; the step of a cut always scores
    compensate: str = "none"  # for the removed inputs of o_proj and down_proj; see pruning/compensate.py
    compensate_steps: int = 2  # steps before a cut, its own included, whose inputs are measured
    compensate_decay: float = 0.5  # what one more measured step leaves of the moving average of earlier ones
    compensate_ridge: float = 0.05  # least_squares: added to the diagonal, as a fraction of the mean squared input

    def __post_init__(self) -> None:
        check = Checks("prune", self)
        check.within("(0, 1)", "ratio")
        check.within(
            "[0, 1)", "head_ratio", "moving_average", "warmup_fraction", "cooldown_fraction", "compensate_decay"
        )
        check.within("(0, 1]", "max_layer_ratio")
        check.one_of("criterion", CRITERIA)
        check.one_of("ranking", RANKINGS)
        check.one_of("normalize", NORMALIZATIONS)
        check.one_of("compensate", COMPENSATIONS)
        check.at_least(1, "prune_every", "min_heads", "min_channels", "channel_multiple")
        check.at_least(1, "gradient_every", "compensate_steps")
        check.at_least(0, "protected_first", "protected_last")
        check.positive("compensate_ridge")
        require(
            self.warmup_fraction + self.cooldown_fraction < 1,
            "prune.warmup_fraction + prune.cooldown_fraction must be below 1",
        )
        require(
            self.head_ratio is None or not self.joint_budget,
            "prune.head_ratio and prune.joint_budget exclude each other: in a joint budget the scores decide",
        )
        require(
            not (self.joint_budget and self.ranking == "uniform"),
            "prune.joint_budget needs prune.ranking: global (uniform cuts the same counts in every layer)",
        )
        compensates, solves = self.compensate != "none", self.compensate == "least_squares"
        check.has_effect("prune.compensate", "compensate_steps", "compensate_decay", given=compensates)
        check.has_effect("prune.compensate: least_squares", "compensate_ridge", given=solves)
        check.has_effect("prune.criterion: gradient", "gradient_every", given=self.criterion == "gradient")

    @property
    def normalization(self) -> str:
        """The normalisation in force: unit norms per module for `uniform`, raw sums for `global`."""
        return self.normalize or ("l2" if self.ranking == "uniform" else "none")


@dataclass(frozen=True)
class TrainConfig:
    """The recovery training. The global batch is the unit: a step means the same on any number of ranks."""

    global_batch_size: int = 128
    micro_batch_size: int = 2
    steps: int | None = None
    epochs: float | None = None
    recovery_steps: int = 0  # that follow `steps`, in which nothing is cut any more
    learning_rate: float = 1e-4
    recovery_learning_rate: float | None = None  # at the start of the recovery; None: as learning_rate
    lr_scheduler: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # 0: no clipping
    gradient_checkpointing: bool = False
    distill_weight: float = 0.0  # w of the loss (1 - w) * cross-entropy + w * KL(dense model || model); 0: off
    distill_top_k: int | None = None  # of the dense model's logits that are kept; None: its final hidden states, exact
    loss_chunk_tokens: int | None = None  # tokens whose logits are held at once; None: as many as make 256 MiB in fp32

    def __post_init__(self) -> None:
        check = Checks("train", self)
        check.at_least(1, "global_batch_size", "micro_batch_size", "steps", "distill_top_k", "loss_chunk_tokens")
        check.at_least(0, "recovery_steps", "warmup_steps", "weight_decay", "max_grad_norm")
        check.positive("epochs", "adam_epsilon")
        check.within("(0, 100]", "learning_rate", "recovery_learning_rate")
        check.within("[0, 1)", "adam_beta1", "adam_beta2")
        check.within("[0, 1]", "distill_weight")
        check.one_of("lr_scheduler", SCHEDULERS)
        require(
            self.global_batch_size % self.micro_batch_size == 0,
            f"train.global_batch_size ({self.global_batch_size}) is not a multiple of "
            f"train.micro_batch_size ({self.micro_batch_size})",
        )
        require((self.steps is None) != (self.epochs is None), "give exactly one of train.steps and train.epochs")
        if self.steps is not None:
            self.check_warmup(self.steps)
        check.has_effect("train.recovery_steps", "recovery_learning_rate", given=self.recovery_steps > 0)
        check.has_effect("train.distill_weight", "distill_top_k", given=self.distill_weight > 0)

    def check_warmup(self, steps: int) -> None:
        """Against the steps without the recovery, which epochs tell only once the data is read.

        Raises:
            UserError: the learning rate would never be reached.
        """
        require(
            self.warmup_steps < steps,
            f"train.warmup_steps must be below the {steps} steps; got {self.warmup_steps}",
        )

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Micro-batches each rank runs per step: G / (micro * W).

        Raises:
            UserError: it is not a whole number; the message lists the world sizes that fit.
        """
        micro_batches = self.global_batch_size // self.micro_batch_size
        if micro_batches % world_size:
            fit = ", ".join(str(w) for w in range(1, micro_batches + 1) if micro_batches % w == 0)
            raise UserError(
                f"train.global_batch_size {self.global_batch_size} in micro-batches of {self.micro_batch_size} cannot "
                f"be split over {world_size} ranks; world sizes that fit: {fit}"
            )
        return micro_batches // world_size


@dataclass(frozen=True)
class EvaluateConfig:
    """Perplexity on the held-out text: fixed windows, 127 predictions per window of 128."""

    window: int = 128
    max_windows: int | None = 160
    batch_size: int = 8  # windows of a forward pass; distillation records as many samples in one, if not more
    every: int | None = None  # steps between evaluations during the run

    def __post_init__(self) -> None:
        check = Checks("evaluate", self)
        check.at_least(2, "window")
        check.at_least(1, "batch_size", "max_windows", "every")


@dataclass(frozen=True)
class CheckpointConfig:
    """Portable checkpoints in `<output_dir>/checkpoints`; one is also written on request and at the end."""

    every: int | None = 100  # steps; None: only on request and at the end
    keep_last: int = 2
    copy_source: bool = False  # keep a copy of the frozen weights, too, instead of naming the source by path and digest

    def __post_init__(self) -> None:
        Checks("checkpoint", self).at_least(1, "every", "keep_last")


@dataclass(frozen=True)
class LoggingConfig:
    """What a person sees while it runs."""

    progress: bool = True
    tensorboard: bool = True
    verbose: bool = False  # DeepSpeed's and transformers' own messages


@dataclass(frozen=True)
class RunConfig:
    """One full run."""

    output_dir: str
    seed: int = 0
    deepspeed: str = "ds_configs/zero3.json"
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=100))
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, f"seed must be in [0, 2**32); got {self.seed}")

    @property
    def recorded_at_once(self) -> int:
        """Samples of a forward pass that records the dense model's outputs: it keeps nothing for a backward one."""
        return max(self.train.micro_batch_size, self.evaluate.batch_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionary, as written to `<output_dir>/config.yaml`."""
        return dataclasses.asdict(self)
