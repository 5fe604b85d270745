"""Writes a checkpoint: the LoRA state layer by layer from all ranks, the frozen weights only when a cut changed them.

checkpoints/shape-2/     the model after the second cut, LoRA left out: a Hugging Face folder
checkpoints/step-120/    layer-00000.safetensors ...  fp32 LoRA masters and Adam moments of a layer
                         scores.safetensors           moving averages, float64
                         state.json, manifest.json    everything else, and the checksums of all files
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from loraprune_ds.checkpoint import files
from loraprune_ds.checkpoint.state import RunState, ShapeSource, read_state, write_state
from loraprune_ds.errors import UserError
from loraprune_ds.faults import fail_point
from loraprune_ds.pruning.importance import LayerScores
from loraprune_ds.zero.sharded import ShardedStore
from loraprune_ds.zero.training_state import collect_lora_state
from loraprune_ds.zero.write import frozen_tensors, write_model


def save_shape(store: ShardedStore, root: Path, cuts: int, config_json: dict[str, Any], dtype: str) -> ShapeSource:
    """Publishes the frozen weights as `shape-{cuts}`, unless an earlier save of this shape did. Collective."""
    target = root / f"shape-{cuts}"
    if not store.comm.gather_objects(target.exists())[0]:
        if store.rank == 0:
            (files.begin(target) / "config.json").write_text(json.dumps(config_json, indent=2))
        store.comm.barrier()
        staging = files.staging_of(target)
        write_model(store, staging, dtype, frozen_tensors)
        fail_point("save.shape_written")
        _seal_and_publish(store, target, "shape")
    digest = store.comm.gather_objects(files.sha256(target / files.MANIFEST) if store.rank == 0 else "")[0]
    return ShapeSource(target.name, digest, is_source=False)


def save_step(store: ShardedStore, root: Path, state: RunState, scores: list[LayerScores] | None) -> Path:
    """Publishes `step-{state.step}`. Collective; layer k is written by rank k % W."""
    target = files.step_folder(root, state.step)
    if store.comm.gather_objects(target.exists())[0]:
        return target
    if store.rank == 0:
        staging = files.begin(target)
        write_state(staging, state)
        if scores is not None:
            save_file(_score_tensors(scores), staging / "scores.safetensors")
    store.comm.barrier()
    staging = files.staging_of(target)
    for layer in range(len(store.layers)):
        tensors = collect_lora_state(store, layer, layer % store.world_size)
        if tensors is not None:
            save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, staging / files.layer_file(layer))
        del tensors
    fail_point("save.step_written")
    _seal_and_publish(store, target, "step")
    return target


def _seal_and_publish(store: ShardedStore, target: Path, kind: str) -> None:
    """Ranks share the checksums; rank 0 writes the manifest and renames."""
    store.comm.barrier()
    staging = files.staging_of(target)
    names = sorted(path.name for path in staging.iterdir())
    mine = {name: files.seal(staging / name) for name in names[store.rank :: store.world_size]}
    sealed: dict[str, dict[str, Any]] = {}
    for part in store.comm.gather_objects(mine):
        sealed |= part
    if store.rank == 0:
        files.write_manifest(staging, sealed)
        fail_point(f"save.{kind}_before_rename")
        files.publish(target)
        fail_point(f"save.{kind}_after_rename")
    store.comm.barrier()


def drop_old(root: Path, keep_last: int) -> None:
    """Removes all but the newest steps, and every shape that no step names any more. On rank 0 only."""
    steps = files.numbered(root, "step")
    for number in steps[:-keep_last]:
        files.remove(root / f"step-{number}")
    named = set()
    for number in steps[-keep_last:]:
        try:
            named.add(read_state(root / f"step-{number}").shape.folder)
        except UserError:
            return  # a damaged step may name any shape
    for number in files.numbered(root, "shape"):
        if f"shape-{number}" not in named:
            files.remove(root / f"shape-{number}")


def _score_tensors(scores: list[LayerScores]) -> dict[str, Tensor]:
    return {f"{i}.{kind}": getattr(layer, kind) for i, layer in enumerate(scores) for kind in ("heads", "channels")}
