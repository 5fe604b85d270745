"""Builds DeepSpeed's shared-memory collective for CPU ranks ahead of time: at first use it would look like a hang."""

import shutil
import sys

from loraprune_ds.errors import UserError
from loraprune_ds.zero.device import accelerator, is_cpu
from loraprune_ds.zero.engine import quiet_deepspeed, quiet_stdout


def prebuild_ops() -> None:
    """Compiles the op into torch's extension cache, about 35 s the first time; nothing to do on a GPU.

    Raises:
        UserError: no C++ compiler or no ninja.
    """
    if not is_cpu():
        return
    for program, package in (("g++", "g++"), ("ninja", "ninja-build")):
        if shutil.which(program) is None:
            raise UserError(f"DeepSpeed compiles an op for CPU ranks and finds no {program}; install {package}")
    with quiet_stdout():
        builder = accelerator().create_op_builder("ShareMemCommBuilder")
        assert builder is not None
        try:
            builder.load(verbose=False)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"DeepSpeed's CPU op (deepspeed_shm_comm) does not build: {reason}") from None


if __name__ == "__main__":
    quiet_deepspeed()
    try:
        prebuild_ops()
    except UserError as error:
        sys.exit(str(error))
