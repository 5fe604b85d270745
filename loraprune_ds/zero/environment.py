"""The environment that ranks start in, checked before DeepSpeed is imported, which would end in a traceback."""

import socket
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from loraprune_ds.errors import UserError, require

# A long write to a slow disk is no reason to end a run. If a rank dies, the launcher ends it.
MINUTES = 60
MOST_MINUTES = 525_600
SILENCE = 80.0  # seconds. With the grace that ranks have to end by themselves, a job ends within two minutes
INTERFACES = Path("/sys/class/net")
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what every launcher sets
NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
HINT = "start deepspeed, torchrun or srun, or unset it"


def launcher_command(module: str, ranks: int | None, environment: Mapping[str, str]) -> list[str]:
    """Returns DeepSpeed's command that starts `module` on this machine, on one rank per GPU if `ranks` is None."""
    with socket.socket() as probe:  # the launcher's default port may be taken by another run
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--master_port", str(port)]
    if ranks is not None:
        require(ranks >= 1, f"--ranks must be at least 1; got {ranks}")
        chosen = environment.get("CUDA_VISIBLE_DEVICES")  # DeepSpeed would ignore it
        require(not chosen, f"--ranks and CUDA_VISIBLE_DEVICES={chosen} both choose the GPUs; give one of them")
        command += ["--num_accelerators", str(ranks)]
    return [*command, "--module", module]


def check_ranks(environment: Mapping[str, str]) -> None:
    """Checks the launcher's variables. Raises UserError if they describe no rank. Without RANK this is the only one."""
    if "RANK" not in environment:
        size = environment.get("WORLD_SIZE", "1")
        require(size == "1", f"WORLD_SIZE is {size!r}, but RANK is not set; {HINT}")
        return
    for name in LAUNCHED:
        require(name in environment, f"RANK is {environment['RANK']!r}, but {name} is not set; {HINT}")
    for name in NUMBERS:
        value = environment.get(name, "0")
        require(value.isdecimal(), f"{name} must be a whole number; got {value!r}")
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    require(rank < size, f"RANK is {rank}, but WORLD_SIZE is {size}; ranks are counted from 0")


def collective_timeout(environment: Mapping[str, str]) -> timedelta:
    """Returns how long a rank waits for the others: DEEPSPEED_TIMEOUT, in minutes. DeepSpeed reads it when imported."""
    given = environment.get("DEEPSPEED_TIMEOUT", str(MINUTES))
    minutes = int(given) if given.isdecimal() else 0
    if not 1 <= minutes <= MOST_MINUTES:
        raise UserError(f"DEEPSPEED_TIMEOUT must be whole minutes from 1 to {MOST_MINUTES}; got {given!r}")
    return timedelta(minutes=minutes)


def longest_silence(environment: Mapping[str, str]) -> float:
    """Returns the seconds after which a silent rank counts as lost: LORAPRUNE_SILENCE."""
    given = environment.get("LORAPRUNE_SILENCE", str(SILENCE))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 86_400:
        raise UserError(f"LORAPRUNE_SILENCE must be seconds from 1 to 86400; got {given!r}")
    return seconds


def deterministic_kernels() -> dict[str, str]:
    """Returns the variables that cuBLAS and flash-attn read when they start, for `train.deterministic`."""
    return {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}


def gloo_interface(environment: Mapping[str, str], interfaces: Path = INTERFACES) -> dict[str, str]:
    """Returns GLOO_SOCKET_IFNAME where only NCCL has been told its network. Empty if that names no interface.

    By default gloo takes the address of the node's name. On Debian it is 127.0.1.1, where no other node finds it.
    NCCL takes a name as a prefix. After "=" it is the full name, after "^" one to avoid.
    """
    names = environment.get("NCCL_SOCKET_IFNAME", "").removeprefix("=")
    if environment.get("GLOO_SOCKET_IFNAME") or names.startswith("^"):
        return {}
    found = [name for name in names.split(",") if name and (interfaces / name).exists()]
    return {"GLOO_SOCKET_IFNAME": found[0]} if found else {}


def check_local_rank(environment: Mapping[str, str], devices: int) -> None:
    """Checks that this rank sees its own device, whose number is LOCAL_RANK by DeepSpeed's rule."""
    rank, local_rank = environment["RANK"], environment["LOCAL_RANK"]
    if int(local_rank) >= devices:
        raise UserError(
            f"rank {rank} has LOCAL_RANK {local_rank} and sees {devices} accelerator{'s' * (devices != 1)}; start no "
            "more ranks on a node than it has, and let each see all of them (srun: --gpus-per-node and "
            "--gpu-bind=none, not --gpus-per-task)"
        )
