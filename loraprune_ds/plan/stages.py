"""Bytes of a rank over the whole run, by term. README.md in this folder has the formulas."""

import math
from dataclasses import dataclass, replace

from loraprune_ds.model.adapters import is_gathered_whole
from loraprune_ds.model.frozen import StoredTensor
from loraprune_ds.model.logits import chunk_size
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.plan import refits
from loraprune_ds.plan.activations import activations, forward_temporaries, logits
from loraprune_ds.plan.request import PlannedBatch, Request, full_bytes
from loraprune_ds.pruning.criterion import DEVICE_BLOCK_NUMEL
from loraprune_ds.ranks.flat import GATHERED_NUMEL

Terms = dict[str, int]  # bytes by name


@dataclass(frozen=True)
class Stage:
    """Holds the bytes of a rank: on the GPU between two steps, in separate phases, and in host memory."""

    name: str
    state: Terms
    phases: dict[str, Terms]
    host: Terms

    @property
    def resident(self) -> int:
        return sum(self.state.values())

    @property
    def peak(self) -> int:
        return self.resident + self._bytes(self.peak_phase)

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self._bytes)

    def _bytes(self, phase: str) -> int:
        return sum(self.phases[phase].values())


def plan_stages(request: Request, after: ModelShape, final: ModelShape) -> list[Stage]:
    """Plans the memory of the run. The first cut is the largest; `after` is the shape after it."""
    stages = [
        training_stage("dense", request, request.shape),
        _cut(request, request.shape, after),
        training_stage("after the last cut", request, final, scores=False),
    ]
    if (
        request.config.model.frozen
    ):  # the export is not quantised. It is evaluated after the run's model was freed
        config = request.config
        stock = replace(request, config=replace(config, model=replace(config.model, frozen=None)))
        shape = stock.shape_at(stock.schedule.steps)
        weights = {"weights": stock.shard_bytes(stock.stored(shape))}
        stages.append(Stage("exported", weights, {"evaluation": _evaluation(stock, shape)}, {}))
    return stages


def training_stage(name: str, request: Request, shape: ModelShape, *, scores: bool = True) -> Stage:
    """Builds the stage of steps and evaluations at a shape. Its steps may score and measure."""
    state, host = split_state(request, shape)
    stepping = (8 if request.is_local else 12) * request.lora_shards(shape)
    stepping *= not request.offloads("optimizer")
    phases = {
        "training": _training(request, shape),
        "optimizer step": {"optimizer_temporaries": stepping},
        "scoring": _scoring(request, shape) if scores else {},
        "evaluation": _evaluation(request, shape),
    }
    if scores:
        phases["training"] |= _observing(request, shape)
    if request.taught:
        phases["teacher's pass"] = _teaching(request)
    factors = request.element_size * request.lora_shards(shape)
    for terms in phases.values():
        terms["second_copy_of_lora"] = request.second_copy(factors)
    embedding = shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)
    written = request.element_size * max(embedding, *(layer.numel for layer in shape.layers))
    phases = {phase: {term: n for term, n in terms.items() if n} for phase, terms in phases.items()}
    return Stage(name, state, phases, host | {"export": written})


def split_state(request: Request, shape: ModelShape) -> tuple[Terms, Terms]:
    """Returns the terms (on the GPU, in host memory)."""
    lora = request.lora_shards(shape)
    stored = request.stored(shape)
    terms = {
        "weights": request.shard_bytes(stored),
        "teacher": request.shard_bytes(request.taught),
        "lora": 0 if request.is_local else request.element_size * lora,
        "lora_masters": 4 * lora,  # fp32, like moments, gradients and the bucket
        "lora_moments": 8 * lora,  # from the first step on
        "lora_gradients": 4 * lora,
        "reduce_bucket": 4 * request.fetch.reduce_bucket_size,
    }
    if copies := request.second_copy(terms["weights"] + terms["teacher"]):
        terms["second_copy"] = copies
    on_host: list[str] = []
    if request.offloads("param"):
        on_host += ["weights", "teacher", "lora", "second_copy"]
    if request.offloads("optimizer"):
        on_host += ["lora_masters", "lora_moments", "lora_gradients"]
    host = {name: terms.pop(name) for name in list(terms) if name in on_host}
    if request.offloads("optimizer"):
        # DeepSpeed's CPU optimizer has a separate copy
        host["lora_gradients_for_the_step"] = host["lora_gradients"]
    if blocks := _pinned_blocks(request, [*stored, *request.taught], host):
        host["pinned_rounding"] = sum((1 << (block - 1).bit_length()) - block for block in blocks)
    return terms, host


def _pinned_blocks(request: Request, frozen: list[StoredTensor], host: Terms) -> list[int]:
    """Lists the bytes of blocks of page-locked memory, which torch rounds up to powers of two."""
    blocks: list[int] = []
    if request.offloads("optimizer", pinned=True):
        blocks += 2 * [host["lora_gradients"]]
    # each frozen shard is a block, and LoRA's share a buffer
    if request.offloads("param", pinned=True):
        shards = [request.shard_bytes([tensor]) for tensor in frozen]
        blocks += [host["lora"], *shards]
        if "second_copy" in host:
            blocks += map(request.second_copy, shards)
    return blocks


def gathered_weights(request: Request, shape: ModelShape, *, trains: bool = True) -> int:
    """Returns the most bytes that a pass gathers at the same time, buffers included."""
    layer, module, parameter, linear = _largest(request, shape)
    if request.world_size == 1 and not request.offloads("param"):
        return linear  # a parameter's data is its only shard
    numel, model = _model_size(request, shape)
    limit = round(request.fetch.max_live_parameters * model / numel)
    live = prefetched = 0
    if trains and module <= limit:  # DeepSpeed fetches nothing ahead of a larger module
        live = limit + parameter  # the last one may exceed the limit
        prefetched = round(request.fetch.prefetch_bucket_size * model / numel)
    # what a checkpointed layer gathers stays until its backward pass has ended
    stays = layer if trains and not is_gathered_whole(shape) else 0
    # A prefetch is copied at once. Its buffer stays until the last of it is in use, also while a linear is dequantised.
    fetched = max(live, stays) + module + max(module, prefetched + linear)
    # buffers of two fetches stay until all that they brought is in use
    return min(fetched, model + 2 * max(min(layer, module), prefetched) + linear)


def _model_size(request: Request, shape: ModelShape) -> tuple[int, int]:
    """Returns (elements, bytes) of the unsharded model with LoRA."""
    stored = request.stored(shape)
    lora = sum(shape.lora_numel(request.config.lora.r))
    numel = sum(math.prod(tensor.shape) for tensor in stored) + lora
    return numel, full_bytes(stored) + lora * request.element_size


def _largest(request: Request, shape: ModelShape) -> tuple[int, int, int, int]:
    """Returns the bytes of the largest layer, of the largest module gathered as one, with LoRA, of a layer's largest
    frozen parameter, and of a linear that is dequantised (0 if none is; one expert of a stack at a time).
    """
    r = request.config.lora.r
    element_size = request.element_size
    layers: list[int] = []
    modules = [element_size * tensor.numel for tensor in shape.outer]
    parameters: list[int] = []
    dequantised = [0]
    for layer in set(shape.layers):
        frozen = full_bytes(request.stored_as(*layer.tensors))
        layers.append(frozen + element_size * sum(layer.lora_numel(r)))
        for linear in layer.linears:
            lora = sum(map(math.prod, linear.lora_shapes(r)))
            stored = request.stored_as(linear)
            modules.append(full_bytes(stored) + element_size * lora)
            parameters += [full_bytes([part]) for part in stored]
            dequantised.append(request.dequantised(linear))
    if is_gathered_whole(shape):
        modules += layers
    return max(layers), max(modules), max(parameters), max(dequantised)


def _cut(request: Request, before: ModelShape, after: ModelShape) -> Stage:
    """Builds the stage of a cut, with the whole state from before it."""
    state, host = split_state(request, before)
    # Only what stays moves, on average as much from each rank.
    layers = [
        request.stored_as(*layer.tensors)
        for layer, old in zip(after.layers, before.counts, strict=True)
        if layer.counts != old
    ]
    if request.is_local:  # one is cut after the other
        moved = max(map(full_bytes, ([tensor] for layer in layers for tensor in layer)), default=0)
    else:
        # parts and the buffer that leaves, that and what arrives, or that and the new ones
        moved = 2 * max(map(request.shard_bytes, layers), default=0)
    phases: dict[str, Terms] = {"moving": {"repartition": moved}}
    if request.refits:
        batch = request.training_batch
        kept = {"hidden_states": refits.bytes_of_passes(request, before)}
        of_embeddings, of_layer = _gathered_once(request, before)
        phases["repeated passes, embeddings"] = kept | {"gathered_weights": of_embeddings}
        phases["repeated passes"] = kept | _forward_pass(request, before, batch)
        phases["repeated passes"] |= {
            "gathered_weights": of_layer,
            "measured_inputs": 4 * batch.tokens * refits.widest_inputs(request, before),
            "input_moments": refits.bytes_of_moments(request, before),
        }
        phases["refit"] = kept | {"refit": refits.bytes_in_a_refit(request, before, after)}
    return Stage("the first cut", state, phases, host)


def _gathered_once(request: Request, shape: ModelShape) -> tuple[int, int]:
    """Returns the most bytes while all passes go through the embeddings, and through a layer."""
    layer, module, _, linear = _largest(request, shape)
    if request.world_size == 1 and not request.offloads("param"):
        return 0, linear
    embedding = request.element_size * max(tensor.numel for tensor in shape.outer)
    # next to a buffer of a module, or to a linear that is dequantised
    return 2 * embedding, layer + max(min(layer, module), linear)


def _training(request: Request, shape: ModelShape) -> Terms:
    """Returns the terms of a micro-batch. `distill_weight` adds the teacher's logits and the target."""
    train = request.config.train
    batch = request.training_batch
    head = logits(shape, batch)
    if train.distill_weight:
        per_logit = 12 if train.distill_temperature == 1 else 16
        head = min(batch.tokens, chunk_size(shape.vocab_size)) * shape.vocab_size * per_logit
        head += 3 * batch.tokens * shape.hidden_size * request.element_size
    return {
        "gathered_weights": gathered_weights(request, shape),
        "activations": activations(request, shape, batch),
        "logits": head,
    }


def _teaching(request: Request) -> Terms:
    batch = request.training_batch
    terms = _forward_pass(request, request.shape, batch, prefetches=True)
    targets = batch.tokens * request.shape.hidden_size * request.element_size
    return terms | {"targets": targets}


def _observing(request: Request, shape: ModelShape) -> Terms:
    """Returns the terms of scoring and measuring in the passes of a step."""
    terms: Terms = {}
    tokens = request.training_batch.tokens
    if request.config.prune.criterion == "fisher":
        widest = 0
        kept = 0
        for _, linear in shape.input_linears():
            width = linear.inputs
            if linear.stack:
                width *= shape.mixture.experts_per_token if shape.mixture else 1
                # Dropout replaces the inputs of expert stacks, so the originals are kept.
                kept += width if request.config.lora.lora_dropout else 0
            widest = max(widest, width)
        blocks = 12 * min(tokens * widest, DEVICE_BLOCK_NUMEL)
        terms["squared_gradients"] = blocks + request.element_size * tokens * kept
    return terms


def _forward_pass(
    request: Request, shape: ModelShape, batch: PlannedBatch, *, prefetches: bool = False
) -> Terms:
    """Returns the terms of a pass without backward and without the head."""
    hidden_states = batch.tokens * (3 * batch.element_size + 4) * shape.hidden_size
    gathered = gathered_weights(request, shape, trains=prefetches)
    return {
        "gathered_weights": gathered,
        "activations": hidden_states + forward_temporaries(shape, batch),
    }


def _evaluation(request: Request, shape: ModelShape) -> Terms:
    batch = request.batch(request.config.evaluate.batch_size, request.config.evaluate.window)
    return _forward_pass(request, shape, batch) | {"logits": logits(shape, batch)}


def _scoring(request: Request, shape: ModelShape) -> Terms:
    """Returns the terms of scoring: blocks, and LoRA masters and gradients of some layers."""
    if request.config.prune.criterion == "fisher":
        return {}
    layers = [sum(layer.lora_numel(request.config.lora.r)) for layer in shape.layers]
    at_once = min(sum(layers), max(GATHERED_NUMEL // 2, *layers))
    blocks = [0]
    for _, linear in shape.linears():
        if linear.spans:  # a rank scores whole rows
            blocks.append(request.shard_numel(linear.numel) + 2 * linear.matrix[1])
    block = min(max(blocks), DEVICE_BLOCK_NUMEL)
    factors = 0  # one process has them whole
    if not request.is_local:
        factors = 20 * at_once + 4 * request.shard_numel(at_once)
    # blocks come when 12 bytes of the factors are left
    return {"lora_factors": factors, "score_blocks": max(0, 12 * block - factors // 2)}
