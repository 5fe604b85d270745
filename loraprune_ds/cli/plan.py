"""Plans a run: memory per rank, and whether it fits.

%(prog)s llama-65b --nodes 4 --gpus-per-node 8 --gpu-memory 80
%(prog)s path/to/model --config my.yaml --set train.micro_batch_size=4 --nodes 1 --gpus-per-node 8 --json
%(prog)s llama-65b --gpu-memory 40 --smallest                  on up to --nodes machines, if given
%(prog)s llama-65b --cards                                     which setting fits on GPUs of 16 to 80 GiB
%(prog)s path/to/model --set prune.target=12GiB --set prune.target_context=8192      which ratio that takes

MODEL is a folder, a hub id (only its config.json is fetched), or llama-7b, llama-13b, llama-30b or llama-65b, with the
run config from launch/configs/. No weight is loaded. Exit codes: 0 it fits, 3 it does not, 2 unusable input.
"""

import argparse
import dataclasses
import json
from functools import partial

from loraprune_ds.arguments import Parser
from loraprune_ds.errors import UserError, run_command, tell
from loraprune_ds.plan.cluster import Cluster
from loraprune_ds.ranks.job import silence_libraries

DOES_NOT_FIT_EXIT_CODE = 3
CLUSTER = {field.name: field for field in dataclasses.fields(Cluster)}  # an option each


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "model", nargs="?", help="folder, hub id or name; default: the run config's model"
    )
    parser.add_argument("--config", help="YAML file of the run")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a value of the run",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of a table"
    )
    parser.add_argument(
        "--smallest", action="store_true", help="find the fewest such GPUs that suffice"
    )
    parser.add_argument(
        "--cards", action="store_true", help="find the best setting for GPUs of 16 to 80 GiB"
    )
    for name, field in CLUSTER.items():
        kind = float
        about = field.metadata["help"]
        if field.default is not None:
            kind = type(field.default)
            about += f" ({field.default})"
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=kind, default=argparse.SUPPRESS, metavar="N", help=about)
    return parser.parse_args()


def main() -> int:
    return run_command(lambda: plan(parse_arguments()))


def plan(arguments: argparse.Namespace) -> int:
    cluster = Cluster(**{key: value for key, value in vars(arguments).items() if key in CLUSTER})
    silence_libraries()
    # These imports take seconds, so they come after the check of arguments.
    from loraprune_ds.plan import options
    from loraprune_ds.plan.plan import make_plan, plan_json
    from loraprune_ds.plan.request import build_request, read_run
    from loraprune_ds.plan.table import option_table, plan_table, verdict

    run = read_run(arguments.model, config_path=arguments.config, overrides=arguments.set)
    build = partial(build_request, *run)
    most_nodes = getattr(arguments, "nodes", options.MOST_NODES)
    if arguments.cards:
        best = options.best_for_cards(build, cluster, most_nodes)
        cards = list(map(options.row_of, best))
        print(json.dumps(cards, indent=2) if arguments.json else option_table(cards))
        return 0
    if arguments.smallest:
        planned = options.first_that_fits(build, options.sizes(cluster, most_nodes))
    else:
        planned = make_plan(build(cluster))
    facts = plan_json(planned)
    facts["options"] = list(map(options.row_of, options.options(build, planned)))
    if arguments.json:
        print(json.dumps(facts, indent=2, allow_nan=False))
    else:
        print(plan_table(planned, facts))
    if planned.fits:
        return 0
    tell(UserError(verdict(planned)))
    return DOES_NOT_FIT_EXIT_CODE
