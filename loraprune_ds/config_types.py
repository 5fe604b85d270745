"""The types of settings, and how their values are read."""

import dataclasses
import re
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, model_validator
from pydantic_core import ArgsKwargs

from loraprune_ds.errors import UserError, require


@dataclasses.dataclass(frozen=True)
class Amount:
    """A number of parameters or bytes, and the size of one `suffix`."""

    value: float
    unit: Literal["parameters", "bytes"]
    suffix: str
    scale: float

    def format(self, value: float) -> str:
        """Writes a value in the unit of this one, such as '4.50 B' or '24.00 GiB'."""
        return f"{value / self.scale:,.2f} {self.suffix}".rstrip()


def read_amount(text: str, key: str) -> Amount:
    """Reads '4.5B' as parameters, '24GiB' or '24GB' as bytes. Raises UserError, which names the key, for other text."""
    match = re.fullmatch(r"(\d+\.?\d*)\s*([a-zA-Z]*)", text.strip())
    scales = {"": 1.0} | COUNTS | BYTES
    if match is None or match[2] not in scales:
        raise UserError(
            f"{key} must be parameters, such as 4.5B, or memory, such as 24GiB; got {text!r}"
        )
    number = float(match[1])
    suffix = match[2]
    require(number > 0, f"{key} must be above 0; got {text!r}")
    unit = "bytes" if suffix in BYTES else "parameters"
    return Amount(number * scales[suffix], unit, suffix, scales[suffix])


def _number(value: Any) -> Any:
    """Reads `1e-4`, which YAML 1.1 takes for a string."""
    with suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


NUMBER = BeforeValidator(_number)
Positive = Annotated[float, Field(gt=0), NUMBER]
AtLeast0 = Annotated[float, Field(ge=0), NUMBER]
FractionOr0 = Annotated[float, Field(ge=0, lt=1), NUMBER]
Fraction = Annotated[float, Field(gt=0, lt=1), NUMBER]
LearningRate = Annotated[float, Field(gt=0, le=100), NUMBER]
Count = Annotated[int, Field(ge=1)]
CountOr0 = Annotated[int, Field(ge=0)]
Window = Annotated[int, Field(ge=2)]
AmountText = Annotated[
    str, BeforeValidator(lambda value: str(value) if type(value) in (int, float) else value)
]
Dtype = Literal["bfloat16", "float16", "float32"]
Frozen = Literal["int8", "nf4"]
EngineName = Literal["zero3", "local", "fsdp2"]  # which saved states record
Criterion = Literal["lora", "fisher", "magnitude", "random"]
Ranking = Literal["uniform", "global"]
Normalization = Literal["l2", "step", "none"]
Compensation = Literal["none", "least_squares"]
Scheduler = Literal["linear", "cosine", "constant"]
Reporter = Literal["tensorboard", "wandb", "trackio", "mlflow"]
DataFormat = Literal["text", "instruction", "seq2seq", "chat"]
COUNTS = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
BYTES = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
BYTES |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
ONE, LIST = "(one)", "(list)"  # the branches of a union, which errors name
IS_LIST = Discriminator(lambda value: LIST if isinstance(value, list) else ONE)


def require_one(first: object, second: object, keys: str) -> None:
    """Raises UserError, which names the `keys`, unless exactly one of two settings is given."""
    require((first is None) != (second is None), f"give exactly one of {keys}; null takes one away")


def replaces_default(key: str, *others: str) -> Any:
    """Makes a validator, which drops the default of `key` if only one of the `others` is given."""

    def validate(given: Any) -> Any:
        values = given
        if isinstance(given, ArgsKwargs):
            values = given.kwargs or {}
        if isinstance(values, dict) and key not in values:
            if any(values.get(other) is not None for other in others):
                return ArgsKwargs((), values | {key: None})
        return given

    return model_validator(mode="before")(validate)
