"""Runs scripts on forked ranks: same_results.py starts it with the PYTHONPATH of a checkout, and gives it jobs.

The imports of a rank take longer than a tiny run, so this process has them already. It knows nothing of the package.
Each line of stdin is a job, {"ranks", "argv", "log", "timeout"}. The answer is a line with the exit codes.
"""

import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from collections import defaultdict
from typing import Any

import datasets  # noqa: F401
import deepspeed
import peft  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401

GRACE = 10.0  # seconds for the other ranks once one has failed


def run(job: dict[str, Any]) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(job["ranks"])}
    pids = [
        fork(job, meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(job["ranks"])
    ]
    deadline, codes = time.monotonic() + job["timeout"], dict[int, int]()
    while len(codes) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid]:
                deadline = min(deadline, time.monotonic() + GRACE)
        elif time.monotonic() > deadline:
            for left in set(pids) - codes.keys():
                os.kill(left, signal.SIGKILL)
        time.sleep(0 if pid else 0.02)
    return [codes[pid] for pid in pids]


def fork(job: dict[str, Any], environment: dict[str, str]) -> int:
    if pid := os.fork():
        return pid
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(log, number)
        os.environ |= environment
        sys.argv = job["argv"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        os._exit(0)
    except BaseException:  # noqa: BLE001  # nothing may return into the copy of the loop below
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(1)


if __name__ == "__main__":
    # As zero/engine.py does it: a CPU rank must not compile DeepSpeed's own collectives.
    deepspeed.ops.__dict__["__compatible_ops__"] = defaultdict(bool)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run(json.loads(line))) + "\n")
        sys.stdout.flush()
