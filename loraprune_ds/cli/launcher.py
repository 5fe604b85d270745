"""`loraprune-ds run`: checks the arguments, then starts cli/run.py on all ranks of this machine."""

import os
import sys

from loraprune_ds.cli import run
from loraprune_ds.command import Parser, tell
from loraprune_ds.config_file import read_config
from loraprune_ds.errors import UserError
from loraprune_ds.train.output import resumed_config
from loraprune_ds.zero.environment import launcher_command


def main() -> int:
    """Becomes DeepSpeed's launcher. Returns cli/run.py's exit code after `--show`, and after wrong arguments."""
    own = Parser(None, add_help=False)
    own.add_argument("--ranks", type=int, metavar="N", help="processes on this machine (default: one per GPU)")
    try:
        chosen, arguments = own.parse_known_args()
        given = run.parse_arguments(own)
        command = launcher_command(run.__name__, chosen.ranks, os.environ)
        resumed_config(read_config(given.config, given.set), given.resume)  # before launchers and ranks speak
    except UserError as error:
        tell(error)
        return error.exit_code
    if given.show is not None:
        sys.argv[1:] = arguments
        return run.main()
    if chosen.ranks is not None:  # else each rank on a CPU would use all cores
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // chosen.ranks)))
    os.execv(command[0], [*command, *arguments])
