"""The command that starts ranks on this machine, by DeepSpeed's launcher."""

import socket
import sys
from collections.abc import Mapping

from loraprune_ds.errors import require


def launcher_command(module: str, ranks: int | None, environment: Mapping[str, str]) -> list[str]:
    """Builds the command that starts `module` on so many ranks. What is appended to it are the module's arguments.

    Args:
        ranks: None leaves the number to DeepSpeed: one per GPU.

    Raises:
        UserError: the ranks cannot be chosen so.
    """
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--master_port", str(_free_port())]
    if ranks is not None:
        require(ranks >= 1, f"--ranks must be at least 1; got {ranks}")
        chosen = environment.get("CUDA_VISIBLE_DEVICES")  # which DeepSpeed would ignore beside a number
        require(not chosen, f"--ranks and CUDA_VISIBLE_DEVICES={chosen} both choose the GPUs; give one of them")
        command += ["--num_accelerators", str(ranks)]
    return [*command, "--module", module]


def _free_port() -> int:
    """Returns a port for the ranks to meet. The launcher's own default may be taken by another run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
