"""Runs a script on CPU ranks of FSDP2, after `accelerate launch`: `launched_fsdp.py SCRIPT ...`."""

import runpy
import sys

from tests.support.fsdp_trainers import fsdp_on_cpu

sys.argv.pop(0)
with fsdp_on_cpu():
    names = runpy.run_path(sys.argv[0], run_name="__main__")
print(type(names["trainer"].model_wrapped).__name__)  # noqa: T201  # the caller reads it
