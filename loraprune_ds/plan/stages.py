"""Bytes of a rank over the whole run, term by term. README.md in this folder has the formulas."""

from dataclasses import dataclass, field

from loraprune_ds.model.frozen import READ_CHUNK, Held
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.plan import quality
from loraprune_ds.plan.activations import PlannedBatch, activations, forward_temporaries, logits
from loraprune_ds.plan.fetching import PassTraffic
from loraprune_ds.plan.held import Terms, split_state
from loraprune_ds.plan.request import Request
from loraprune_ds.plan.traffic import Passes
from loraprune_ds.pruning.criterion import DEVICE_BLOCK_NUMEL
from loraprune_ds.zero.flat import GATHERED_NUMEL, gather_rounds


@dataclass(frozen=True)
class Stage:
    """Holds the bytes of a rank at one stage of the run.

    Attributes:
        state: on the GPU between two steps, by term.
        phases: on top for a while, by phase and term. Phases do not overlap.
        host: in host memory, by term.
    """

    name: str
    state: Terms
    phases: dict[str, Terms]
    host: Terms = field(default_factory=dict)
    is_cut: bool = False

    @property
    def resident(self) -> int:
        """Returns the bytes on the GPU between two steps."""
        return sum(self.state.values())

    @property
    def peak(self) -> int:
        """Returns the bytes on the GPU in the worst phase."""
        return self.resident + sum(self.phases[self.peak_phase].values())

    @property
    def peak_phase(self) -> str:
        """Names the worst phase."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def host_peak(self) -> int:
        return sum(self.host.values())


def loading_stage(request: Request) -> Stage:
    """Builds the stage from the disk to the engine. LoRA is whole until DeepSpeed shards it."""
    state, host = split_state(request, request.shape, stepped=False, passed=False)
    largest = max(request.held_shards([x]) for x in request.shape.held(None, request.element_size).values())
    reading = largest + (4 if request.shape.int8 else 2) * READ_CHUNK * 4
    lora = sum(request.shape.lora_sizes(request.config.lora.r))
    held = {"weights": state.pop("weights")} if "weights" in state else {}
    phases = {"building": {"lora_whole": lora * request.element_size}, "engine starts": state}
    return Stage("loading", held, phases, host | {"reading": reading})


def training_stage(name: str, request: Request, passes: Passes, *, scores: bool = True) -> Stage:
    """Builds the stage of steps, evaluations and the export at a shape.

    Args:
        scores: the steps score, and measure if the run does.
    """
    shape, e = passes.shape, request.element_size
    state, host = split_state(request, shape, measures=scores)
    gradients = passing = scoring = Terms()
    if scores:
        gradients = _if_any(weight_gradients=quality.weight_gradients(request, shape))
        passing = _if_any(
            whole_gradient=quality.whole_gradient(request, shape),
            squared_gradients=quality.squared_gradients(request, shape),
            measured_inputs=quality.measured_inputs(request, shape),
        )
        scoring = _scoring(request, shape) | gradients
    copies = _if_any(
        second_copy_of_lora=request.second_copies(Held((n,), e) for n in shape.lora_sizes(request.config.lora.r))
    )
    reduction = 4 * min(request.bucket_numel, sum(shape.lora_sizes(request.config.lora.r)))  # in the order of the ranks
    stepping = 0 if request.offloads("optimizer") else 2 * request.lora_shards(shape) * 4
    whole_layer = _whole_layer(shape) * e
    phases = {
        "training": _training(request, shape, passes.training) | gradients | passing | copies,
        "reducing gradients": {"gradient_reduction": reduction} | gradients | copies,
        "optimizer step": {"optimizer_temporaries": stepping} | copies,
        "scoring": scoring | copies,
        "evaluation": _evaluation(request, shape, passes.evaluation) | copies,
        "export": {"layer_on_its_writer": 2 * whole_layer},
    }
    return Stage(name, state, phases, host | {"export": whole_layer})


def cut_stage(name: str, request: Request, before: ModelShape, after: ModelShape) -> Stage:
    """Builds the stage of a cut. All of the old state is still there."""
    state, host = split_state(request, before, measures=True)
    new_state, new_host = split_state(request, after)
    rebuilt = (new_state | new_host)["lora"]  # bucket and gradients go before the new ones come
    rebuilt += new_state.get("lora_masters", 0) + new_state.get("lora_moments", 0)
    phases = {
        "refit": {"refit": quality.refit_peak(request, before, after)},
        "repartition": {"repartition": _reshard(request, before)},
        "optimizer rebuilt": {"new_optimizer_buffers": rebuilt},
    }
    return Stage(name, state, phases, host, is_cut=True)


def exported_stage(request: Request, passes: Passes) -> Stage:
    """Builds the stage of the exported model, which is evaluated when the run's own is gone. It is never int8.

    Args:
        request: of a run without int8 weights.
    """
    weights = request.held_shards(passes.shape.held(None, request.element_size).values())
    return Stage(
        "exported", {"weights": weights}, {"evaluation": _evaluation(request, passes.shape, passes.evaluation)}
    )


def forward_pass(request: Request, shape: ModelShape, traffic: PassTraffic, batch: PlannedBatch) -> Terms:
    """Returns the terms of a pass without backward and without the head."""
    hidden_states = batch.tokens * (3 * batch.element_size + 4) * shape.hidden_size
    return {
        "gathered_weights": traffic.peak_live,
        "activations": hidden_states + forward_temporaries(shape, batch),
        **_dequantised(request, shape),
    }


def _if_any(**terms: int) -> Terms:
    """Drops the terms of settings that are off."""
    return {name: value for name, value in terms.items() if value}


def _training(request: Request, shape: ModelShape, traffic: PassTraffic) -> Terms:
    train, lora = request.config.train, request.config.lora
    batch = request.batch(train.micro_batch_size, request.config.data.window)
    held = activations(
        request.source,
        shape,
        batch,
        lora_rank=lora.r,
        dropout=lora.lora_dropout > 0,
        checkpointing=train.gradient_checkpointing,
    )
    head = logits(shape, batch, train.loss_chunk_tokens)
    if train.distill_weight:
        head = quality.distilled_logits(request, shape, batch)
    gathered = {"gathered_weights": traffic.peak_live}
    return gathered | {"activations": held, "logits": head} | _dequantised(request, shape)


def _evaluation(request: Request, shape: ModelShape, traffic: PassTraffic) -> Terms:
    batch = request.batch(request.config.evaluate.batch_size, request.config.evaluate.window)
    held = logits(shape, batch, request.config.train.loss_chunk_tokens)
    return forward_pass(request, shape, traffic, batch) | {"logits": held}


def _scoring(request: Request, shape: ModelShape) -> Terms:
    """Returns the terms of scoring. LoRA masters and gradients are there as own shards, all shards, whole factors."""
    layers = [shape.layer_lora_sizes(i, request.config.lora.r) for i in range(len(shape.layers))]
    rounds = gather_rounds([2 * sum(sizes) for sizes in layers], GATHERED_NUMEL)
    shards, whole = (max(sum(map(count, layers[r.start : r.stop])) for r in rounds) for count in (request.shards, sum))
    block = max(request.shards([rows * columns]) + 2 * columns for rows, columns in quality.linear_sizes(shape))
    groups = sum(len(linear.parts) * max(shape.layers[i].values()) for i, linear in shape.linear_ids())
    if request.config.prune.criterion == "fisher":  # the vectors alone
        return {"score_sums": 8 * groups}
    return {
        "lora_factors": 2 * 4 * (shards + shards * request.world_size + whole),
        "score_blocks": 3 * 4 * min(block, DEVICE_BLOCK_NUMEL),  # of whole rows
        "score_sums": 8 * groups,
    }


def _reshard(request: Request, shape: ModelShape) -> int:
    """Returns three shards of the widest layer: one leaves, one arrives, one is new."""
    layers = range(len(shape.layers))
    return 3 * max(request.held_shards(shape.held(i, request.element_size).values()) for i in layers)


def _dequantised(request: Request, shape: ModelShape) -> Terms:
    """Returns the one linear, or one expert's, that a pass holds in the model's dtype, if its weights are int8."""
    largest = max(rows * columns for rows, columns in quality.matrix_sizes(shape))
    return _if_any(dequantised_linear=shape.int8 * largest * request.element_size)


def _whole_layer(shape: ModelShape) -> int:
    """Counts the elements that are written at once: the widest layer, or embedding and head."""
    ends = shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)
    return max(ends, *(shape.layer_numel(i) for i in range(len(shape.layers))))
