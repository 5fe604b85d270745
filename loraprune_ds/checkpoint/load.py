"""Finds the newest good checkpoint and gives its parts back; damaged ones are named and passed over."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from loraprune_ds.checkpoint import files
from loraprune_ds.checkpoint.state import CheckpointMismatch, RunState, ShapeSource, read_state
from loraprune_ds.config import RunConfig
from loraprune_ds.config_file import config_from_dict
from loraprune_ds.errors import UserError
from loraprune_ds.model.build import locate_model
from loraprune_ds.model.checkpoint import Checkpoint, open_checkpoint, open_for_pruning
from loraprune_ds.model.cut_checkpoint import cut_to
from loraprune_ds.pruning.importance import LayerScores

if TYPE_CHECKING:  # one process can read a checkpoint without DeepSpeed
    from loraprune_ds.zero.comm import Communicator


@dataclass(frozen=True)
class Saved:
    """A verified checkpoint."""

    folder: Path
    state: RunState

    def shape_folder(self) -> Path:
        """Where its frozen weights are. Of a source that has moved, such as the hub's cache: where `model.path` is now.

        Raises:
            UserError: as `locate_model`.
        """
        shape = self.state.shape
        if not shape.is_source:
            return self.folder.parent / shape.folder
        source = Path(shape.folder)
        return source if source.is_dir() else locate_model(config_from_dict(self.state.config).model)

    def frozen_weights(self, config: RunConfig) -> Checkpoint:
        """The model without LoRA.

        Raises:
            UserError: as `open_for_pruning`.
        """
        checkpoint = open_for_pruning(self.shape_folder(), config.prune)
        return cut_to(checkpoint, self.state.kept, config.model.dtype) if self.state.shape.is_source else checkpoint

    def scores(self) -> list[LayerScores] | None:
        """The moving averages; None when nothing had been scored."""
        path = self.folder / files.SCORES_FILE
        if not path.exists():
            return None
        tensors = load_file(path)
        return [LayerScores(tensors[f"{i}.heads"], tensors[f"{i}.channels"]) for i in range(len(tensors) // 2)]

    def moments(self, layer: int) -> dict[str, Tensor]:
        """Moments of the inputs of a layer's linears, by name; empty when none had been measured."""
        path = self.folder / files.moments_file(layer)
        return load_file(path) if path.exists() else {}

    def read_flat(self, layer: int, name: str, start: int, end: int) -> Tensor:
        """Elements [start, end) of a layer's LoRA tensor, flat; only the rows that hold them are read."""
        with safe_open(self.folder / files.layer_file(layer), framework="pt") as file:
            view = file.get_slice(name)
            columns = view.get_shape()[1]
            first = start // columns
            rows = view[first : -(-end // columns)].reshape(-1)
        return rows[start - first * columns : end - first * columns]


def find_newest(root: Path, comm: "Communicator", warn: Callable[[str], None]) -> Saved | None:
    """The newest checkpoint under `root` that is whole; the ranks share the reading. Collective.

    Raises:
        CheckpointMismatch: it is whole, but of a newer format or of another source model than is there now.
    """
    for number in reversed(comm.gather_objects(files.numbered(root, "step"))[0]):
        try:
            return open_saved(files.step_folder(root, number), comm)
        except CheckpointMismatch:
            raise
        except UserError as error:
            warn(f"checkpoint step-{number} cannot be used: {error}")
    return None


def newest_state(root: Path) -> RunState | None:
    """The newest state under `root` that can be read, unverified: enough to see whose run it is.

    Raises:
        CheckpointMismatch: it is of a newer format.
    """
    for number in reversed(files.numbered(root, "step")):
        try:
            return read_state(files.step_folder(root, number))
        except CheckpointMismatch:
            raise
        except UserError:
            continue
    return None


def open_saved(folder: Path, comm: "Communicator") -> Saved:
    """Verifies one checkpoint and the shape it names. Collective.

    Raises:
        UserError: something is missing or damaged; all ranks raise the same line.
        CheckpointMismatch: it is of a newer format or of another source model; likewise.
    """
    return comm.together(lambda: check_saved(folder, part=comm.rank, parts=comm.world_size))


def check_saved(folder: Path, *, part: int = 0, parts: int = 1) -> Saved:
    """Verifies one checkpoint and the shape it names, or the share that falls to one of `parts` readers.

    Raises:
        UserError: something is missing or damaged.
        CheckpointMismatch: it is of a newer format or of another source model.
    """
    saved = Saved(folder, read_state(folder))
    files.verify(folder, part=part, parts=parts)
    shape = saved.state.shape
    if shape.is_source:
        _check_source(saved)
        return saved
    shape_folder = saved.shape_folder()
    manifest = shape_folder / files.MANIFEST
    if not manifest.is_file() or files.sha256(manifest) != shape.digest:
        raise UserError(f"{shape_folder} is missing or is not the one that {folder} names")
    files.verify(shape_folder, part=part, parts=parts)
    return saved


def _check_source(saved: Saved) -> None:
    try:
        source = saved.shape_folder()
        found = source_digest(open_checkpoint(source))
    except UserError as error:
        raise CheckpointMismatch(f"the model that {saved.folder} was started from cannot be read: {error}") from None
    if found != saved.state.shape.digest:
        raise CheckpointMismatch(f"{source} is not the model that {saved.folder} was started from: its tensors differ")


def source_digest(checkpoint: Checkpoint) -> str:
    """Identifies a source model by its config and its files' names, sizes and first MiB, which has the tensors' names.

    Reading all of it would take as long as loading it; a file of the same size with other numbers is not noticed.
    """
    digest = hashlib.sha256((checkpoint.folder / "config.json").read_bytes())
    for path in sorted(set(checkpoint.files.values())):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            digest.update(file.read(1 << 20))
    return digest.hexdigest()


def source_of(checkpoint: Checkpoint) -> ShapeSource:
    """The frozen weights of a run that has changed none: it has not cut yet, or has only left some out."""
    return ShapeSource(str(checkpoint.folder.resolve()), source_digest(checkpoint), is_source=True)
