"""Tells where the seconds of one training step go.

    deepspeed --quiet --num_accelerators 2 tests/benchmarks/step_profile.py [--model FOLDER]

SmolLM2-135M, 16 windows of 128 tokens a step. torch's profiler watches one scored step of rank 0. An operation counts
for the innermost part of the step around it, and one of a backward pass for the part of its forward. Matrix products
count apart. The rest of a part is Python. The result, with the seconds of a step without the profiler, goes to
tests/benchmarks/results/step_profile.json.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from deepspeed.runtime.zero import parameter_offload, partition_parameters
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from transformers.models.llama import modeling_llama

from loraprune_ds.config import PruneConfig
from loraprune_ds.model.token_loss import LossHead
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.train.prepare import prepare
from loraprune_ds.zero.device import device_name
from loraprune_ds.zero.engine import quiet_deepspeed, start_ranks, stop_ranks
from tests.benchmarks.running import make_parser, record
from tests.benchmarks.step_time import Timed, short_run

WARM_UP = 4  # steps. DeepSpeed records the order of the modules in the first ones
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
PART, OTHER = "part: ", "other operations"
STEP = PART + OTHER
SHOWN = 0.01  # of the step: other operations below it are added up

# The parts of a step, and the functions whose time they are.
PARTS: dict[str, list[tuple[Any, str]]] = {
    "hooks of ZeRO-3: fetch and release": [
        (PartitionedParameterCoordinator, "fetch_sub_module"),
        (PartitionedParameterCoordinator, "release_sub_module"),
        (PartitionedParameterCoordinator, "reset_step"),
        (parameter_offload.DeepSpeedZeRoOffload, "pre_sub_module_backward_function"),
    ],
    "waiting for gathered weights": [
        (partition_parameters.AllGatherHandle, "wait"),
        (partition_parameters.AllGatherCoalescedHandle, "wait"),
    ],
    "reducing gradients": [
        (DeepSpeedZeroOptimizer_Stage3, "reduce_ready_partitions_and_remove_grads"),
        (DeepSpeedZeroOptimizer_Stage3, "independent_gradient_partition_epilogue"),
    ],
    "the optimizer's update": [(DeepSpeedZeroOptimizer_Stage3, "step")],
    "logits and loss": [(LossHead, "forward")],
    "norms": [(modeling_llama.LlamaRMSNorm, "forward")],
    "rotary positions": [(modeling_llama, "apply_rotary_pos_emb"), (modeling_llama.LlamaRotaryEmbedding, "forward")],
    "attention": [(torch.nn.functional, "scaled_dot_product_attention")],
    "scoring": [(Pruner, "score")],
}


def name_parts() -> None:
    """Wraps every function of `PARTS`, to tell the profiler when it runs."""
    for part, functions in PARTS.items():
        for holder, name in functions:
            setattr(holder, name, _told(getattr(holder, name), PART + part))


def _told(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(name):
            return function(*args, **kwargs)

    return run


def seconds_by_part(events: Iterable[Any]) -> dict[str, float]:
    """Adds up the seconds of all events by the part of the step that they belong to."""
    events = list(events)
    forward_part = {e.sequence_nr: _part(e, {}) for e in events if e.sequence_nr >= 0 and not _is_backward(e)}
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        part = _part(event, forward_part)
        if part is None:
            continue  # outside of the step
        if event.name in PRODUCTS:
            part = "matrix products of " + ("the head" if part == "logits and loss" else "the layers")
        elif part == OTHER:
            part = "Python of modules and autograd" if event.name == STEP else f"{OTHER}: {event.name}"
        seconds[part] += event.self_cpu_time_total / 1e6
    total = sum(seconds.values())
    for part in [part for part, s in seconds.items() if part.startswith(OTHER) and s < SHOWN * total]:
        seconds[f"{OTHER}: together"] += seconds.pop(part)
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _is_backward(event: Any) -> bool:
    return event.name.startswith("autograd::engine::evaluate_function")


def _part(event: Any, forward_part: dict[int, str | None]) -> str | None:
    """Finds the innermost part around an event. A backward pass belongs to the part of its forward."""
    while event is not None:
        if event.name.startswith(PART) and event.name != STEP:
            return event.name.removeprefix(PART)
        if _is_backward(event) and (part := forward_part.get(event.sequence_nr)) is not None:
            return part
        if event.name == STEP:
            return STEP.removeprefix(PART)
        event = event.cpu_parent
    return None


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="embedded")
    arguments = parser.parse_args()
    config = short_run(arguments.model, PruneConfig(prune_every=1, warmup_fraction=0.9, cooldown_fraction=0), 20)
    quiet_deepspeed()
    name_parts()
    comm = start_ranks()
    trainer = Timed(prepare(config, comm, is_first_on_node=comm.rank == 0))
    plain = [trainer.timed_step(scoring=True) for _ in range(WARM_UP + 2)][WARM_UP:]
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler, torch.profiler.record_function(STEP):
        watched = trainer.timed_step(scoring=True)
    if comm.rank == 0:
        parts = seconds_by_part(profiler.events() or [])
        result = {"step_seconds": min(plain), "watched_seconds": watched, "parts": parts}
        record("step_profile", result | {"ranks": comm.world_size, "config": config.to_dict()}, device_name())
    stop_ranks()


if __name__ == "__main__":
    main()
