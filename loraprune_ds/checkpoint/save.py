"""Writes a checkpoint: the LoRA state from all ranks, layer by layer, and changed frozen weights."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from loraprune_ds.checkpoint import layout
from loraprune_ds.checkpoint.layout import STATE_FILE, RunState, ShapeSource, read_state, state_text
from loraprune_ds.config import Dtype
from loraprune_ds.errors import UserError, fail_point
from loraprune_ds.files import begin_folder, publish_folder, remove_folder, remove_leftovers, staging_of
from loraprune_ds.pruning.compensate import InputMoments
from loraprune_ds.pruning.step import PrunerState
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.device import empty_cache
from loraprune_ds.zero.flat import owner_rounds
from loraprune_ds.zero.lora_state import collect_lora_state
from loraprune_ds.zero.sharded import ShardedModel
from loraprune_ds.zero.write import LocalWrites, frozen_tensors, write_sharded_model


class Staging:
    """Builds one folder that all ranks fill in parallel. Construction and `publish` are collective.

    Its files are removed if a `with` block fails.
    """

    def __init__(self, comm: Communicator, target: Path, kind: str) -> None:
        self._mark = comm.draw_mark()
        self.target, self.folder = target, staging_of(target, self._mark)
        self._comm, self._kind = comm, kind
        self._writes = LocalWrites(comm, self.folder)
        self._sealed: dict[str, dict[str, Any]] = {}
        empty_cache()  # torch may hold memory that NCCL needs for the gathers
        self._writes.do_on_rank_0(lambda: begin_folder(target, self._mark))

    def __enter__(self) -> "Staging":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and self._comm.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Writes and seals one file on this rank, because only the writer's fsync surely flushes its cache."""

        def write_and_seal() -> None:
            write(self.folder / name)
            self._sealed[name] = layout.seal(self.folder / name)

        self._writes.do(write_and_seal)

    def seal(self, names: Iterable[str]) -> None:
        """Seals files that this rank has written."""
        for name in names:
            self.write(name, lambda path: None)

    def publish(self) -> None:
        """Writes the manifest and renames the folder. If a write failed on some rank, all ranks raise RunError."""
        self._writes.agree()
        sealed = {name: entry for part in self._comm.gather_objects(self._sealed) for name, entry in part.items()}
        self._writes.do_on_rank_0(lambda: self._rename(sealed))

    def _rename(self, sealed: dict[str, dict[str, Any]]) -> None:
        layout.write_manifest(self.folder, sealed)
        if self.target.exists():
            remove_folder(self.target)
        fail_point(f"save.{self._kind}_before_rename")
        publish_folder(self.target, self._mark)
        fail_point(f"save.{self._kind}_after_rename")


def save_shape(model: ShardedModel, root: Path, cuts: int, dtype: Dtype) -> ShapeSource:
    """Publishes the frozen weights as `shape-{cuts}`, as the ranks store them. Collective."""
    with Staging(model.comm, root / f"shape-{cuts}", "shape") as staging:
        staging.seal(write_sharded_model(model, staging.folder, dtype, frozen_tensors, export=False))
        fail_point("save.shape_written")
        staging.publish()
    digest = layout.sha256(staging.target / layout.MANIFEST) if model.rank == 0 else ""
    return ShapeSource(staging.target.name, model.comm.gather_objects(digest)[0], is_source=False)


def save_step(
    model: ShardedModel, root: Path, state: RunState, pruner: PrunerState, moments: InputMoments | None
) -> Path:
    """Publishes `step-{state.step}`. Each layer is written by its owner, which has its input moments. Collective."""
    with Staging(model.comm, layout.step_folder(root, state.step), "step") as staging:
        if model.rank == 0:
            staging.write(STATE_FILE, lambda path: path.write_text(state_text(state)))
            write_scores(staging, pruner)
        for layers in owner_rounds(len(model.layers), model.world_size):
            collected = {layer: collect_lora_state(model, layer) for layer in layers}
            for layer, tensors in collected.items():
                if tensors:  # on the owner. All owners of a round write in parallel
                    staging.write(layout.layer_file(layer), lambda path, lora=tensors: save_on_cpu(lora, path))
                    write_moments(staging, layer, {} if moments is None else moments.of_layer(layer))
            del collected, tensors
            fail_point("save.layer")
        fail_point("save.step_written")
        staging.publish()
    return staging.target


def drop_old(root: Path, step: int, keep_last: int) -> None:
    """Removes old steps, and shapes that no step names, once `step-{step}` is published. On rank 0 only.

    Also removes steps above `step`, which a start from an older checkpoint leaves, and the remains of killed saves.
    """
    remove_leftovers(root)
    steps, shapes = layout.numbered(root, "step"), layout.numbered(root, "shape")
    keep = [number for number in steps if number <= step][-keep_last:]
    for number in steps:
        if number not in keep:
            remove_folder(layout.step_folder(root, number))
            fail_point("save.dropped")
    try:
        named = {read_state(layout.step_folder(root, number)).shape.folder for number in keep}
    except UserError:
        return  # a damaged step could name any shape
    for number in shapes:
        if f"shape-{number}" not in named:
            remove_folder(root / f"shape-{number}")


def write_scores(staging: Staging, state: PrunerState) -> None:
    """Writes the moving averages, if any, in float64. On one rank."""
    layers = enumerate(state.scores or [])
    tensors = {f"{i}.{kind}": groups for i, layer in layers for kind, groups in layer.items()}
    if tensors:
        staging.write(layout.SCORES_FILE, lambda path: save_file(tensors, path))


def write_moments(staging: Staging, layer: int, moments: dict[str, Tensor]) -> None:
    """Writes the input moments of a layer by linear, if any. On the layer's owner."""
    if moments:
        staging.write(layout.moments_file(layer), lambda path: save_on_cpu(moments, path))


def save_on_cpu(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
