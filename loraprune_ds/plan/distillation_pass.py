"""The dense model's one pass over the samples, before the first step (`train.distill_weight`).

README.md in this folder has the formulas. train/teacher_pass.py is the pass. Each rank makes one file at a time.
"""

from loraprune_ds.model.distillation import chunk_size, samples_per_file, token_bytes
from loraprune_ds.plan.costs import StepCost, attention_product, network_cost
from loraprune_ds.plan.fetching import PassTraffic
from loraprune_ds.plan.held import split_state
from loraprune_ds.plan.request import Request
from loraprune_ds.plan.stages import Stage, forward_pass
from loraprune_ds.plan.traffic import IN_GROUP

FILE_COPIES = 2  # batches and one tensor of them; or that tensor and the file's bytes


class DistillationPass:
    """Plans the pass.

    Args:
        evaluation: an evaluation of the dense model. The pass gathers the same but for LoRA.

    Attributes:
        samples: each of the run once. If their number is not known, as many as the steps use.
        disk_bytes: of all files, if every token is supervised.
        batches: of each rank. The rank with the most decides.
    """

    def __init__(self, request: Request, evaluation: PassTraffic) -> None:
        self.request = request
        self.evaluation = evaluation
        config, top_k = request.config, request.config.train.distill_top_k
        used = request.steps * config.train.global_batch_size if config.train.distill_weight else 0
        self.samples = used if request.samples is None else min(used, request.samples)
        per_token = token_bytes(top_k, request.shape.hidden_size, request.element_size)
        sample_bytes = (config.data.window - 1) * per_token
        self.disk_bytes = self.samples * sample_bytes
        per_file = samples_per_file(sample_bytes)
        in_a_file = min(self.samples, per_file)
        self.file_bytes = in_a_file * sample_bytes
        at_once = min(config.recorded_at_once, per_file)  # a batch never spans two files
        self.batch = request.batch(at_once, config.data.window)
        rounds = -(-self.samples // (per_file * request.world_size))
        self.batches = rounds * -(-in_a_file // at_once)

    def cost(self) -> StepCost:
        """Returns the cost of all batches of a rank. LoRA is off. Only top logits need the head."""
        request, shape, cluster = self.request, self.request.shape, self.request.cluster
        most = request.fetch_limits.persistence_threshold  # elements that are never gathered
        lora = request.shards(n for n in shape.lora_sizes(request.config.lora.r) if n > most)
        group, size = request.fetch_limits.copy_ranks, request.element_size
        if group > 1:
            again = (group - 1) * request.world_size // group * lora * size
            name, weights = IN_GROUP, self.evaluation.sent_in_group - again
        else:
            name, weights = "weights", self.evaluation.sent - (request.world_size - 1) * lora * size
        sent = {"weights": 0} | {name: self.batches * weights}
        head = 0 if request.config.train.distill_top_k is None else 2 * shape.vocab_size * shape.hidden_size
        per_token = 2 * shape.linear_numel() + 2 * attention_product(request, shape) + head
        return StepCost(
            sent,
            compute=per_token * (self.batches * self.batch.tokens) / (cluster.flops * 1e12),
            host=self.batches * self.evaluation.called * cluster.host_microseconds / 1e6,
            **network_cost(request, sent),
        )

    def stage(self) -> Stage:
        """Builds the stage. No step was made yet. A file's content is in host memory until it is written."""
        request = self.request
        state, host = split_state(request, request.shape, stepped=False)
        phase = forward_pass(request, request.shape, self.evaluation, self.batch) | {"targets": self._targets()}
        host |= {"teacher_file": FILE_COPIES * self.file_bytes}
        return Stage("dense model's pass", state, {"pass": phase}, host)

    def _targets(self) -> int:
        """Returns the bytes of a batch's outputs. Top logits need a chunk's logits in fp32, twice."""
        train, shape = self.request.config.train, self.request.shape
        if train.distill_top_k is None:
            return self.batch.tokens * shape.hidden_size * self.request.element_size
        chunk = min(self.batch.tokens, chunk_size(shape.vocab_size, train.loss_chunk_tokens))
        return chunk * shape.vocab_size * 8 + self.batch.tokens * (12 * train.distill_top_k + 4)
