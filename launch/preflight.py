"""Checks the nodes of a job before a long run, and names the bad ones. Started by srun, once per node:

srun --ntasks-per-node=1 python launch/preflight.py --nodes node1 node2 --port 29400 --output runs/mine

Each node imports what a run imports, computes on every accelerator and writes where the run will write. Then the
nodes check that they share this folder, and that collectives pass between all hosts (by gloo) and between all ranks.
"""

import argparse
import os
import sys
from pathlib import Path

try:
    from loraprune_ds.command import Parser, leave
    from loraprune_ds.errors import UserError, require
except ModuleNotFoundError as missing:
    sys.exit(f"error: {sys.executable} on {os.uname().nodename} has no {missing.name}; see slurm/site.sh")

MOST_SECONDS = 86_400


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--nodes", required=True, nargs="+", metavar="NAME", help="all, in Slurm's order")
    parser.add_argument("--port", required=True, type=int, help="free on the first node")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="of the run; need not exist")
    parser.add_argument("--ranks-per-node", type=int, default=1, metavar="N", help="accelerators that will be used")
    parser.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="for all nodes to answer")
    arguments = parser.parse_args()
    require(0 < arguments.port < 1 << 16, f"--port must be between 1 and 65535; got {arguments.port}")
    ranks, timeout = arguments.ranks_per_node, arguments.timeout
    require(ranks >= 1, f"--ranks-per-node must be at least 1; got {ranks}")
    in_range = 1 <= timeout < MOST_SECONDS
    require(in_range, f"--timeout must be at least 1 second and below {MOST_SECONDS}; got {timeout:g}")
    return arguments


def main() -> int:
    """Returns the exit code: 0 if all nodes are fit, 1 if one is not, 2 for unusable arguments."""
    try:
        arguments = parse_arguments()
    except UserError as error:
        print(f"preflight: error: {error}", file=sys.stderr)
        return error.exit_code
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch reports every wait in many lines
    index = int(os.environ.get("SLURM_NODEID", "0"))
    try:
        import loraprune_ds.train.run  # noqa: F401 (what launch/run.py imports before its ranks meet)
        from loraprune_ds.zero.preflight import check_nodes
    except ImportError as error:  # the other nodes cannot learn of it
        print(f"preflight: {arguments.nodes[index]}: {sys.executable}: {error}", file=sys.stderr)
        return 1
    fit = check_nodes(
        arguments.nodes, index, arguments.port, arguments.timeout, arguments.ranks_per_node, arguments.output
    )
    return 0 if fit else 1


if __name__ == "__main__":
    leave(main())
