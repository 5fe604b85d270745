"""A step gives the model that the ranks held when they wrote it: layer by layer, bit by bit, merged or not."""

from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch

from loraprune_ds.errors import RunError
from loraprune_ds.export import huggingface
from loraprune_ds.export.model_card import card_of_step
from loraprune_ds.pretrained import weight_files
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.session.live_export import LiveModel
from tests.support.driver import Job, build, config_of, family_job, save, tiny_job
from tests.support.ranks import RankPool

REFIT: dict[str, Any] = {"compensate": "least_squares"}


def compare(job: Job, root: Path) -> Counter[str]:
    """Trains and cuts, and saves a step. Counts the tensors of this rank that it has like the live model, or not."""
    trainer, config = build(job), config_of(job)
    for step in range(1, len(job.batches) + 1):
        trainer.step(step)
        trainer.cut(step)
    model, step = trainer.model, save(trainer, config, root)
    live, found = (
        LiveModel(model, step.exported, step.dense_folder, config.model.dtype),
        Counter[str](),
    )
    for merge in (True, False):
        files, others = (
            dict(huggingface.read_layers(source, len(model.layers), model.comm, merge=merge))
            for source in (step, live)
        )
        assert (
            files.keys()
            == others.keys()
            == set(range(model.rank, len(model.layers) + 1, model.world_size))
        )
        for k, tensors in files.items():
            assert tensors.keys() == others[k].keys()
            found.update(
                "equal" if torch.equal(x, others[k][name]) else name for name, x in tensors.items()
            )
    full = (
        Mock(side_effect=OSError("No space left on device"))
        if model.rank == model.world_size - 1
        else Mock()
    )
    for source in (step, live):  # no rank waits for the last one, which cannot write
        with (
            patch.object(weight_files, "write_weight_file", full),
            pytest.raises(RunError, match=f"{root}.*No space"),
        ):
            huggingface.write_model(source, root, card_of_step(step), model.comm)
    return found


@pytest.mark.parametrize(
    ("family", "world_size"),
    [("llama", 2), ("int8 llama", 3), ("nf4 llama", 3), ("int8 gpt_oss", 2)],
)
def test_a_step_is_the_model_that_the_ranks_held(
    ranks: RankPool, tmp_path: Path, family: str, world_size: int
) -> None:
    prune, refits = {"ratio": 0.3, "prune_every": 2, "protected_first": 0}, "llama" in family
    frozen, _, name = family.rpartition(" ")
    given: dict[str, Any] = {"dtype": "bfloat16", "frozen": frozen} if frozen else {}
    if refits:
        sizes = {"dtype": given.get("dtype", "float32"), "biases": True}
        if frozen == "nf4":
            sizes["hidden"] = 192  # whole blocks
        job = tiny_job(tmp_path, prune | REFIT, steps=4, model=sizes, **given)
    else:
        sizes = {"dtype": torch.bfloat16}
        job, _ = family_job(tmp_path, name, prune, steps=4, model=sizes, **given)
    found = sum(ranks.run(world_size, compare, job, tmp_path / "steps"), Counter[str]())
    # merged and not
    assert found == {"equal": 2 * len(open_pretrained(job.folder).shape.parameters())}
    assert any((tmp_path / "steps").glob("*/refit-*")) == refits
