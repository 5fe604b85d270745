"""Describes the data of a run: the `data` section of its YAML."""

import dataclasses
from typing import Any, Literal

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from loraprune_ds.config_types import STRICT, Count, Part, Positive, Window, replace_default
from loraprune_ds.errors import require

DataFormat = Literal["text", "instruction", "chat"]


@dataclass(frozen=True, config=STRICT)
class MixtureEntry:
    """Names one of several sources in `data.path`. Keys that are not given are those of `data`."""

    path: str
    weight: Positive | None = None  # samples of this source per samples of the others. None: all samples, once
    name: str | None = None
    split: str | None = None
    format: DataFormat | None = None
    text_field: str | None = None
    prompt_field: str | None = None
    input_field: str | None = None
    response_field: str | None = None


@dataclass(frozen=True, config=STRICT)
class DataSource:
    """Holds all that reading one source needs. `section` is where the config names it."""

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
    """Names the texts to tune on and those to hold out.

    `path`: `embedded` (Python's own help topics), a file or a glob of `.txt`, `.json`, `.jsonl`, or a `datasets` name.
    Or a list of such entries, which are mixed.
    """

    path: str | list[MixtureEntry] = "embedded"
    name: str | None = None  # configuration of a `datasets` dataset
    split: str = "train"
    format: DataFormat = "text"  # text: documents packed to windows. Of others the loss takes answers only
    text_field: str = "text"
    prompt_field: str = "instruction"
    input_field: str | None = "input"
    response_field: str = "response"
    window: Window = 512  # tokens of one sample
    held_out: str | None = None  # text, JSON or JSONL file for perplexity. None: a part of `path`
    held_out_fraction: Part | None = 0.1  # that part. None: `held_out` is given
    max_samples: Count | None = None  # of each source
    packing: bool = False  # several instructions or conversations per window, which do not see each other

    @model_validator(mode="before")
    @classmethod
    def _held_out_replaces_default(cls, given: Any) -> Any:
        return replace_default(given, "held_out_fraction", "held_out")

    def __post_init__(self) -> None:
        require(
            (self.held_out is None) != (self.held_out_fraction is None),
            "give exactly one of data.held_out and data.held_out_fraction; null takes one away",
        )
        entries = [] if isinstance(self.path, str) else self.path
        require(self.path != [] and all(source.path for source in self.sources), "data.path, or a path in it, is empty")
        formats = {source.format for source in self.sources}
        require(not self.packing or formats != {"text"}, "data.packing has no effect on data.format text")
        for i, entry in enumerate(entries):
            given = "a weight" if entry.weight is None else "no weight"
            require(
                (entry.weight is None) == (entries[0].weight is None),
                f"data.path[{i}].weight: data.path[0] has {given}; give all entries one, or none",
            )

    @property
    def sources(self) -> list[DataSource]:
        """The sources that `path` names: one, or the entries of a mixture."""
        keys = [f.name for f in dataclasses.fields(DataSource) if f.name not in ("path", "weight", "section")]
        shared = {key: getattr(self, key) for key in keys}
        if isinstance(self.path, str):
            return [DataSource(path=self.path, **shared)]
        given = [{key: value for key, value in vars(entry).items() if value is not None} for entry in self.path]
        return [DataSource(**shared | values, section=f"data.path[{i}]") for i, values in enumerate(given)]
