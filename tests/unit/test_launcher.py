"""The command that starts ranks on this machine."""

import pytest

from loraprune_ds.errors import UserError
from loraprune_ds.zero.launcher import launcher_command


def test_the_number_of_ranks_is_deepspeeds_without_one() -> None:
    assert "--num_accelerators" not in launcher_command("some.module", None, {"CUDA_VISIBLE_DEVICES": "2,3"})
    command = launcher_command("some.module", 3, {})
    assert command[command.index("--num_accelerators") + 1] == "3"
    assert command[-2:] == ["--module", "some.module"]


def test_two_choices_of_gpus_are_refused() -> None:
    with pytest.raises(UserError, match=r"^--ranks and CUDA_VISIBLE_DEVICES=2,3 both choose the GPUs"):
        launcher_command("some.module", 2, {"CUDA_VISIBLE_DEVICES": "2,3"})
