"""A DeepSpeed that lacks what in-place pruning relies on is refused by name, with its version, before any work."""

import deepspeed
import pytest
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from loraprune_ds.errors import UserError
from loraprune_ds.zero import private
from loraprune_ds.zero.private import check_private_attributes


def refusal() -> str:
    with pytest.raises(UserError) as caught:
        check_private_attributes()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"deepspeed {deepspeed.__version__} lacks what in-place pruning relies on (")
    return message.split("(", 1)[1].rsplit(")", 1)[0]


def test_the_installed_deepspeed_has_them_all() -> None:
    check_private_attributes()


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (DeepSpeedZeroOptimizer_Stage3, "set_grad_positions"),
        (DeepSpeedZeroOptimizer_Stage3, "_setup_for_real_optimizer"),
        (PartitionedParameterCoordinator, "_invalidate_trace"),
        (Init, "_enable_mem_efficient_linear"),
    ],
)
def test_a_missing_method_is_named(monkeypatch: pytest.MonkeyPatch, cls: type, name: str) -> None:
    monkeypatch.delattr(next(base for base in cls.__mro__ if name in vars(base)), name)
    assert refusal() == f"{cls.__name__}.{name}"


def test_a_renamed_converter_takes_the_parameters_attributes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Init, "_convert_to_deepspeed_param")
    missing = refusal().split(", ")
    assert missing == ["Init._convert_to_deepspeed_param", *(f"Parameter.{n}" for n in private.PARAMETER_ATTRIBUTES)]


@pytest.mark.parametrize("name", private.OPTIMIZER_ATTRIBUTES)
def test_a_missing_optimizer_attribute_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As if DeepSpeed's constructor assigned everything but this one."""
    names = tuple(n for n in DeepSpeedZeroOptimizer_Stage3.__init__.__code__.co_names if n != name)
    monkeypatch.setattr(DeepSpeedZeroOptimizer_Stage3, "__init__", FakeFunction(names))
    assert refusal() == f"DeepSpeedZeroOptimizer_Stage3.{name}"


@pytest.mark.parametrize("name", private.PARAMETER_ATTRIBUTES)
def test_a_missing_parameter_attribute_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    names = tuple(n for n in Init._convert_to_deepspeed_param.__code__.co_names if n != name)
    monkeypatch.setattr(Init, "_convert_to_deepspeed_param", FakeFunction(names))
    assert refusal() == f"Parameter.{name}"


def test_all_that_is_missing_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "OPTIMIZER_METHODS", ("gone", "step", "lost"))
    monkeypatch.setattr(deepspeed, "__version__", "9.9.9")
    assert refusal() == "DeepSpeedZeroOptimizer_Stage3.gone, DeepSpeedZeroOptimizer_Stage3.lost"
    with pytest.raises(UserError, match=r"^deepspeed 9\.9\.9 lacks .*; install a version that pyproject\.toml allows$"):
        check_private_attributes()


class FakeFunction:
    """Something with a code object that mentions only `names`."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.__code__ = type("Code", (), {"co_names": names})
