"""A whole run: prepare, measure the dense model, train and cut, export, measure what was exported, report."""

import gc
import os
from contextlib import closing
from pathlib import Path

from loraprune_ds.config import RunConfig
from loraprune_ds.evaluate.perplexity import measure_perplexity
from loraprune_ds.export.from_ranks import write_merged_weights
from loraprune_ds.export.huggingface import begin
from loraprune_ds.model.checkpoint import open_checkpoint
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.train.finish import Outcome, describe_model, describe_run, model_card, publish_model
from loraprune_ds.train.output import MODEL_FOLDER, RunStatus, create_output
from loraprune_ds.train.prepare import Prepared, prepare
from loraprune_ds.train.recorder import Recorder
from loraprune_ds.train.records import EvaluationName, EvaluationRecord
from loraprune_ds.train.trainer import Trainer
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.engine import EngineLike, build_inference_engine, build_training_store
from loraprune_ds.zero.memory import peak_bytes
from loraprune_ds.zero.store import LayerKeep


def run(config: RunConfig, comm: Communicator) -> None:
    """Carries out a run on all ranks and leaves its results in `config.output_dir`. Collective.

    Raises:
        UserError: unusable input, before anything was written.
        RunError: the run went wrong; status.json says how.
    """
    prepared = prepare(config, comm, is_first_on_node=os.environ["LOCAL_RANK"] == "0")
    writes = comm.rank == 0
    folder = Path(config.output_dir)
    comm.together(lambda: create_output(config) if writes else None)
    with (
        RunStatus(folder, prepared.steps, writes=writes) as status,
        closing(Recorder(config, folder, prepared.steps, active=writes)) as recorder,
    ):
        recorder.note(describe_run(config, prepared, comm.world_size))
        staging = comm.gather_objects(comm.together(lambda: begin(folder / MODEL_FOLDER) if writes else None))[0]
        assert staging is not None
        pruned, kept = _train(config, prepared, recorder, status, staging)
        gc.collect()  # the training engine, which has cycles, before the exported model is loaded
        card = model_card(config, prepared, pruned, recorder.history)
        comm.together(lambda: describe_model(staging, config, prepared, card) if writes else None)
        recorder.write(_measure_exported(config, prepared, staging, comm))
        outcome = Outcome(pruned, kept, comm.gather_objects(peak_bytes()), comm.world_size)
        comm.together(
            lambda: publish_model(staging, folder, config, prepared, outcome, recorder.history) if writes else None
        )
        status.finish()


def _train(
    config: RunConfig, prepared: Prepared, recorder: Recorder, status: RunStatus, staging: Path
) -> tuple[ModelShape, list[LayerKeep]]:
    """Trains and cuts, then writes the merged weights. The engine lives no longer than this call."""
    store = build_training_store(config, prepared.checkpoint, prepared.ds_config, prepared.steps)
    pruner = Pruner(store, config.prune, prepared.schedule, prepared.limits, config.seed)
    trainer = Trainer(store, pruner, prepared.samples, prepared.order, config)

    def evaluate(step: int, name: EvaluationName) -> None:
        recorder.write(_measure(store.engine, config, prepared, store.comm, step=step, name=name))

    evaluate(0, "dense")
    for step in range(1, prepared.steps + 1):
        recorder.write(trainer.step(step))
        if cut := trainer.cut(step):
            recorder.write(cut)
        if step == prepared.schedule.end:
            evaluate(step, "after_last_cut")
        elif config.evaluate.every and step % config.evaluate.every == 0:
            evaluate(step, "step")
        status.update(step)
    recorder.note("writing the merged model")
    write_merged_weights(store, staging, config.model.dtype)
    return store.shape, pruner.kept


def _measure_exported(config: RunConfig, prepared: Prepared, folder: Path, comm: Communicator) -> EvaluationRecord:
    """Perplexity of the exported model, read back from disk as anyone would read it, but sharded."""
    checkpoint = comm.together(lambda: open_checkpoint(folder))  # on every node, or output_dir is not shared
    engine = build_inference_engine(
        checkpoint, config.model.attn_implementation, config.model.dtype, prepared.ds_config
    )
    return _measure(engine, config, prepared, comm, step=prepared.steps, name="pruned")


def _measure(
    engine: EngineLike, config: RunConfig, prepared: Prepared, comm: Communicator, *, step: int, name: EvaluationName
) -> EvaluationRecord:
    """Held-out perplexity on all ranks. Draws nothing and leaves no trace in the training state."""
    engine.eval()
    result = measure_perplexity(
        lambda input_ids: engine(input_ids=input_ids).logits,
        prepared.windows,
        config.evaluate.batch_size,
        device=engine.device,
        rank=comm.rank,
        world_size=comm.world_size,
        sum_over_ranks=comm.all_reduce,
    )
    engine.train()
    return EvaluationRecord(step, name, result.perplexity, result.tokens, result.windows)
