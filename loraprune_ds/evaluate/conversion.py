"""Converts models for a measurement, in folders that are removed afterwards: merged, or for a server."""

import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

from loraprune_ds.checkpoint.run_folder import STATUS_FILE
from loraprune_ds.checkpoint.state import STATE_FILE
from loraprune_ds.errors import RunError, UserError, require
from loraprune_ds.evaluate.models import find_model
from loraprune_ds.evaluate.serving import Served, ServedModel, measure_serving
from loraprune_ds.evaluate.settings import ServeSettings
from loraprune_ds.export.formats import NoRoom, export
from loraprune_ds.export.huggingface import copy_model
from loraprune_ds.export.source import find_source
from loraprune_ds.model.family import PRUNED
from loraprune_ds.zero.comm import Communicator


class Terminated(RunError):
    """SIGTERM as an exception, so that files and servers are cleaned up."""

    exit_code = 128 + signal.SIGTERM


@contextmanager
def merged(paths: list[str], comm: Communicator, *, is_first_on_node: bool) -> Iterator[list[str]]:
    """Finds all models and merges the LoRA of checkpoints and unfinished runs. Yields the paths to load. Collective."""
    with ExitStack() as stack:
        scratch = None
        if is_first_on_node:
            scratch = Path(stack.enter_context(TemporaryDirectory(prefix="evaluate-")))
        with comm.patient() as waiting:
            found = waiting.all_or_raise(
                lambda: [find_or_merge(path, scratch / str(i)) for i, path in enumerate(paths)] if scratch else None
            )
        # The ranks of a node follow its first one.
        yield next(names for names in reversed(comm.gather_objects(found)[: comm.rank + 1]) if names)


def find_or_merge(path: str, out: Path) -> str:
    """Returns the path of a model to load: `out` for a checkpoint or an unfinished run, otherwise `path` itself."""
    if any((Path(path) / name).is_file() for name in (STATUS_FILE, STATE_FILE)):
        source = find_source(Path(path))
        if source.model is None:
            try:
                remarks = export(source, "hf", out)
            except NoRoom as error:
                raise UserError(f"{path} is to be merged first: {error}; TMPDIR names another folder") from None
            for remark in remarks:
                sys.stderr.write(f"note: {path}: {remark}\n")
            return str(out)
    find_model(path)
    return path


def serve(paths: list[str], settings: ServeSettings, precision: str) -> list[Served]:
    """Measures the models in a server. llama.cpp gets GGUF files of `precision`.

    Raises:
        Terminated: SIGTERM came.
        UserError: a model cannot be served.
    """

    def terminate(*_: object) -> NoReturn:
        raise Terminated("ended by SIGTERM")

    signal.signal(signal.SIGTERM, terminate)
    form = "hf" if settings.server == "vllm" else f"gguf-{precision}"
    with TemporaryDirectory(prefix="serve-") as scratch:
        models = [served_model(path, form, Path(scratch, str(i))) for i, path in enumerate(paths)]
        return measure_serving(models, settings)


def served_model(path: str, form: str, out: Path) -> ServedModel:
    """Finds or writes the files that a server loads. The only modelling file that may run is this package's."""
    found = find_model(path)
    require(not found.adapter, f"{path}: --serve cannot merge an adapter; merge it into its base model first")
    shape, folder = found.pretrained.shape, found.pretrained.folder
    trust = form == "hf" and shape.model_type.startswith(PRUNED)
    if form != "hf":
        export(find_source(folder), form, out)
        (folder,) = out.glob("*.gguf")
    elif trust:
        out.mkdir()
        copy_model(found.pretrained, out, lambda file, link: link.symlink_to(file.resolve()))
        folder = out
    return ServedModel(folder, form, found.pretrained.config["vocab_size"], trust, shape.family.vllm)
