"""Checks what ranks take from the environment, before DeepSpeed is imported. DeepSpeed would end with a traceback."""

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


def check_ranks(environment: Mapping[str, str]) -> None:
    """Checks what the launcher says about this rank. torch would wait for ranks that never come, or end in a traceback.

    Without RANK this is the only rank.

    Raises:
        UserError: a variable is missing, is no number, or names no rank.
    """
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
    """Returns how long a rank waits for the others: DEEPSPEED_TIMEOUT, in minutes.

    DeepSpeed reads it as it is imported.

    Raises:
        UserError: it is no such number.
    """
    given = environment.get("DEEPSPEED_TIMEOUT", str(MINUTES))
    minutes = int(given) if given.isdecimal() else 0
    if not 1 <= minutes <= MOST_MINUTES:
        raise UserError(f"DEEPSPEED_TIMEOUT must be whole minutes from 1 to {MOST_MINUTES}; got {given!r}")
    return timedelta(minutes=minutes)


def longest_silence(environment: Mapping[str, str]) -> float:
    """Returns the seconds after which a rank that gives no sign counts as lost: LORAPRUNE_SILENCE.

    Raises:
        UserError: it is no number from 1 to 86,400.
    """
    given = environment.get("LORAPRUNE_SILENCE", str(SILENCE))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 86_400:
        raise UserError(f"LORAPRUNE_SILENCE must be seconds from 1 to 86400; got {given!r}")
    return seconds


def deterministic_kernels() -> dict[str, str]:
    """Returns what cuBLAS and flash-attn read from the environment when they start, for `train.deterministic`."""
    return {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}


def gloo_interface(environment: Mapping[str, str], interfaces: Path = INTERFACES) -> dict[str, str]:
    """Returns GLOO_SOCKET_IFNAME if only NCCL has been told which network to take. Empty if that is no interface.

    gloo by itself takes the address of the node's own name. On Debian that is 127.0.1.1, where no other node finds it.
    To NCCL a name is the beginning of one. After "=" it is the whole name, after "^" one to leave out.
    """
    names = environment.get("NCCL_SOCKET_IFNAME", "").removeprefix("=")
    if environment.get("GLOO_SOCKET_IFNAME") or names.startswith("^"):
        return {}
    found = [name for name in names.split(",") if name and (interfaces / name).exists()]
    return {"GLOO_SOCKET_IFNAME": found[0]} if found else {}


def check_local_rank(environment: Mapping[str, str], devices: int) -> None:
    """Checks that this rank sees its own device. By DeepSpeed's rule its number is LOCAL_RANK.

    Raises:
        UserError: it sees too few.
    """
    rank, local_rank = environment["RANK"], environment["LOCAL_RANK"]
    if int(local_rank) >= devices:
        raise UserError(
            f"rank {rank} has LOCAL_RANK {local_rank} and sees {devices} accelerator{'s' * (devices != 1)}; start no "
            "more ranks on a node than it has, and let each see all of them (srun: --gpus-per-node and "
            "--gpu-bind=none, not --gpus-per-task)"
        )
