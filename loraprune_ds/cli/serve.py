"""Gives models to a server: `evaluate --serve`."""

import signal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

from loraprune_ds.errors import RunError, require
from loraprune_ds.evaluate.models import find_model
from loraprune_ds.evaluate.serving import Served, ServedModel, ServeSettings, measure_serving
from loraprune_ds.export.formats import export
from loraprune_ds.export.huggingface import copy_model
from loraprune_ds.export.source import find_source
from loraprune_ds.model.family import PRUNED


class Terminated(RunError):
    """Is what SIGTERM becomes. So files and servers are gone afterwards."""

    exit_code = 128 + signal.SIGTERM


def serve(paths: list[str], settings: ServeSettings, precision: str) -> list[Served]:
    """Measures the models in a server. llama.cpp gets GGUF files, which are gone afterwards.

    Raises:
        Terminated: SIGTERM came.
        UserError: a model cannot be served.
    """

    def terminate(*_: object) -> NoReturn:
        raise Terminated("ended by SIGTERM")

    signal.signal(signal.SIGTERM, terminate)
    with TemporaryDirectory(prefix="serve-") as scratch:
        form = "hf" if settings.server == "vllm" else f"gguf-{precision}"
        return measure_serving(
            [served_model(path, form, Path(scratch, str(i))) for i, path in enumerate(paths)], settings
        )


def served_model(path: str, form: str, out: Path) -> ServedModel:
    """Finds or writes what a server loads. The only modelling file that may run is the one of this package."""
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
