"""Holds the types of values that the sections of a run's YAML share."""

from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic_core import ArgsKwargs

# YAML 1.1 reads `1e-4` as a string. Stands last in a type, or the type's JSON schema would lack the bounds.
NUMBER = BeforeValidator(lambda value: float(value) if isinstance(value, str) else value)
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

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def replace_default(given: Any, key: str, other: str) -> Any:
    """Leaves `key` out where only the `other` is given. For a validator that runs before all others."""
    values = given.kwargs or {} if isinstance(given, ArgsKwargs) else given
    if values.get(other) is None or key in values:
        return given
    return ArgsKwargs((), values | {key: None})
