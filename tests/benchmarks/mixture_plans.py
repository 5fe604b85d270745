"""Plans runs of published mixtures of experts: what a GPU of one node needs, and the fewest GPUs that will do.

    python -m tests.benchmarks.mixture_plans

Their sizes are in `tests/published.py`. No weight is read and nothing runs. The run is the default one with 100 steps,
gradient checkpointing and `prune.ratio: 0.5`, with frozen weights in bf16 and as int8. The result goes to
tests/benchmarks/results/mixture_plans.json.
"""

import math
from pathlib import Path
from typing import Any

from loraprune_ds.command import silence_libraries
from loraprune_ds.config import Frozen
from loraprune_ds.config_file import config_from_dict
from loraprune_ds.files import write_json
from loraprune_ds.model.read_shape import shape_from_config
from loraprune_ds.plan.advice import smallest_plan
from loraprune_ds.plan.cluster import GIB, Cluster
from loraprune_ds.plan.plan import Plan, make_plan
from loraprune_ds.plan.request import build_request
from loraprune_ds.report.provenance import versions
from tests.published import MIXTURES

RESULT = Path(__file__).parent / "results" / "mixture_plans.json"
RUN: dict[str, Any] = {
    "output_dir": "unused",
    "prune": {"ratio": 0.5},
    "train": {"steps": 100, "gradient_checkpointing": True},
}
NODE = Cluster(nodes=1, gpus_per_node=8)
MOST_NODES = 64
MEMORIES = (80, 40)  # GiB of a GPU


def plan_on(name: str, cluster: Cluster, frozen: Frozen | None = None) -> Plan:
    source, config = MIXTURES[name][0], config_from_dict(RUN | {"model": {"frozen": frozen}})
    return make_plan(build_request(name, source, shape_from_config(source, name), config, cluster))


def layer_bytes(plan: Plan) -> int:
    """Returns the bytes of the weights of the largest decoder layer."""
    shape = plan.request.shape
    held = (shape.held(i, plan.request.element_size).values() for i in range(len(shape.layers)))
    return max(sum(x.element_size * math.prod(x.shape) for x in layer) for layer in held)


def gathered_bytes(plan: Plan) -> int:
    """Returns the most bytes of gathered weights at once, those that are fetched ahead included."""
    return max(max(x.training.peak_live, x.evaluation.peak_live) for x in plan.passes)


def row(name: str, frozen: Frozen | None) -> dict[str, Any]:
    plan = plan_on(name, NODE, frozen)
    shape = plan.request.shape
    final = plan.passes[1].shape
    return {
        "model": name,
        "frozen": frozen,
        "parameters": shape.total_numel(),
        "experts": [shape.layers[0]["experts"], final.layers[len(final.layers) // 2]["experts"]],
        "gib_of_a_layer": layer_bytes(plan) / GIB,
        "gib_gathered_at_once": gathered_bytes(plan) / GIB,
        "on_8_gpus_of_80_gib": {"fits": plan.fits, "gib": plan.device_bytes / GIB, "host_gib": plan.host_bytes / GIB},
        "fewest_gpus": {f"{memory} GiB": _fewest(plan, memory) for memory in MEMORIES},
    }


def _fewest(plan: Plan, memory: int) -> dict[str, float] | None:
    found = smallest_plan(plan.request, Cluster(MOST_NODES, 8, gpu_memory=memory))
    if found is None:
        return None
    cluster = found.request.cluster
    return {"nodes": cluster.nodes, "gpus_per_node": cluster.gpus_per_node, "gib": found.device_bytes / GIB}


def main() -> None:
    silence_libraries()
    names = ("Qwen3-30B-A3B", "Mixtral-8x7B", "gpt-oss-120b", "Qwen3-235B-A22B")
    rows = [row(name, frozen) for name in names for frozen in (None, "int8")]
    write_json(RESULT, {"run": RUN, "rows": rows, "versions": versions()})
    for found in rows:
        print(found)


if __name__ == "__main__":
    main()
