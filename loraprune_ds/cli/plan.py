"""Plans a run before it runs: memory per rank over the whole run, whether that fits, traffic, seconds.

%(prog)s llama-65b --nodes 4 --gpus-per-node 8 --gpu-memory 80
%(prog)s path/to/model --config my.yaml --set train.micro_batch_size=4 --nodes 1 --gpus-per-node 8 --json
%(prog)s llama-65b --gpu-memory 40 --smallest                  on up to --nodes machines, if given
%(prog)s llama-7b --server-memory 24                           tokens of KV cache beside the dense, and the pruned
%(prog)s path/to/model --set prune.target=12GiB --set prune.target_context=8192      which ratio that takes

MODEL is a folder, a hub id (only its config.json is fetched) or llama-7b, llama-13b, llama-30b, llama-65b, which bring
their run config from launch/configs/. No weight is loaded. Exit codes: 0 it fits, 3 it does not, 2 unusable input.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from loraprune_ds.command import Parser, silence_libraries, tell
from loraprune_ds.errors import UserError, require
from loraprune_ds.plan.request import Cluster

DOES_NOT_FIT_EXIT_CODE = 3
FORMULAS = Path(__file__).parents[1] / "plan" / "README.md"
CLUSTER = {field.name: field for field in dataclasses.fields(Cluster)}  # an option each


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("model", nargs="?", help="folder, hub id or name; default: the run config's model")
    parser.add_argument("--config", help="YAML file of the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of the run")
    parser.add_argument(
        "--samples",
        type=int,
        help="in the training data, for a run that counts epochs; default: 1,000 steps are assumed",
    )
    parser.add_argument(
        "--server-memory", type=float, metavar="GIB", help="say what a server with so much memory for them can hold"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--smallest", action="store_true", help="find the fewest such GPUs on which it fits")
    parser.add_argument("--explain", action="store_true", help="print the formula of every term and end")
    for name, field in CLUSTER.items():
        option, known = f"--{name.replace('_', '-')}", field.default is not None
        about = field.metadata["help"] + (f" ({field.default})" if known else "")
        kind = type(field.default) if known else float
        parser.add_argument(option, type=kind, default=argparse.SUPPRESS, metavar="N", help=about)
    return parser.parse_args()


def main() -> int:
    try:
        arguments = parse_arguments()
        if arguments.explain:
            print(FORMULAS.read_text(), end="")
            return 0
        cluster = Cluster(**{name: value for name, value in vars(arguments).items() if name in CLUSTER})
        return plan(arguments, cluster)
    except UserError as error:
        tell(error)
        return error.exit_code


def plan(arguments: argparse.Namespace, cluster: Cluster) -> int:
    gib = arguments.server_memory
    require(gib is None or 0 < gib < float("inf"), f"--server-memory must be a number above 0; got {gib}")
    silence_libraries()
    # Seconds of imports, after good arguments.
    from loraprune_ds.plan.plan import MOST_NODES, largest_micro_batch, make_plan, search, suggestions
    from loraprune_ds.plan.printout import plan_json, plan_table, suggestion_rows, verdict
    from loraprune_ds.plan.request import make_request

    request = make_request(
        arguments.model,
        dataclasses.replace(cluster, nodes=1, gpus_per_node=1) if arguments.smallest else cluster,
        config_path=arguments.config,
        overrides=arguments.set,
        samples=arguments.samples,
    )
    most, reason = getattr(arguments, "nodes", MOST_NODES), ""
    if arguments.smallest:
        found, reason = search(request, cluster, most)
    else:
        found = make_plan(request)
    suggested, largest = ([], largest_micro_batch(found)) if found.fits else (suggestions(found), None)
    if arguments.json:
        facts = plan_json(found, gib) | {"suggestions": suggested, "largest_micro_batch": largest}
        print(json.dumps(facts, indent=2, allow_nan=False))
    else:
        print("\n".join([plan_table(found, gib), *suggestion_rows(suggested)]))
        if largest:
            print(f"the largest micro-batch that fits, with the same result: --set train.micro_batch_size={largest}")
    if not found.fits:
        tell(UserError(reason or verdict(found)))
        return DOES_NOT_FIT_EXIT_CODE
    return 0
