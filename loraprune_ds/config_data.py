"""Describes the data of a run: the `data` section of its YAML. Holds the types of values that all sections share."""

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from loraprune_ds.errors import require


def _number(value: Any) -> Any:
    """Reads `1e-4`, which YAML 1.1 takes for a string."""
    with suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


NUMBER = BeforeValidator(_number)
Positive = Annotated[float, Field(gt=0), NUMBER]
AtLeast0 = Annotated[float, Field(ge=0), NUMBER]
Fraction = Annotated[float, Field(ge=0, lt=1), NUMBER]
Part = Annotated[float, Field(gt=0, lt=1), NUMBER]
PartOrAll = Annotated[float, Field(gt=0, le=1), NUMBER]
LearningRate = Annotated[float, Field(gt=0, le=100), NUMBER]
Count = Annotated[int, Field(ge=1)]
CountOr0 = Annotated[int, Field(ge=0)]
Window = Annotated[int, Field(ge=2)]
Size = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) in (int, float) else value)]
DataFormat = Literal["text", "instruction", "chat"]

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

# Exactly one of each pair must be given.
EITHER = {"prune": ("ratio", "target"), "train": ("steps", "epochs"), "data": ("held_out", "held_out_fraction")}
MEMORY = (lambda prune: prune.sizes_memory, "a prune.target in bytes, such as 24GiB")
REFIT = (lambda prune: prune.compensate != "none", "prune.compensate: least_squares")
DISTILLATION = (lambda train: train.distill_weight > 0, "train.distill_weight")
ANSWERS = (lambda data: not data.only_text, "data.format instruction or chat")
# What a setting needs. Without it nothing reads the setting, and its user wanted an effect.
NEEDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prune.target_context": MEMORY,
    "prune.target_weight_bits": MEMORY,
    "prune.compensate_steps": REFIT,
    "prune.compensate_decay": REFIT,
    "train.distill_temperature": DISTILLATION,
    "train.distill_top_k": DISTILLATION,
    "data.packing": ANSWERS,
}


def check_settings(section: Any, name: str) -> None:
    """Checks a section against `EITHER` and `NEEDS`.

    Raises:
        UserError: a setting lacks another one, or excludes it.
    """
    one, other = EITHER[name]
    require(
        (getattr(section, one) is None) != (getattr(section, other) is None),
        f"give exactly one of {name}.{one} and {name}.{other}; null takes one away",
    )
    for setting, (is_read, needed) in NEEDS.items():
        of, key = setting.split(".")
        if of == name and getattr(section, key) != getattr(type(section), key):
            require(is_read(section), f"{setting} has no effect without {needed}")


def replace_default(given: Any, key: str, other: str) -> Any:
    """Leaves `key` out where only the `other` is given. For a validator that runs before all others."""
    values = given.kwargs or {} if isinstance(given, ArgsKwargs) else given
    if values.get(other) is None or key in values:
        return given
    return ArgsKwargs((), values | {key: None})


@dataclass(frozen=True, config=STRICT)
class MixtureEntry:
    """Names one of several sources in `data.path`. Missing keys come from `data`."""

    path: str
    weight: Positive | None = None  # Its samples per samples of the others. `null`: all samples, once.
    name: str | None = None
    split: str | None = None
    format: DataFormat | None = None
    text_field: str | None = None
    prompt_field: str | None = None
    input_field: str | None = None
    response_field: str | None = None


@dataclass(frozen=True, config=STRICT)
class DataSource:
    """Describes one source. `section` is where the config names it."""

    path: str
    name: str | None
    split: str
    format: DataFormat
    text_field: str
    prompt_field: str
    input_field: str | None
    response_field: str
    weight: Positive | None = None
    section: str = "data"


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Names the texts to tune on and those to hold out."""

    # a file, folder, glob or `datasets` name, `embedded` (Python's help topics), or a list of these: a mixture
    path: str | list[MixtureEntry] = "embedded"
    name: str | None = None  # configuration of a `datasets` data set
    split: str = "train"  # split of a `datasets` data set
    format: DataFormat = "text"  # `text` packs documents into windows. The others train on answers alone
    text_field: str = "text"  # field with the text of a row
    prompt_field: str = "instruction"  # field with the request
    input_field: str | None = "input"  # field with a text that the request is about. None: no such field
    response_field: str = "response"  # field with the answer
    window: Window = 512  # tokens of a sample
    held_out: str | None = None  # text, JSON or JSONL file for perplexity. None: a part of `path`
    held_out_fraction: Part | None = 0.1  # size of that part. None if `held_out` is given
    max_samples: Count | None = None  # most samples from each source. None: all
    packing: bool = False  # several instructions or conversations share a window, without seeing each other

    @model_validator(mode="before")
    @classmethod
    def _held_out_replaces_default(cls, given: Any) -> Any:
        return replace_default(given, "held_out_fraction", "held_out")

    def __post_init__(self) -> None:
        require(self.path != [] and all(source.path for source in self.sources), "data.path, or a path in it, is empty")
        check_settings(self, "data")
        entries = [] if isinstance(self.path, str) else self.path
        for i, entry in enumerate(entries):
            first = "a weight" if entry.weight is None else "no weight"
            require(
                (entry.weight is None) == (entries[0].weight is None),
                f"data.path[{i}].weight: data.path[0] has {first}; give all entries one, or none",
            )

    @property
    def only_text(self) -> bool:
        return {source.format for source in self.sources} == {"text"}

    @property
    def sources(self) -> list[DataSource]:
        """The sources that `path` names: one, or the entries of a mixture."""
        keys = [f.name for f in dataclasses.fields(DataSource) if f.name not in ("path", "weight", "section")]
        shared = {key: getattr(self, key) for key in keys}
        if isinstance(self.path, str):
            return [DataSource(path=self.path, **shared)]
        given = [{key: value for key, value in vars(entry).items() if value is not None} for entry in self.path]
        return [DataSource(**shared | values, section=f"data.path[{i}]") for i, values in enumerate(given)]
