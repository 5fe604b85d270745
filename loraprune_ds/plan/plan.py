"""The memory of a run, as JSON."""

from dataclasses import asdict, dataclass

from loraprune_ds.files import JsonObject
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.plan import refits
from loraprune_ds.plan.cluster import GIB
from loraprune_ds.plan.request import Request
from loraprune_ds.plan.stages import Stage, plan_stages
from loraprune_ds.pruning.target import describe_target


@dataclass(frozen=True)
class Plan:
    """Holds the memory of a run."""

    request: Request
    after: ModelShape  # after the first cut
    final: ModelShape
    stages: list[Stage]

    @property
    def checkpoint_bytes(self) -> int:
        """The bytes of the largest checkpoint, which is the last before the first cut or the first after it."""
        request = self.request
        shapes = (request.shape, self.after)
        lora = (12 * sum(shape.lora_numel(request.config.lora.r)) for shape in shapes)
        refitted = (refits.saved_bytes(request, shape) for shape in shapes)
        return max(map(sum, zip(lora, refitted, strict=True)))

    @property
    def peak_stage(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def device_bytes(self) -> int:
        return self.peak_stage.peak

    @property
    def host_bytes(self) -> int:
        """The most that a node's ranks hold in host memory."""
        cluster = self.request.cluster
        most = max(sum(stage.host.values()) for stage in self.stages)
        return cluster.gpus_per_node * (int(cluster.host_reserve * GIB) + most)

    @property
    def fits(self) -> bool:
        cluster = self.request.cluster
        return self.device_bytes <= cluster.gpu_bytes and self.host_bytes <= cluster.host_bytes


def make_plan(request: Request) -> Plan:
    """Plans the whole run."""
    cuts = request.schedule.cut_steps
    after = request.shape_at(cuts[0])
    final = request.shape_at(cuts[-1])
    return Plan(request, after, final, plan_stages(request, after, final))


def plan_json(plan: Plan) -> JsonObject:
    """Returns bytes and counts."""
    request = plan.request
    prune = request.config.prune
    schedule = request.schedule
    stages = [
        asdict(stage) | {"peak": stage.peak, "peak_phase": stage.peak_phase}
        for stage in plan.stages
    ]
    return {
        "model": request.model,
        "parameters": request.shape.total_numel(),
        "parameters_after": plan.final.total_numel(),
        "fits": plan.fits,
        "world_size": request.world_size,
        "device_bytes": plan.device_bytes,
        "device_bytes_available": request.cluster.gpu_bytes,
        "host_bytes_per_node": plan.host_bytes,
        "host_bytes_available": request.cluster.host_bytes,
        "stages": stages,
        "disk_bytes": {"checkpoint": plan.checkpoint_bytes},
        "steps": schedule.steps,
        "cuts": len(schedule.cut_steps),
        "ratio": schedule.goal.ratio,
        "target": describe_target(prune, request.shape, plan.final),
        "notes": notes(plan),
        "cluster": asdict(request.cluster),
        "config": request.config.to_dict(),
        "deepspeed": request.ds_config,
    }


def notes(plan: Plan) -> list[str]:
    request = plan.request
    lines = [request.config.recipe]
    if not request.steps_known:
        options = "--set data.max_samples=N, or --set train.epochs=null --set train.steps=N"
        lines.append(f"the run counts epochs of absent data, so its steps are assumed ({options})")
    if request.config.prune.ranking != "uniform":
        lines.append("the plan of prune.ranking global removes the same from all layers")
    lines.append("gathered weights are an upper bound")
    lines.append(
        "not counted: loading, evaluations, saving, the host's work; every sample counts as a full window"
    )
    return lines
