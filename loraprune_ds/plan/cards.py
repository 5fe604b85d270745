"""Which setting fits on which GPU, the best first. README.md says what each costs."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from loraprune_ds.config_file import apply_override
from loraprune_ds.files import JsonObject
from loraprune_ds.plan.cluster import Cluster
from loraprune_ds.plan.plan import Build, make_plan, search
from loraprune_ds.plan.request import Request, changed

CARDS = (16, 24, 40, 48, 80)  # GiB
# What costs most quality is outermost. A smaller micro-batch only takes longer.
CHOICES = (
    ("", "train.distill_weight=0"),
    ("", "prune.compensate=none"),
    ("", "model.frozen=int8", "model.frozen=nf4"),
    ("", "train.micro_batch_size=1"),
)
SETTINGS = [tuple(filter(None, overrides)) for overrides in product(*CHOICES)]


def best_for_cards(build: Build, largest: Cluster, most_nodes: int) -> Iterator[JsonObject]:
    """Yields the best setting for each of CARDS, on as few of them as any setting needs.

    Args:
        build, largest, most_nodes: as in `search`.
    """

    def build_smallest(cluster: Cluster) -> Request:
        return with_overrides(build(cluster), SETTINGS[-1])

    for memory in CARDS:
        smallest, _ = search(build_smallest, replace(largest, gpu_memory=memory), most_nodes)
        request = build(smallest.request.cluster)
        plans = ((x, make_plan(with_overrides(request, x))) for x in SETTINGS)
        fitting = (pair for pair in plans if pair[1].fits)
        overrides, plan = next(fitting, (SETTINGS[-1], smallest))
        yield {
            "gpu_memory": memory,
            "gpus": plan.request.world_size,
            "device_bytes": plan.device_bytes,
            "fits": plan.fits,
            "overrides": overrides,
        }


def with_overrides(request: Request, overrides: Sequence[str]) -> Request:
    """Changes a request by overrides, as `--set` gives them."""
    sections: JsonObject = {}
    for override in overrides:
        apply_override(sections, override)
    return changed(request, **sections)
