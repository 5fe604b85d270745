"""Changes a planned request, as a user changes the run's settings or DeepSpeed's JSON."""

from dataclasses import replace
from typing import Any

from loraprune_ds.plan.cluster import Cluster
from loraprune_ds.plan.request import Request, build_request


def changed(request: Request, *overrides: str, cluster: Cluster | None = None) -> Request:
    """Builds the same request with other values (`section.key=value`), or on another cluster."""
    where = cluster or request.cluster
    run = request.model, request.source, request.shape, request.config
    return build_request(*run, where, overrides)


def with_zero(request: Request, **settings: Any) -> Request:
    """Returns the same request with other keys of DeepSpeed's `zero_optimization`."""
    zero = request.ds_config["zero_optimization"] | settings
    return replace(request, ds_config=request.ds_config | {"zero_optimization": zero})
