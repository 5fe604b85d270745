"""Bytes that a rank holds over the whole run, term by term. Every term is a formula of README.md in this folder."""

import math
from dataclasses import dataclass, field

from loraprune_ds.model.pretrained import READ_CHUNK
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.plan import options
from loraprune_ds.plan.activations import Batch, activations, forward_temporaries, logits
from loraprune_ds.plan.fetching import PassTraffic
from loraprune_ds.plan.passes import parameter_sizes
from loraprune_ds.plan.request import Request
from loraprune_ds.pruning.criterion import DEVICE_BLOCK_NUMEL
from loraprune_ds.zero.flat import partition_numel
from loraprune_ds.zero.memory import state_terms

OPTIMIZER_TERMS = ("lora_masters", "lora_moments", "lora_gradients")


@dataclass(frozen=True)
class Stage:
    """What a rank holds at one stage of the run: the state that stays, and what each phase of it adds.

    Attributes:
        state: bytes on the GPU between two steps, by term.
        phases: bytes that come on top for a while, by phase and term; phases do not overlap.
        host: bytes of this rank in host memory, by term.
        is_cut: the model shrinks in it.
    """

    name: str
    state: dict[str, int]
    phases: dict[str, dict[str, int]]
    host: dict[str, int] = field(default_factory=dict)
    is_cut: bool = False

    @property
    def resident(self) -> int:
        """Bytes on the GPU between two steps."""
        return sum(self.state.values())

    @property
    def peak(self) -> int:
        """Bytes on the GPU in the worst phase."""
        return self.resident + max((sum(terms.values()) for terms in self.phases.values()), default=0)

    @property
    def peak_phase(self) -> str:
        """Which that is."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def host_peak(self) -> int:
        return sum(self.host.values())


def training_stage(
    name: str, request: Request, shape: ModelShape, train: PassTraffic, evaluation: PassTraffic, *, scores: bool = True
) -> Stage:
    """A step, before the last cut with all its scoring, and an evaluation, at a given shape."""
    state, host = _split(request, shape, stepped=True)
    shards = options.weight_gradients(request, shape) if scores else {}
    passing = options.whole_gradient(request, shape) | options.measured_inputs(request, shape) if scores else {}
    state |= options.input_moments(request, shape) if scores else {}
    phases = {
        "training": _training(request, shape, train) | shards | passing,
        "reducing gradients": {"gradient_reduction": _reduction(request, shape)} | shards,
        "optimizer step": {
            "optimizer_temporaries": 0 if request.offloads("optimizer") else 2 * _lora_piece(request, shape) * 4
        },
        "scoring": (_scoring(request, shape) | shards) if scores else {},
        "evaluation": _evaluation(request, shape, evaluation),
        "export": {"layer_on_its_writer": _whole_layer(shape) * request.element_size * 2},
    }
    return Stage(name, state, phases, host | {"export": _whole_layer(shape) * request.element_size})


def cut_stage(name: str, request: Request, before: ModelShape, after: ModelShape) -> Stage:
    """A cut, before anything of the old state is gone."""
    state, host = _split(request, before, stepped=True)
    new_optimizer = _state(request, after, stepped=True)
    rebuilt = new_optimizer["lora"]  # bucket and gradients go before the new ones come
    if not request.offloads("optimizer"):
        rebuilt += new_optimizer["lora_masters"] + new_optimizer["lora_moments"]
    state |= options.input_moments(request, before)
    phases = {
        "refit": {"refit": options.refit(request, before, after)},
        "repartition": {"repartition": repartition(request, before)},
        "optimizer rebuilt": {"new_optimizer_buffers": rebuilt},
    }
    return Stage(name, state, phases, host, is_cut=True)


def loading_stage(request: Request) -> Stage:
    """From the disk to the engine: each rank's pieces; LoRA is whole until DeepSpeed shards it."""
    shape, e = request.shape, request.element_size
    state, host = state_before_any_step(request)
    largest = max(parameter_sizes(shape, request.config.lora.r).values())
    reading = partition_numel(largest, request.cluster.world_size) * e + 2 * READ_CHUNK * 4
    lora = sum(n for name, n in parameter_sizes(shape, request.config.lora.r).items() if ".lora_" in name)
    held = {name: n for name, n in state.items() if name in ("weights",)}
    phases = {"building": {"lora_whole": lora * e}, "engine starts": {n: state[n] for n in state if n not in held}}
    return Stage("loading", held, phases, host | {"reading": reading})


def state_before_any_step(request: Request) -> tuple[dict[str, int], dict[str, int]]:
    """(on the GPU, in host memory) once the engine is there."""
    return _split(request, request.shape, stepped=False)


def repartition(request: Request, shape: ModelShape) -> int:
    """At most three local shards of the widest layer: what leaves, what arrives and the new pieces."""
    layers = [shape.layer_parameters(i).values() for i in range(len(shape.layers))]
    widest = max(_shard(request, [math.prod(dimensions) for dimensions in layer]) for layer in layers)
    return 3 * widest * request.element_size


def _state(request: Request, shape: ModelShape, *, stepped: bool) -> dict[str, int]:
    bucket = int(request.ds_config["zero_optimization"]["reduce_bucket_size"])
    return state_terms(
        shape,
        request.config.lora.r,
        world_size=request.cluster.world_size,
        element_size=request.element_size,
        bucket_numel=bucket,
        stepped=stepped,
    )


def _split(request: Request, shape: ModelShape, *, stepped: bool) -> tuple[dict[str, int], dict[str, int]]:
    """(on the GPU, in host memory) as the DeepSpeed config offloads."""
    terms = _state(request, shape, stepped=stepped)
    away: set[str] = set()
    if request.offloads("optimizer"):
        away |= set(OPTIMIZER_TERMS)
    if request.offloads("param"):
        away |= {"weights", "lora"}
    device = {name: value for name, value in terms.items() if name not in away}
    host = {name: value for name, value in terms.items() if name in away}
    if request.offloads("optimizer"):
        host["lora_gradients_for_the_step"] = terms["lora_gradients"]  # DeepSpeed's CPU optimizer has its own
    if blocks := _pinned_blocks(request, shape, terms):
        host["pinned_rounding"] = sum((1 << (block - 1).bit_length()) - block for block in blocks)
    return device, host


def _pinned_blocks(request: Request, shape: ModelShape, terms: dict[str, int]) -> list[int]:
    """Bytes of each block of page-locked memory, before torch rounds it up to a power of two."""
    blocks = []
    if request.pins("param"):  # frozen pieces one by one, LoRA's in a buffer
        frozen = (math.prod(dimensions) for dimensions in shape.parameters().values())
        blocks += [partition_numel(n, request.cluster.world_size) * request.element_size for n in frozen]
        blocks.append(terms["lora"])
    if request.pins("optimizer"):
        blocks += 2 * [terms["lora_gradients"]]
    return blocks


def _training(request: Request, shape: ModelShape, traffic: PassTraffic) -> dict[str, int]:
    config = request.config
    batch = Batch(config.train.micro_batch_size, config.data.window, request.element_size)
    held = activations(
        shape,
        batch,
        lora_rank=config.lora.r,
        dropout=config.lora.lora_dropout > 0,
        checkpointing=config.train.gradient_checkpointing,
        eager=request.eager,
    )
    distills = config.train.distill_weight > 0
    return {
        "gathered_weights": traffic.peak_live * request.element_size,
        "activations": held,
        "logits": options.distilled_logits(request, shape, batch)
        if distills
        else logits(shape, batch, config.train.loss_chunk_tokens),
    }


def _evaluation(request: Request, shape: ModelShape, traffic: PassTraffic) -> dict[str, int]:
    evaluate = request.config.evaluate
    batch = Batch(evaluate.batch_size, evaluate.window, request.element_size)
    held = logits(shape, batch, request.config.train.loss_chunk_tokens)
    return forward_pass(request, shape, traffic, batch) | {"logits": held}


def forward_pass(request: Request, shape: ModelShape, traffic: PassTraffic, batch: Batch) -> dict[str, int]:
    """A pass that keeps nothing for a backward one, without its head."""
    t, e = batch.tokens, batch.element_size
    widest = max(forward_temporaries(shape, layer, batch, eager=request.eager) for layer in shape.layers)
    return {
        "gathered_weights": traffic.peak_live * e,
        "activations": t * (3 * e * shape.hidden_size + 4 * shape.hidden_size) + widest,
    }


def _scoring(request: Request, shape: ModelShape) -> dict[str, int]:
    """One layer's LoRA masters and gradients: this rank's pieces, all pieces gathered, and the factors made of them."""
    shards, whole = 0, 0
    for i in range(len(shape.layers)):
        sizes = shape.layer_lora_sizes(i, request.config.lora.r)
        shards = max(shards, 2 * _shard(request, sizes) * 4)
        whole = max(whole, 2 * sum(sizes) * 4)
    linears = [shape.linear_shape(i, linear) for i in range(len(shape.layers)) for linear in shape.linears]
    shard = max(_shard(request, [rows * columns]) + 2 * columns for rows, columns in linears)  # to whole rows
    groups = sum(len(shape.linears) * max(layer.heads, layer.channels) for layer in shape.layers)
    return {
        "lora_factors_of_a_layer": shards + shards * request.cluster.world_size + whole,
        "score_blocks": 4 * min(shard, DEVICE_BLOCK_NUMEL) * 4,
        "score_sums": 8 * groups,
    }


def _reduction(request: Request, shape: ModelShape) -> int:
    """A full bucket once more, in the order of the ranks."""
    sizes = shape.lora_sizes(request.config.lora.r)
    bucket = int(request.ds_config["zero_optimization"]["reduce_bucket_size"])
    return min(bucket, sum(sizes)) * 4


def _lora_piece(request: Request, shape: ModelShape) -> int:
    return _shard(request, shape.lora_sizes(request.config.lora.r))


def _shard(request: Request, sizes: list[int]) -> int:
    return sum(partition_numel(n, request.cluster.world_size) for n in sizes)


def _whole_layer(shape: ModelShape) -> int:
    """Elements of what one rank writes at once: the widest layer, or embedding and head."""
    ends = shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)
    return max(ends, *(shape.layer_numel(i) for i in range(len(shape.layers))))
