"""The rounds in which speed is measured, in transformers and in servers."""

from dataclasses import dataclass, fields

from loraprune_ds.errors import require


@dataclass(frozen=True)
class SpeedSettings:
    """Describes a round: `prompt` random tokens, then `generated` greedy ones. `rounds` follow a warm-up."""

    prompt: int = 512
    generated: int = 32
    rounds: int = 5

    def __post_init__(self) -> None:
        for field in fields(SpeedSettings):
            value = getattr(self, field.name)
            require(value >= 1, f"--{field.name} must be at least 1; got {value}")
