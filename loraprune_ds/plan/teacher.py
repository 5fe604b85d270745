"""What the uncut model's one pass over the samples of a run needs (`train.distill_weight`), before the first step.

Formulas in README.md in this folder. The pass is train/teacher_pass.py: as many files at a time as there are ranks.
"""

from loraprune_ds.model.distillation import chunk_size, samples_per_file, token_bytes
from loraprune_ds.plan.activations import Batch
from loraprune_ds.plan.fetching import PassTraffic
from loraprune_ds.plan.memory import Stage, forward_pass, state_before_any_step
from loraprune_ds.plan.request import Request
from loraprune_ds.plan.seconds import Seconds, attention_product
from loraprune_ds.zero.ds_config import FetchLimits
from loraprune_ds.zero.flat import partition_numel

FILE_COPIES = 2  # its batches and all of them in one tensor; or that and what is written


def samples(request: Request) -> int:
    """That it sees: each sample of the run once, as far as it is known how many there are (`samples`)."""
    if not request.config.train.distill_weight:
        return 0
    used = request.steps * request.config.train.global_batch_size
    return used if request.samples is None else min(used, request.samples)


def disk_bytes(request: Request) -> int:
    """On the shared disk, if every token is supervised."""
    return samples(request) * _sample_bytes(request)


def passes(request: Request) -> int:
    """Batches of each rank: all go through as many as the one that has the most."""
    per_file = samples_per_file(_sample_bytes(request))
    files = -(-samples(request) // per_file)
    rounds = -(-files // request.cluster.world_size)
    return rounds * -(-min(per_file, samples(request)) // _at_once(request))


def sent(request: Request, evaluation: PassTraffic) -> int:
    """Bytes of each rank: what every batch gathers, which is what an evaluation does but for LoRA."""
    most = FetchLimits.from_ds_config(request.ds_config).persistence_threshold  # elements that are never gathered
    world_size, sizes = request.cluster.world_size, request.shape.lora_sizes(request.config.lora.r)
    lora = (world_size - 1) * sum(partition_numel(numel, world_size) for numel in sizes if numel > most)
    return passes(request) * (evaluation.sent - lora) * request.element_size


def seconds(request: Request, evaluation: PassTraffic) -> Seconds:
    """LoRA is off; the head runs only for its top logits."""
    cluster, shape, train = request.cluster, request.shape, request.config.train
    tokens = passes(request) * _at_once(request) * request.config.data.window
    head = 2 * shape.vocab_size * shape.hidden_size if train.distill_top_k is not None else 0
    per_token = 2 * shape.linear_numel() + 2 * attention_product(request, shape) + head
    copied = sent(request, evaluation) / max(1, cluster.world_size - 1)
    return Seconds(
        compute=per_token * tokens / (cluster.flops * 1e12),
        communication=cluster.seconds_to_gather(sent(request, evaluation)),
        host_copies=copied / (cluster.host_bandwidth * 1e9) if request.offloads("param") else 0,
    )


def stage(request: Request, evaluation: PassTraffic) -> Stage:
    """The engine has not stepped yet; a file's content is in host memory until it is written."""
    batch = Batch(_at_once(request), request.config.data.window, request.element_size)
    state, host = state_before_any_step(request)
    phase = forward_pass(request, request.shape, evaluation, batch) | {"targets": _targets(request, batch)}
    content = min(samples(request), samples_per_file(_sample_bytes(request))) * _sample_bytes(request)
    return Stage("uncut model's pass", state, {"pass": phase}, host | {"teacher_file": FILE_COPIES * content})


def _targets(request: Request, batch: Batch) -> int:
    """Of one batch: what is kept of each token, and for its top logits a chunk's in fp32, twice."""
    train, shape = request.config.train, request.shape
    if train.distill_top_k is None:
        return batch.tokens * shape.hidden_size * batch.element_size
    chunk = min(batch.tokens, chunk_size(shape.vocab_size, train.loss_chunk_tokens))
    return chunk * shape.vocab_size * 8 + batch.tokens * (12 * train.distill_top_k + 4)


def _at_once(request: Request) -> int:
    """Samples of a batch, which never spans two files."""
    return min(request.config.recorded_at_once, samples_per_file(_sample_bytes(request)))


def _sample_bytes(request: Request) -> int:
    size = token_bytes(request.config.train.distill_top_k, request.shape.hidden_size, request.element_size)
    return (request.config.data.window - 1) * size
