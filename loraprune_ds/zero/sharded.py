"""The model under pruning as ZeRO-3 holds it: flat pieces on every rank, shrunk in place on the live engine."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_grad
from torch import Tensor, nn

from loraprune_ds.faults import fail_point
from loraprune_ds.model.adapters import ADAPTER, lora_linear, lora_weights, set_features
from loraprune_ds.model.build import decoder_layers
from loraprune_ds.model.shapes import KINDS, LINEARS, Linear, ModelShape
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.device import accelerator, empty_host_cache
from loraprune_ds.zero.flat import AxisCut, layer_owner
from loraprune_ds.zero.loss_scale import first_nonfinite, optimizer_step, unscale
from loraprune_ds.zero.optimizer import OptimizerState
from loraprune_ds.zero.params import full_shape, install_piece, owned_flat
from loraprune_ds.zero.release import release
from loraprune_ds.zero.reshard import Item, reshard
from loraprune_ds.zero.rewrite import rewrite
from loraprune_ds.zero.store import LayerKeep, LoraFactors, OwnedPiece, Rewrite, Site


class ShardedStore:
    """A `WeightStore` over a DeepSpeed ZeRO-3 engine whose module is a PEFT LoRA model.

    Under CPU offload pieces and optimizer state lie on the host: they come to the device to be scored or sent, and go
    back where they were.
    """

    def __init__(self, engine: Any, shape: ModelShape) -> None:
        self.engine = engine
        self.shape = shape
        self.comm = Communicator()
        self.world_size, self.rank = self.comm.world_size, self.comm.rank
        self.device = torch.device(engine.device)
        self.module: nn.Module = engine.module
        self.layers = decoder_layers(engine.module)

    def lora_factors(self, layer: int) -> dict[str, LoraFactors]:
        """The averaged LoRA gradients of a layer, whole, on every rank, from one all-gather.

        ZeRO-3 has reduce-scattered them at the accumulation boundary; the masters and gradients of the layer's
        A and B travel together. fp16 gradients are divided by the loss scale.
        """
        modules = [lora_linear(self.layers[layer], linear) for linear in LINEARS]
        parameters = [weight for module in modules for weight in lora_weights(module)]
        with torch.no_grad():
            masters = [_local(safe_get_local_fp32_param(p)) for p in parameters]
            gradients = [unscale(_local(safe_get_local_grad(p)), self.loss_scale) for p in parameters]
            whole = self._gather(masters + gradients, parameters + parameters)
        count, factors = len(parameters), {}
        for i, (linear, module) in enumerate(zip(LINEARS, modules, strict=True)):
            a, b = 2 * i, 2 * i + 1
            scaling = module.scaling[ADAPTER]
            factors[linear.name] = LoraFactors(whole[a], whole[b], whole[count + a], whole[count + b], scaling)
        return factors

    def owned_weight(self, layer: int, linear: Linear) -> OwnedPiece:
        weight = cast(nn.Linear, lora_linear(self.layers[layer], linear).base_layer).weight
        flat, start = owned_flat(weight)
        return OwnedPiece(flat.to(self.device), start, cast(tuple[int, int], full_shape(weight)))

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.comm.all_reduce(values)

    def gather_values(self, value: int) -> list[int]:
        return self.comm.all_gather(torch.tensor([value], dtype=torch.int64, device=self.device)).flatten().tolist()

    def broadcast(self, values: Tensor) -> Tensor:
        return self.comm.broadcast(values.to(self.device)).cpu()

    def owner(self, layer: int) -> int:
        return layer_owner(layer, self.world_size)

    def reduce_to(self, owner: int, values: Tensor) -> Tensor | None:
        return self.comm.reduce_to(owner, values)

    def reduce_scatter(self, values: Tensor) -> Tensor:
        return self.comm.reduce_scatter(values)

    def rewrite(self, sites: Sequence[Site], what: Literal["weight", "bias"], compute: Rewrite) -> None:
        rewrite(self, sites, what, compute)

    def shrink(self, keep: list[LayerKeep]) -> int:
        """One decoder layer at a time, then the optimizer's flat buffers anew. No loss graph may be alive."""
        before = self.comm.bytes_sent
        if tuple(layer_keep.shape for layer_keep in keep) == self.shape.layers:
            return 0  # a late cut of a long schedule may ask for less than a group
        self.engine.empty_partition_cache()
        state = self.optimizer_state()
        for i, layer_keep in enumerate(keep):
            self._shrink_layer(i, layer_keep, state)
            empty_host_cache()  # else offloaded weights grow with a cut: pieces of the old sizes do not come again
            fail_point("cut.layer")
        self.shape = self.shape.with_layers(tuple(layer_keep.shape for layer_keep in keep))
        state.rebuild()
        fail_point("cut.rebuilt")
        self._refresh_engine()
        empty_host_cache()
        accelerator().synchronize()  # a GPU is still at work: the seconds of a cut are its own
        return self.comm.bytes_sent - before

    def optimizer_state(self) -> OptimizerState:
        """This rank's masters and moments of all LoRA factors."""
        return OptimizerState(self.engine.optimizer, [p for p in self.module.parameters() if p.requires_grad])

    def nonfinite_layer(self) -> int | None:
        """The first layer whose averaged LoRA gradient has an inf or NaN in this rank's pieces."""
        flat = self.engine.optimizer.grad_partitions_flat_buffer
        if torch.isfinite(flat.sum()):  # one pass when all is well, which is always
            return None
        weights = [[w for linear in LINEARS for w in lora_weights(lora_linear(layer, linear))] for layer in self.layers]
        return first_nonfinite([torch.cat([_local(safe_get_local_grad(w)) for w in layer]) for layer in weights])

    def nonfinite_weights(self) -> int | None:
        """The first layer with an inf or NaN in this rank's pieces of its weights, frozen or LoRA."""
        pieces = (((i, cast(Any, p).ds_tensor) for p in layer.parameters()) for i, layer in enumerate(self.layers))
        return next((i for layer in pieces for i, piece in layer if not torch.isfinite(piece).all()), None)

    @property
    def loss_scale(self) -> float:
        """What the gradients are multiplied by: 1 unless fp16."""
        return float(self.engine.optimizer.loss_scale)

    def _gather(self, pieces: list[Tensor], parameters: list[nn.Parameter]) -> list[Tensor]:
        """fp32 pieces of several parameters -> whole tensors, coalesced into one all-gather."""
        gathered = self.comm.all_gather(torch.cat(pieces).to(self.device))  # (W, sum of pieces)
        whole, position = [], 0
        for piece, parameter in zip(pieces, parameters, strict=True):
            flat = gathered[:, position : position + len(piece)].reshape(-1)
            shape = full_shape(parameter)
            whole.append(flat[: shape[0] * shape[1]].view(shape))
            position += len(piece)
        return whole

    def _shrink_layer(self, index: int, keep: LayerKeep, state: OptimizerState) -> None:
        if not any(keep.cuts(self.shape.layers[index], kind) for kind in KINDS):
            return
        cuts: list[tuple[nn.Parameter, AxisCut]] = []
        for linear in LINEARS:
            if not keep.cuts(self.shape.layers[index], linear.kind):
                continue
            module = lora_linear(self.layers[index], linear)
            base, kept = cast(nn.Linear, module.base_layer), keep.indices(self.shape, linear)
            lora_a, lora_b = lora_weights(module)
            shrinking = [base.weight, lora_b if linear.axis == 0 else lora_a]
            if base.bias is not None and linear.axis == 0:  # a bias along the kept outputs of o_proj, down_proj stays
                shrinking.append(base.bias)
            cuts += [(p, AxisCut(full_shape(p), linear.axis, kept)) for p in shrinking]
            out_features, in_features = AxisCut(full_shape(base.weight), linear.axis, kept).new_shape
            set_features(module, out_features, in_features)
        cast(Any, self.layers[index]).mlp.intermediate_size = len(keep.channels)
        carried = [(p, cut, key) for p, cut in cuts if p.requires_grad for key in state.keys()]
        state_pieces = reshard([Item(state.piece(p, key).to(self.device), cut) for p, cut, key in carried], self.comm)
        pieces = reshard([Item(cast(Any, p).ds_tensor.detach().to(self.device), cut) for p, cut in cuts], self.comm)
        for (parameter, cut), piece in zip(cuts, pieces, strict=True):
            install_piece(parameter, piece, cut.new_shape)
        for (parameter, _, key), piece in zip(carried, state_pieces, strict=True):
            state.piece(parameter, key).copy_(piece)

    def _refresh_engine(self) -> None:
        """Everything else that DeepSpeed derived from the old sizes: which parameters persist, and the fetch trace."""
        offload = self.engine.optimizer.parameter_offload
        for parameter in self.engine.module.parameters():
            parameter.ds_persist = False
        persistent = offload.mark_persistent_parameters(
            offload.param_numel_persistence_threshold, offload.model_persistence_threshold
        )
        offload.persistent_parameters = self.engine.optimizer.persistent_parameters = persistent
        self.forget_trace()

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return float(self.engine.get_lr()[0])

    def forward(self, **inputs: Any) -> Any:
        """What the model returns in training. Collective, as what follows."""
        return self.engine(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a micro-batch, averaged over the ranks. `loss` is its share of the step's loss."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def end_micro_batch(self) -> None:
        """Behind every micro-batch of a step but the last."""
        self.engine.step()  # not a boundary: only counts

    def update(self, *, skipped: bool) -> float | None:
        """The optimizer's update at the end of a step; `skipped` where fp16's gradients overflowed.

        Returns:
            The norm of the gradients before clipping; None where the update was skipped or DeepSpeed has none.
        """
        optimizer_step(self.engine, skipped=skipped)
        norm = None if skipped else self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def infer(self, **inputs: Any) -> Any:
        """One forward pass in evaluation mode, which leaves no trace in what training gathers. Collective.

        What DeepSpeed decides to free where, as it follows a record, it keeps in a cache that outlives the record.
        With the decisions of an evaluation every later step would free the weights between forward and backward, and
        gather them twice. Nothing is decided in a pass that is being recorded.
        """
        self.forget_trace()
        self.engine.eval()
        with torch.no_grad():
            outputs = self.engine(**inputs)
        self.engine.train()
        self.forget_trace()
        return outputs

    def release(self) -> None:
        """Frees the model and its optimizer, whoever still refers to them; the store is of no use afterwards."""
        release(self.engine)

    def forget_trace(self) -> None:
        """The order in which modules run, by which ZeRO-3 prefetches, is about to change: it is recorded again."""
        coordinator = self.engine.optimizer.parameter_offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()


def _local(piece: Tensor | None) -> Tensor:
    assert piece is not None, "LoRA state is read between the boundary backward and the optimizer's step"
    return piece.detach().float().reshape(-1)
