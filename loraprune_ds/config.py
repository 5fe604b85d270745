"""One YAML file = one run, read into frozen dataclasses.

Every value is checked once, here, and the message names the key; the rest of the package trusts the types.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loraprune_ds.errors import UserError

DTYPES = ("bfloat16", "float16", "float32")
CRITERIA = ("lora", "lora_squared", "gradient", "magnitude", "random")
RANKINGS = ("uniform", "global")
NORMALIZATIONS = ("l2", "none")
COMPENSATIONS = ("none", "bias", "least_squares")
SCHEDULERS = ("linear", "cosine", "constant")
DATA_FORMATS = ("text", "instruction")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def require(ok: bool, message: str) -> None:
    """Raises UserError with `message` unless `ok`."""
    if not ok:
        raise UserError(message)


def _one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    require(value in allowed, f"{key} must be one of {', '.join(allowed)}; got {value!r}")


def _has_effect(section: str, values: Any, keys: Sequence[str], needed: str, *, given: bool) -> None:
    """A setting that nothing would read was meant for something: another setting was forgotten."""
    defaults = {field.name: field.default for field in dataclasses.fields(values)}
    for key in keys:
        require(given or getattr(values, key) == defaults[key], f"{section}.{key} has no effect without {needed}")


@dataclass(frozen=True)
class ModelConfig:
    """Which network. `path`: a local folder, a hub id, or `embedded` (SmolLM2-135M from the PyPI package)."""

    path: str = "embedded"
    revision: str | None = None
    dtype: str = "bfloat16"
    attn_implementation: str = "sdpa"
    adapter: str | None = None  # folder of a PEFT LoRA adapter to start from

    def __post_init__(self) -> None:
        _one_of("model.dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class LoraConfig:
    """PEFT's own names. The criterion needs LoRA on all seven linears of a decoder layer, so they are not a choice."""

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.05

    def __post_init__(self) -> None:
        require(self.r >= 1, f"lora.r must be at least 1; got {self.r}")
        require(self.lora_alpha > 0, f"lora.lora_alpha must be positive; got {self.lora_alpha}")
        require(0 <= self.lora_dropout < 1, f"lora.lora_dropout must be in [0, 1); got {self.lora_dropout}")


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
        _one_of("data.format", self.format, DATA_FORMATS)
        require(self.window >= 2, f"data.window must be at least 2 tokens; got {self.window}")
        require(
            0 < self.held_out_fraction < 1, f"data.held_out_fraction must be in (0, 1); got {self.held_out_fraction}"
        )
        require(
            self.max_samples is None or self.max_samples >= 1,
            f"data.max_samples must be at least 1; got {self.max_samples}",
        )


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
        require(0 < self.ratio < 1, f"prune.ratio must be in (0, 1); got {self.ratio}")
        require(
            self.head_ratio is None or 0 <= self.head_ratio < 1,
            f"prune.head_ratio must be in [0, 1); got {self.head_ratio}",
        )
        require(
            self.head_ratio is None or not self.joint_budget,
            "prune.head_ratio and prune.joint_budget exclude each other: in a joint budget the scores decide",
        )
        _one_of("prune.criterion", self.criterion, CRITERIA)
        _one_of("prune.ranking", self.ranking, RANKINGS)
        if self.normalize is not None:
            _one_of("prune.normalize", self.normalize, NORMALIZATIONS)
        require(0 <= self.moving_average < 1, f"prune.moving_average must be in [0, 1); got {self.moving_average}")
        _one_of("prune.compensate", self.compensate, COMPENSATIONS)
        require(
            0 <= self.compensate_decay < 1, f"prune.compensate_decay must be in [0, 1); got {self.compensate_decay}"
        )
        require(self.compensate_ridge > 0, f"prune.compensate_ridge must be positive; got {self.compensate_ridge}")
        counts = ("prune_every", "min_heads", "min_channels", "channel_multiple", "gradient_every", "compensate_steps")
        for key in counts:
            require(getattr(self, key) >= 1, f"prune.{key} must be at least 1; got {getattr(self, key)}")
        for key in ("warmup_fraction", "cooldown_fraction"):
            require(0 <= getattr(self, key) < 1, f"prune.{key} must be in [0, 1); got {getattr(self, key)}")
        require(
            self.warmup_fraction + self.cooldown_fraction < 1,
            "prune.warmup_fraction + prune.cooldown_fraction must be below 1",
        )
        require(0 < self.max_layer_ratio <= 1, f"prune.max_layer_ratio must be in (0, 1]; got {self.max_layer_ratio}")
        require(self.protected_last >= 0, f"prune.protected_last must not be negative; got {self.protected_last}")
        require(
            self.protected_first is None or self.protected_first >= 0,
            f"prune.protected_first must not be negative; got {self.protected_first}",
        )
        require(
            not (self.joint_budget and self.ranking == "uniform"),
            "prune.joint_budget needs prune.ranking: global (uniform cuts the same counts in every layer)",
        )
        averaged = ("compensate_steps", "compensate_decay")
        _has_effect("prune", self, averaged, "prune.compensate", given=self.compensate != "none")
        least_squares = self.compensate == "least_squares"
        _has_effect("prune", self, ["compensate_ridge"], "prune.compensate: least_squares", given=least_squares)
        scored = self.criterion == "gradient"
        _has_effect("prune", self, ["gradient_every"], "prune.criterion: gradient", given=scored)

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
    distill_weight: float = 0.0  # w of the loss (1 - w) * cross-entropy + w * KL(uncut model || model); 0: off
    distill_top_k: int | None = None  # of the uncut model's logits that are kept; None: its final hidden states, exact
    loss_chunk_tokens: int | None = None  # tokens whose logits are held at once; None: as many as make 256 MiB in fp32

    def __post_init__(self) -> None:
        for key in ("global_batch_size", "micro_batch_size"):
            require(getattr(self, key) >= 1, f"train.{key} must be at least 1; got {getattr(self, key)}")
        require(
            self.global_batch_size % self.micro_batch_size == 0,
            f"train.global_batch_size ({self.global_batch_size}) is not a multiple of "
            f"train.micro_batch_size ({self.micro_batch_size})",
        )
        require((self.steps is None) != (self.epochs is None), "give exactly one of train.steps and train.epochs")
        require(self.steps is None or self.steps >= 1, f"train.steps must be at least 1; got {self.steps}")
        require(self.epochs is None or self.epochs > 0, f"train.epochs must be positive; got {self.epochs}")
        require(
            self.loss_chunk_tokens is None or self.loss_chunk_tokens >= 1,
            f"train.loss_chunk_tokens must be at least 1; got {self.loss_chunk_tokens}",
        )
        require(self.learning_rate > 0, f"train.learning_rate must be positive; got {self.learning_rate}")
        require(self.recovery_steps >= 0, f"train.recovery_steps must not be negative; got {self.recovery_steps}")
        rate = self.recovery_learning_rate
        require(rate is None or rate > 0, f"train.recovery_learning_rate must be positive; got {rate}")
        recovers = self.recovery_steps > 0
        _has_effect("train", self, ["recovery_learning_rate"], "train.recovery_steps", given=recovers)
        _one_of("train.lr_scheduler", self.lr_scheduler, SCHEDULERS)
        require(self.warmup_steps >= 0, f"train.warmup_steps must not be negative; got {self.warmup_steps}")
        for key in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, key) < 1, f"train.{key} must be in [0, 1); got {getattr(self, key)}")
        require(self.adam_epsilon > 0, f"train.adam_epsilon must be positive; got {self.adam_epsilon}")
        require(0 <= self.distill_weight <= 1, f"train.distill_weight must be in [0, 1]; got {self.distill_weight}")
        require(
            self.distill_top_k is None or self.distill_top_k >= 1,
            f"train.distill_top_k must be at least 1; got {self.distill_top_k}",
        )
        _has_effect("train", self, ["distill_top_k"], "train.distill_weight", given=self.distill_weight > 0)
        for key in ("weight_decay", "max_grad_norm"):
            require(getattr(self, key) >= 0, f"train.{key} must not be negative; got {getattr(self, key)}")

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
    batch_size: int = 8
    every: int | None = None  # steps between evaluations during the run

    def __post_init__(self) -> None:
        require(self.window >= 2, f"evaluate.window must be at least 2 tokens; got {self.window}")
        require(self.batch_size >= 1, f"evaluate.batch_size must be at least 1; got {self.batch_size}")
        for key in ("max_windows", "every"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"evaluate.{key} must be at least 1; got {value}")


@dataclass(frozen=True)
class CheckpointConfig:
    """Portable checkpoints in `<output_dir>/checkpoints`; one is also written on request and at the end."""

    every: int | None = 100  # steps; None: only on request and at the end
    keep_last: int = 2
    copy_source: bool = False  # keep a copy of the uncut weights too, instead of naming the source by path and digest

    def __post_init__(self) -> None:
        require(self.every is None or self.every >= 1, f"checkpoint.every must be at least 1; got {self.every}")
        require(self.keep_last >= 1, f"checkpoint.keep_last must be at least 1; got {self.keep_last}")


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

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionary, as written to `<output_dir>/config.yaml`."""
        return dataclasses.asdict(self)
