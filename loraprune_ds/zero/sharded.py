"""The ZeRO-3 model under pruning, and the optimizer state of its LoRA. Every rank cuts its shards in place."""

import copy
import gc
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.optim import Adam, AdamW

from loraprune_ds.engine.cutting import ParameterCut, cut_layers
from loraprune_ds.engine.optimizer_state import OptimizerState, is_number
from loraprune_ds.errors import fail_point
from loraprune_ds.files import JsonObject
from loraprune_ds.model.frozen import Blocks, storage_format
from loraprune_ds.model.groups import LayerKeep
from loraprune_ds.model.shape import LinearId, ModelShape
from loraprune_ds.pruning.prunable_model import ComputeWeight, OwnedShard, PrunableModel
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.device import foreach
from loraprune_ds.ranks.layout import Layout
from loraprune_ds.zero import private
from loraprune_ds.zero.cut import cut_layer
from loraprune_ds.zero.device import accelerator, empty_host_cache, settle_shards
from loraprune_ds.zero.gathering import forget_trace, gather_once
from loraprune_ds.zero.params import owned_blocks, owned_flat
from loraprune_ds.zero.private import LOSS_SCALE_FIELDS
from loraprune_ds.zero.releases import decide_releases
from loraprune_ds.zero.shards import NAME, FlatShards, full_shape


class ShardedModel(PrunableModel):
    """A PEFT LoRA model that ZeRO-3 has sharded. Any trainer may train it.

    Under CPU offload the shards and the optimizer state are on the host. Scoring and cutting copy them to the device
    and back.

    Args:
        zero_optimizer: DeepSpeed's `DeepSpeedZeroOptimizer_Stage3` of that model.
    """

    engine = NAME

    def __init__(self, module: nn.Module, zero_optimizer: Any, shape: ModelShape) -> None:
        super().__init__(module, shape, FlatShards(Communicator()))
        trained = [p for p in module.parameters() if p.requires_grad]
        self.zero_optimizer = zero_optimizer
        self.optimizer = zero_optimizer.optimizer
        self.skips_updates = zero_optimizer.dtype == torch.float16
        self.optimizer_state = ShardedState(zero_optimizer, trained, self.layout)
        self._coordinator = zero_optimizer.parameter_offload.get_param_coordinator()
        self._releases = decide_releases(self._coordinator)
        self._trained = True  # in the last forward pass

    # Scoring

    def owned_weight(self, linear_id: LinearId) -> OwnedShard:
        base = self._module(linear_id).base_layer
        stored_as = storage_format(base)
        if isinstance(stored_as, Blocks):
            return owned_blocks(base, stored_as, self.comm)
        flat, start = owned_flat(base.weight, self.world_size, self.rank)
        rows, columns = full_shape(base.weight)
        return OwnedShard(flat.to(self.device), start, (rows, columns))

    @property
    def loss_scale(self) -> float:
        return float(self.zero_optimizer.loss_scale)

    def scaler_state(self) -> JsonObject:
        scaler = vars(self.zero_optimizer.loss_scaler) if self.skips_updates else {}
        return {name: value for name, value in scaler.items() if name != "dtype"}

    def restore_scaler(self, saved: JsonObject) -> None:
        scaler = self.zero_optimizer.loss_scaler
        for name in filter(saved.__contains__, LOSS_SCALE_FIELDS if scaler.dynamic else ()):
            setattr(scaler, name, saved[name])

    # A cut

    @contextmanager
    def repeating_passes(self) -> Generator[None]:
        settle_shards()  # these passes do not begin with the root's, which waits for an update
        forget_trace(self.zero_optimizer)
        try:
            yield
        finally:
            forget_trace(self.zero_optimizer)
            self.zero_optimizer.empty_partition_cache()

    def gathered(self, *modules: nn.Module) -> AbstractContextManager[None]:
        return gather_once(self._coordinator, modules)

    def replace_weights(self, linear_ids: Sequence[LinearId], compute: ComputeWeight) -> None:
        self.zero_optimizer.empty_partition_cache()
        super().replace_weights(linear_ids, compute)
        # Waits for the device: the stream of the next gather would read the old weights. A cut may not follow.
        settle_shards()

    def cut(self, keep: list[LayerKeep]) -> int:
        """Cuts one decoder layer at a time, then rebuilds the optimizer's flat buffers."""
        before = self.comm.bytes_sent
        self.zero_optimizer.empty_partition_cache()
        # torch may hold memory that NCCL needs
        gc.collect()
        accelerator().empty_cache()

        def cut(cuts: Iterable[ParameterCut]) -> None:
            cut_layer(cuts, self.comm, self.optimizer_state)
            empty_host_cache()  # no later shard has an old size, so pinned blocks would accumulate

        cut_layers(self.layers, self.shape, keep, cut)
        self.shape = self.shape.after(keep)
        self.optimizer_state.rebuild()
        fail_point("cut.rebuilt")
        self._refresh_zero()
        empty_host_cache()
        settle_shards()  # orders the smaller shards and flat buffers before the next gather
        return sum(self.comm.gather_objects(self.comm.bytes_sent - before))

    # Training

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """Returns the (padded) shard between the last backward and the update."""
        # DeepSpeed's public call waits for the device at each parameter, although the end of a backward has waited.
        shards = self.zero_optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        return shards[cast(Any, parameter).ds_id].float()

    def gradient_norm(self) -> Tensor:
        gradients = self.zero_optimizer.grad_partitions_flat_buffer
        (norm,) = self.unscaled([vector_norm(gradients, dtype=torch.float64).to(self.device)])
        return norm

    def before_each_update(
        self, action: Callable[[], None], *, reads_gradients: bool = True
    ) -> Callable[[], None]:
        step = self.zero_optimizer.step

        def act_and_step(*args: Any, **kwargs: Any) -> Any:
            action()
            result = step(*args, **kwargs)
            # Orders the updated shards of LoRA before the trainer's next forward pass gathers them.
            settle_shards()
            return result

        def undo() -> None:
            self.zero_optimizer.step = step
            hook.remove()

        self.zero_optimizer.step = act_and_step
        # `prepend` makes it run before DeepSpeed's hook, which follows the order of modules.
        hook = self.module.register_forward_pre_hook(self._note_mode, prepend=True)
        return undo

    def _note_mode(self, module: nn.Module, args: Any) -> None:
        """Forgets the order of modules between training and evaluation (`ShardedEngine.infer`)."""
        if module.training != self._trained:
            forget_trace(self.zero_optimizer)
            self._trained = module.training

    def _refresh_zero(self) -> None:
        """Updates the rest of DeepSpeed's state that depends on sizes. The record of the module order stays valid."""
        offload = self.zero_optimizer.parameter_offload
        # Smaller weights may replace others among the persistent ones.
        for parameter in self.module.parameters():
            cast(Any, parameter).ds_persist = False
        thresholds = offload.param_numel_persistence_threshold, offload.model_persistence_threshold
        persistent = offload.mark_persistent_parameters(*thresholds)
        offload.persistent_parameters = persistent
        self.zero_optimizer.persistent_parameters = persistent
        self._releases.sizes_changed()


class ShardedState(OptimizerState):
    """Carries the flat buffers of DeepSpeed's stage-3 optimizer through a cut: fp32 masters and the optimizer's states.

    Smaller shards are written into the old slots, so there is no second copy. `rebuild` then lays out smaller buffers.
    """

    def __init__(self, zero_optimizer: Any, parameters: list[nn.Parameter], layout: Layout) -> None:
        super().__init__(zero_optimizer.optimizer, layout)
        self.zero = zero_optimizer
        self.parameters = parameters

    def master(self, parameter: nn.Parameter) -> Tensor:
        group, _ = self._slot(parameter)
        return self.zero.fp32_partitioned_groups_flat[group]

    def part(self, parameter: nn.Parameter, state: Tensor) -> Tensor:
        _, offset = self._slot(parameter)
        numel: int = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        return state.narrow(0, offset, numel)

    def number(self, saved: Tensor) -> Any:
        is_torch = isinstance(self.optimizer, (Adam, AdamW))
        return saved.clone() if is_torch else int(saved)  # DeepSpeed's kernels take no tensor

    def settings(self) -> list[JsonObject]:
        owners = list(self.zero.sub_group_to_group_id.values())
        described = super().settings()
        for i, group in enumerate(described):
            group["params"] = [0] * owners.count(i)
        return described

    @torch.no_grad()
    def rebuild(self) -> None:
        """Lays out flat buffers for the current shapes, and fills them with the carried state. Collective."""
        old = [(p, key, self.shard(p, key)) for p in self.parameters for key in self.keys(p)]
        states = self.states(self.parameters[0]).items()
        numbers = {key: state for key, state in states if is_number(state)}
        self._lay_out()
        for master in self.zero.fp32_partitioned_groups_flat:
            self.optimizer.state[master] |= copy.deepcopy(numbers)
        new = [self.shard(parameter, key) for parameter, key, _ in old]
        foreach._foreach_copy_(new, [shard for *_, shard in old])

    def _lay_out(self) -> None:
        """Makes DeepSpeed build its flat buffers again, as at its start. Adam's state is empty afterwards."""
        zero = self.zero
        for bucket in zero.ipg_buckets.values():
            # The new buffer has the same size, and two could outweigh the rest of a cut.
            bucket.buffer = None
        for name in private.FLAT_LISTS:
            getattr(zero, name).clear()
        zero.sub_group_to_group_id = {}
        zero.optimizer.state.clear()
        with private.defragmenting_on_device():
            zero._create_fp16_partitions_with_defragmentation(zero.trainable_param_groups)
        zero._setup_for_real_optimizer()
        zero.grad_position = {}
        zero.set_grad_positions()
        zero.averaged_gradients = {}
        zero.zero_grad(set_to_none=True)

    def restore(self, *given: Any) -> None:
        super().restore(*given)
        for parameter in self.parameters:  # in the model's dtype
            self.layout.write(parameter, self.shard(parameter, "master"))
        settle_shards()  # orders the restored shards before the first gather

    def _slot(self, parameter: nn.Parameter) -> tuple[int, int]:
        group, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        return group, offset
