"""The environment that a launcher or Slurm gives the ranks of a job."""

import logging
import os
import re
import socket
import sys
import warnings
from collections.abc import Mapping
from datetime import timedelta

from loraprune_ds.errors import require

Environment = Mapping[str, str]  # the variables of a process
# A long write to a slow disk must not end a run. If a rank dies, the launcher ends the run.
MINUTES = 60
MOST_MINUTES = 525_600
SILENCE = 80.0  # seconds. With the grace period for ranks, a job ends within two minutes
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # every launcher sets these
NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
HINT = "start deepspeed, torchrun or srun, or unset it"
# cuBLAS and flash-attn read these at their start, for `train.deterministic`.
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}


def silence_libraries() -> None:
    """Silences the libraries. Must run before they are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # otherwise every rank reports every retry
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    logging.getLogger("deepspeed").setLevel(logging.ERROR)
    for name in (
        "bitsandbytes",
        "kernels",
    ):  # PEFT imports the one if it is installed, and that the other
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed's other logger prints to stdout from its import on, and sets its own level.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


def launcher_command(module: str, ranks: int | None, environment: Environment) -> list[str]:
    """Returns DeepSpeed's command that starts `module` on this machine, on one rank per GPU if `ranks` is None."""
    with socket.socket() as probe:  # another run may use the launcher's default port
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--quiet",
        "--master_port",
        str(port),
    ]
    if ranks is not None:
        chosen = environment.get("CUDA_VISIBLE_DEVICES")  # DeepSpeed would ignore it
        require(
            not chosen,
            f"--ranks and CUDA_VISIBLE_DEVICES={chosen} both choose the GPUs; give one of them",
        )
        command += ["--num_accelerators", str(ranks)]
    return [*command, "--module", module]


def adopt_srun_ranks() -> None:
    """Sets the environment variables of a launcher, if srun starts the ranks without one."""
    if "RANK" not in os.environ:
        os.environ |= srun_ranks(os.environ)


def srun_ranks(environment: Environment) -> dict[str, str]:
    """Returns RANK, LOCAL_RANK, WORLD_SIZE and a meeting point from srun's variables. Empty outside a job step."""
    # SLURM_NTASKS is not enough. A batch script has it, too, and its commands without srun are one process.
    if "SLURM_STEP_NUM_TASKS" not in environment:
        return {}
    # gpu[01-04,7],login -> gpu[01-04,7]
    nodes = re.split(r",(?![^\[]*\])", environment["SLURM_STEP_NODELIST"])
    # -> gpu01, which has task 0. scontrol may be missing
    first_node = re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes[0])
    job_and_step = int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    port = 20_000 + job_and_step % 12_000
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": environment.get("MASTER_ADDR", first_node),
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
    }


def check_ranks(environment: Environment) -> None:
    """Checks the launcher's variables. Raises UserError if they describe no rank. Without RANK there is one rank."""
    if "RANK" not in environment:
        size = environment.get("WORLD_SIZE", "1")
        require(size == "1", f"WORLD_SIZE is {size!r}, but RANK is not set; {HINT}")
        return
    for name in LAUNCHED:
        require(
            name in environment, f"RANK is {environment['RANK']!r}, but {name} is not set; {HINT}"
        )
    for name in NUMBERS:
        value = environment.get(name, "0")
        require(value.isdecimal(), f"{name} must be a whole number; got {value!r}")
    rank = int(environment["RANK"])
    size = int(environment["WORLD_SIZE"])
    require(rank < size, f"RANK is {rank}, but WORLD_SIZE is {size}; ranks are counted from 0")


def several_ranks(environment: Environment) -> bool:
    """Returns whether a launcher has started more than one rank."""
    return environment.get("WORLD_SIZE", "1") != "1"


def check_local_rank(environment: Environment, devices: int) -> None:
    """Checks that this rank sees its device. DeepSpeed takes the one with the number LOCAL_RANK."""
    local_rank = environment["LOCAL_RANK"]
    require(
        int(local_rank) < devices,
        f"rank {environment['RANK']} has LOCAL_RANK {local_rank} and sees {devices} "
        f"accelerator{'s' * (devices != 1)}; start no more ranks on a node than it has, and let each see all of "
        "them (srun: --gpus-per-node and --gpu-bind=none, not --gpus-per-task)",
    )


def collective_timeout(environment: Environment) -> timedelta:
    """Returns how long a rank waits for the others: DEEPSPEED_TIMEOUT minutes. DeepSpeed reads it on import."""
    text = environment.get("DEEPSPEED_TIMEOUT", str(MINUTES))
    minutes = int(text) if text.isdecimal() else 0
    require(
        1 <= minutes <= MOST_MINUTES,
        f"DEEPSPEED_TIMEOUT must be whole minutes from 1 to {MOST_MINUTES}; got {text!r}",
    )
    return timedelta(minutes=minutes)


def longest_silence(environment: Environment) -> float:
    """Returns the seconds after which a silent rank counts as lost: LORAPRUNE_SILENCE."""
    text = environment.get("LORAPRUNE_SILENCE", str(SILENCE))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    require(
        1 <= seconds <= 86_400, f"LORAPRUNE_SILENCE must be seconds from 1 to 86400; got {text!r}"
    )
    return seconds


def gloo_interface(environment: Environment) -> dict[str, str]:
    """Returns GLOO_SOCKET_IFNAME if only NCCL's network is set. Empty if that names no interface."""
    # By default gloo takes the address of the node's name. On Debian that is 127.0.1.1, which other nodes cannot reach.
    # NCCL reads a name as a prefix, after "=" as a full name, after "^" as one to avoid.
    names = environment.get("NCCL_SOCKET_IFNAME", "").removeprefix("=")
    if environment.get("GLOO_SOCKET_IFNAME") or names.startswith("^"):
        return {}
    interfaces = [name for _, name in socket.if_nameindex()]
    for name in names.split(","):
        if name in interfaces:
            return {"GLOO_SOCKET_IFNAME": name}
    return {}
