"""The callback's checkpoints, its view of a foreign training, and the update, until it lets go."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraprune_ds.checkpoint import layout
from loraprune_ds.checkpoint.load import SavedStep, verify_step
from loraprune_ds.checkpoint.state import Origin, ResumeState, State, Totals
from loraprune_ds.config import PruneConfig
from loraprune_ds.errors import UserError
from loraprune_ds.files import write_json
from loraprune_ds.hf.callback import LoraPruneCallback
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.session import checkpoint
from loraprune_ds.session.checkpoint import PruningCheckpoint, cut_to_checkpoint
from loraprune_ds.session.pruning import Pruning
from loraprune_ds.zero.sharded import ShardedModel
from tests.oracle.models import make_batches, make_tiny_llama
from tests.support.local_training import make_model
from tests.support.refusals import must_name
from tests.support.resuming import assert_equal_tensors

COMM = cast(Any, SimpleNamespace(world_size=2, rank=0))
CONFIG = PruneConfig(ratio=0.4, channel_multiple=1)
REFIT = PruneConfig(ratio=0.3, prune_every=2, channel_multiple=1)


def saved(checkpoint: Path, prune: Any = None, **changes: Any) -> Path:
    """Writes the state of a callback's checkpoint whose tensors do not matter. Returns its path."""
    prune = asdict(CONFIG) if prune is None else prune
    origin = Origin({"output_dir": "unknown", "prune": prune}, 10, 0, False, [])
    state = State(5, origin, [], "zero3", 2, 1.0, {}, {}, [], 0.4, Totals(), [], "cpu", [])
    path = checkpoint / "pruning/state.json"
    resume = ResumeState("Adam", updates_since_cut=3)
    for folder, value in ((path.parent, asdict(state) | changes), (path.parent / "resume", resume)):
        folder.mkdir(parents=True)
        write_json(folder / path.name, value)
        layout.write_manifest(folder, {path.name: layout.seal(folder / path.name)})
    return path


def step_with(folder: Path, **changes: Any) -> SavedStep:
    return verify_step(saved(folder, **changes).parent, COMM, resume=True)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"prune": asdict(PruneConfig(ratio=0.3))}, "ratio"),
        ({"prune": {"ratio": 0.4}}, "channel_multiple"),
        ({"prune": {"ratio": 0.4, "score_every": 2}}, "prune.score_every"),
        ({"prune": asdict(CONFIG) | {"sizes": ["0.4"]}}, "prune.sizes second run"),
        ({"format": 9}, "format 9 commit 91eae51f"),
        ({"surplus": 1}, "state.json"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(
    tmp_path: Path, changes: dict[str, Any], names: str
) -> None:
    saved(tmp_path, **changes)
    must_name(f"{tmp_path} {names}", checkpoint._read, tmp_path, CONFIG, COMM)


OPTIMIZERS = {
    "momentum_buffer": partial(torch.optim.SGD, momentum=0.9),
    "max_exp_avg_sq": partial(torch.optim.AdamW, amsgrad=True),
    "mu_product": torch.optim.NAdam,
    "sum": torch.optim.Adagrad,
    "grad_avg": partial(torch.optim.RMSprop, centered=True, momentum=0.9),
    "prev": torch.optim.Rprop,
}


@pytest.mark.parametrize(("state", "make"), OPTIMIZERS.items(), ids=list(OPTIMIZERS))
def test_each_optimizer_goes_on_to_the_bit(tmp_path: Path, state: str, make: Any) -> None:
    """Beside LoRA the embedding trains. A loss scaler trains along, which grows after two steps."""
    folder = make_tiny_llama(tmp_path / "tiny", hidden=16, ffn=24, vocab=32)

    def train(start: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model = make_model(folder, whole=["embed_tokens"])
        saved = None if start else cut_to_checkpoint(model, tmp_path, CONFIG, Communicator())
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = make(trained, lr=1e-2)
        scale = 64.0 if start else 2.0
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        pruning = Pruning(model.train(), optimizer, CONFIG, 4, checkpoint=saved, scaler=scaler)
        batches = make_batches(steps=4, samples=4, tokens=8, vocab=32, seed=3)
        for ids, labels in batches[pruning.step :]:
            pruning.begin_step()
            scaler.scale(model(input_ids=ids, labels=labels).loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            pruning.end_step()
            if start and pruning.step == 3:
                pruning.save(tmp_path / "checkpoint-3")
        assert pruning.cuts
        pruning.close()
        states = {
            f"{i}.{key}": torch.as_tensor(value)
            for i, parameter in enumerate(trained)
            for key, value in optimizer.state[parameter].items()
        }
        return model.state_dict(), states | {"scale": torch.tensor(scaler.get_scale())}

    weights, states = train(True)
    assert any(key.endswith(f".{state}") for key in states)
    again, resumed = train(False)
    assert_equal_tensors(again, weights)
    assert_equal_tensors(resumed, states)


def test_what_is_not_given_comes_from_the_checkpoint(tmp_path: Path) -> None:
    path = saved(tmp_path)
    for given in (PruneConfig(), PruneConfig(ratio=0.4), CONFIG):
        assert checkpoint._read(tmp_path, given, COMM)[1] == CONFIG
    path.write_text(path.read_text() + "\n")
    must_name("state.json", checkpoint._read, tmp_path, CONFIG, COMM)


def test_the_newest_complete_checkpoint_is_found(tmp_path: Path) -> None:
    # `trainer.save_state()` writes it next to the checkpoints
    (tmp_path / "trainer_state.json").touch()
    # TENSORBOARD_LOGGING_DIR may be the same folder
    (tmp_path / "pruning").mkdir()
    (tmp_path / "pruning" / "events.out.tfevents.1").touch()
    assert checkpoint._find(tmp_path / "nothing") is None
    for step in (3, 12):
        saved(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-20").mkdir()  # the save was cut short
    assert checkpoint._find(tmp_path) == tmp_path / "checkpoint-12"
    assert checkpoint._find(tmp_path / "checkpoint-3") == tmp_path / "checkpoint-3"


def test_checkpoints_without_pruning_are_refused(tmp_path: Path) -> None:
    for name in ("checkpoint-3", "checkpoint-12"):
        (tmp_path / name).mkdir()
    newest = tmp_path / "checkpoint-12"
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "trainer_state.json").touch()
    for folder in (newest, tmp_path):
        must_name(f"{newest} pruning/", checkpoint._find, folder)
    moved = tmp_path / "moved"
    must_name(f"{moved} pruning/", LoraPruneCallback(CONFIG).resume, Mock(), moved)


def test_a_resumed_pruner_knows_its_scores_since_the_last_cut(tmp_path: Path) -> None:
    """A cut may come before the next score, if the next step overflows in fp16."""
    step_with(tmp_path).restore_pruner(pruner := Mock(**{"limits.dense.kinds": ("heads",)}))
    assert pruner.average.updates_since_cut == 3
    pruner.passes.restore.assert_called_once_with([])


def test_a_model_that_is_called_with_embeddings_goes_on_to_the_bit(tmp_path: Path) -> None:
    """As a trainer with images calls it. A cut follows that repeats passes of before the save."""
    folder = make_tiny_llama(tmp_path / "tiny", kv_heads=4)

    def train(saved: PruningCheckpoint | None, model: Any) -> Any:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        pruning = Pruning(model.train(), optimizer, REFIT, 4, checkpoint=saved)
        batches = make_batches(steps=4, samples=4, tokens=8, vocab=97, seed=3)
        embed = model.get_base_model().get_input_embeddings()
        for ids, labels in batches[pruning.step :]:
            pruning.begin_step()
            hidden = embed(ids) + 0.1  # of an image
            mask = torch.arange(8) < torch.tensor([[8], [8], [6], [5]])
            model(inputs_embeds=hidden, attention_mask=mask, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            pruning.end_step()
            if pruning.step == 3:
                pruning.save(tmp_path / "checkpoint-3")
        assert [cut.step for cut in pruning.cuts] == [2, 4]
        pruning.close()
        return model.state_dict()

    straight = train(None, make_model(folder))
    passes = torch.load(tmp_path / "checkpoint-3/pruning/resume/passes-00000.pt", weights_only=True)
    assert passes["steps"][0][0][0]["inputs"]["inputs_embeds"].shape == (4, 8, 32)
    model = make_model(folder)
    saved = cut_to_checkpoint(model, tmp_path, REFIT, Communicator())
    assert saved is not None
    assert_equal_tensors(train(saved, model), straight)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 1.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    other = make_model(folder)
    must_name(f"{folder} checkpoint-3", cut_to_checkpoint, other, tmp_path, REFIT, Communicator())


def test_all_ranks_hear_of_an_adapter_that_cannot_name_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 4}')
    training = Mock()
    training.model.shape.linears.return_value = []
    comm = training.model.comm
    comm.write_on_rank_0 = Mock(side_effect=UserError("no space"))
    must_name("space", Pruning.save_base, training, tmp_path / "base", tmp_path)
    comm.write_on_rank_0.call_args.args[1]()
    named = {"r": 4, "base_model_name_or_path": str(tmp_path / "base")}
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == named


def test_an_update_comes_after_the_scores_and_alone_when_pruning_has_let_go() -> None:
    calls: list[str] = []
    zero = SimpleNamespace(step=lambda: calls.append("update"))
    take_back = ShardedModel.before_each_update(
        Mock(zero_optimizer=zero), lambda: calls.append("scores")
    )
    zero.step()
    take_back()
    zero.step()
    assert calls == ["scores", "update", "update"]
