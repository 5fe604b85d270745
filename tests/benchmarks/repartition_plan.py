"""Plans a cut of LLaMA-65B on 8, 64 and 512 ranks. Computes and checks all 80 layers.

    python -m tests.benchmarks.repartition_plan

No weights are needed. For every tensor, what each rank sends is compared with what the others expect. One cut takes a
quarter of the linear parameters at once. That is more than any cut of a run's schedule. Bytes are those of the busiest
rank: weights in bf16, LoRA copies, fp32 masters and moments. They are compared with a scheme that all-gathers what is
cut. The result goes to tests/benchmarks/results/repartition_plan.json.
"""

import time
from pathlib import Path
from typing import Any

from loraprune_ds.files import write_json
from loraprune_ds.model.per_kind import LayerShape
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.plan.request import read_shape
from loraprune_ds.report.provenance import hardware, versions
from tests.benchmarks.repartition import MASKS, example_masks, plan_repartition

RESULT = Path(__file__).parent / "results" / "repartition_plan.json"
WORLD_SIZES = (8, 64, 512)
REMOVED = 0.25
LORA_RANK, ELEMENT_SIZE = 8, 2


def cut_shape(dense: ModelShape) -> ModelShape:
    """Removes a quarter of the heads and channels of every layer."""
    layer = dense.layers[0]
    small = LayerShape(heads=round(layer["heads"] * (1 - REMOVED)), channels=round(layer["channels"] * (1 - REMOVED)))
    return dense.with_layers((small,) * len(dense.layers))


def measure(dense: ModelShape, mask: str, world_size: int) -> dict[str, Any]:
    """Plan and check of one cut."""
    keep = example_masks(dense, cut_shape(dense), mask, seed=0)
    began = time.perf_counter()
    plan = plan_repartition(dense, keep, world_size, lora_rank=LORA_RANK, element_size=ELEMENT_SIZE)
    seconds = time.perf_counter() - began
    assert (plan.sent <= plan.shard).all(), "a rank sends more than its shard"
    assert plan.sent.sum() == plan.received.sum()
    return {
        "mask": mask,
        "world_size": world_size,
        "layers": len(dense.layers),
        "sent_by_busiest_rank": int(plan.sent.max()),
        "sent_by_all": int(plan.sent.sum()),
        "received_by_busiest_rank": int(plan.received.max()),
        "shard": int(plan.shard.max()),
        "sent_over_shard": float((plan.sent / plan.shard.clamp(min=1)).max()),
        "gather_everything": plan.gathered,
        "seconds_to_plan_and_check_all_ranks": seconds,
    }


def main() -> None:
    dense = read_shape("llama-65b")
    rows = [measure(dense, mask, world_size) for mask in MASKS for world_size in WORLD_SIZES]
    for mask in MASKS:
        sent = [row["sent_by_busiest_rank"] for row in rows if row["mask"] == mask]
        assert sent == sorted(sent, reverse=True), "bytes per rank fall with the number of ranks"
    facts = {"removed": REMOVED, "lora_rank": LORA_RANK, "element_size": ELEMENT_SIZE, "model": "llama-65b"}
    write_json(RESULT, {"rows": rows, **facts, "versions": versions(), "hardware": hardware("none")})
    print(f"{'mask':<14}{'ranks':>6}{'MB sent':>10}{'of shard':>10}{'gather MB':>12}{'plan s':>8}")
    for row in rows:
        print(
            f"{row['mask']:<14}{row['world_size']:>6}{row['sent_by_busiest_rank'] / 1e6:>10.1f}"
            f"{row['sent_over_shard']:>10.3f}{row['gather_everything'] / 1e6:>12.0f}"
            f"{row['seconds_to_plan_and_check_all_ranks']:>8.1f}"
        )


if __name__ == "__main__":
    main()
