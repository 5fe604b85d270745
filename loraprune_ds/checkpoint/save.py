"""Writes a checkpoint: the LoRA state layer by layer from all ranks, and the frozen weights if they changed."""

import json
from pathlib import Path
from typing import Any

from loraprune_ds.checkpoint import layout
from loraprune_ds.checkpoint.pruner_files import save_on_cpu, write_moments, write_scores
from loraprune_ds.checkpoint.staging import Staging
from loraprune_ds.checkpoint.state import STATE_FILE, RunState, ShapeSource, read_state, state_text
from loraprune_ds.config import Dtype
from loraprune_ds.errors import UserError
from loraprune_ds.faults import fail_point
from loraprune_ds.model.pretrained import STORED_INT8
from loraprune_ds.pruning.importance import LayerScores
from loraprune_ds.pruning.input_moments import InputMoments
from loraprune_ds.whole import remove, remove_leftovers
from loraprune_ds.zero.flat import owner_rounds
from loraprune_ds.zero.sharded import ShardedModel
from loraprune_ds.zero.training_engine import collect_lora_state
from loraprune_ds.zero.write import frozen_tensors, write_model


def save_shape(model: ShardedModel, root: Path, cuts: int, config_json: dict[str, Any], dtype: Dtype) -> ShapeSource:
    """Publishes the frozen weights as `shape-{cuts}`, in the form in which the ranks hold them. Collective."""
    with Staging(model.comm, root / f"shape-{cuts}", "shape") as staging:
        if model.rank == 0:
            stored = config_json | (STORED_INT8 if model.shape.int8 else {})
            staging.write("config.json", lambda path: path.write_text(json.dumps(stored, indent=2)))
        staging.seal(write_model(model, staging.folder, dtype, frozen_tensors))
        fail_point("save.shape_written")
        staging.publish()
    digest = layout.sha256(staging.target / layout.MANIFEST) if model.rank == 0 else ""
    return ShapeSource(staging.target.name, model.comm.gather_objects(digest)[0], is_source=False)


def save_step(
    model: ShardedModel, root: Path, state: RunState, scores: list[LayerScores] | None, moments: InputMoments | None
) -> Path:
    """Publishes `step-{state.step}`. Each layer is written by its owner, which has its input moments. Collective."""
    with Staging(model.comm, layout.step_folder(root, state.step), "step") as staging:
        if model.rank == 0:
            staging.write(STATE_FILE, lambda path: path.write_text(state_text(state)))
            write_scores(staging, scores)
        for layers in owner_rounds(len(model.layers), model.world_size):
            collected = {layer: collect_lora_state(model, layer, model.owner(layer)) for layer in layers}
            for layer, tensors in collected.items():
                if tensors is not None:  # on the owner. All owners of a round write at the same time
                    staging.write(layout.layer_file(layer), lambda path, lora=tensors: save_on_cpu(lora, path))
                    write_moments(staging, layer, {} if moments is None else moments.of_layer(layer))
            del collected, tensors
            fail_point("save.layer")
        fail_point("save.step_written")
        staging.publish()
    return staging.target


def drop_old(root: Path, step: int, keep_last: int) -> None:
    """Removes old steps, and shapes that no step names, after `step-{step}` was published. On rank 0 only.

    Steps above `step`, left by a start from an older checkpoint, and the remains of killed saves are removed as well.
    """
    remove_leftovers(root)
    steps, shapes = layout.numbered(root, "step"), layout.numbered(root, "shape")
    keep = [number for number in steps if number <= step][-keep_last:]
    for number in steps:
        if number not in keep:
            remove(layout.step_folder(root, number))
            fail_point("save.dropped")
    try:
        named = {read_state(layout.step_folder(root, number)).shape.folder for number in keep}
    except UserError:
        return  # a damaged step may name any shape
    for number in shapes:
        if f"shape-{number}" not in named:
            remove(root / f"shape-{number}")
