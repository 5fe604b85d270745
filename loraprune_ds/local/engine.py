"""Trains and measures a model that one process holds whole, without DeepSpeed."""

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from loraprune_ds.config_types import Dtype
from loraprune_ds.engine.training import AddLora, Engine, InferenceEngine, TrainingEngine
from loraprune_ds.errors import require
from loraprune_ds.files import JsonObject
from loraprune_ds.local.model import LocalModel
from loraprune_ds.model.frozen import DTYPES
from loraprune_ds.pretrained.build import build_for_losses, replace_parameters
from loraprune_ds.pretrained.pretrained import PretrainedModel
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.device import current_device, empty_cache
from loraprune_ds.ranks.job import several_ranks


class LocalEngine(TrainingEngine):
    """Trains a PEFT model with fp32 LoRA by torch's AdamW."""

    def __init__(
        self, module: Any, optimizer: AdamW, lr_scheduler: LambdaLR, max_norm: float
    ) -> None:
        free = partial(release, module, optimizer)
        super().__init__(module.train(), free, optimizer, lr_scheduler)
        self._max_norm = max_norm

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def update(self, *, skipped: bool) -> None:
        (group,) = self.optimizer.param_groups
        trained = group["params"]
        for parameter in trained:
            if parameter.grad is None:  # its moments decay, as under ZeRO-3
                parameter.grad = torch.zeros_like(parameter)
        if self._max_norm:
            clip_grad_norm_(trained, self._max_norm)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()


class Local(Engine):
    """Runs in one process."""

    name = LocalModel.engine

    def check_device(self, dtype: Dtype) -> None:
        """Raises UserError if the GPU would only emulate bf16, slower than fp32."""
        if dtype == "bfloat16" and current_device().type == "cuda":
            supported = torch.cuda.is_bf16_supported(False)
            require(supported, f"model.dtype {dtype} is not supported by the cuda device")

    def start_ranks(self) -> Communicator:
        """Returns the one rank. Raises UserError if a launcher has started more."""
        ranks = os.environ.get("WORLD_SIZE")
        require(
            not several_ranks(os.environ),
            f"deepspeed: null trains in one process, but a launcher has started {ranks} ranks",
        )
        return Communicator()

    def build_training_engine(
        self,
        pretrained: PretrainedModel,
        attn_implementation: str,
        dtype: Dtype,
        ds_config: JsonObject,
        add_lora: AddLora,
        max_norm: float,
    ) -> LocalEngine:
        """Builds the model with fp32 LoRA, ready to train. Its products are in `dtype`, as under ZeRO-3."""
        base = _build_frozen(pretrained, attn_implementation, dtype)
        peft_model, optimizer, lr_scheduler = add_lora(base)
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.data = parameter.data.float()
        return LocalEngine(peft_model, optimizer, lr_scheduler, max_norm)

    def build_inference_engine(
        self,
        pretrained: PretrainedModel,
        attn_implementation: str,
        dtype: Dtype,
        ds_config: JsonObject,
        *,
        head: bool = True,
    ) -> InferenceEngine:
        model = _build_frozen(pretrained, attn_implementation, dtype, head=head)
        return InferenceEngine(model, partial(release, model))


def _build_frozen(
    pretrained: PretrainedModel, attn_implementation: str, dtype: Dtype, *, head: bool = True
) -> nn.Module:
    """Builds the frozen model in evaluation mode."""
    model = build_for_losses(pretrained, attn_implementation, head=head)
    device = current_device()

    def read(name: str, like: Tensor) -> nn.Parameter:
        flat = pretrained.weights.read_stored(name, 0, like.numel(), DTYPES[dtype])
        return nn.Parameter(flat.view(like.shape).to(device), requires_grad=False)

    replace_parameters(model, read, device)
    return model.eval()


def release(model: nn.Module, optimizer: AdamW | None = None) -> None:
    """Frees weights and optimizer state, even if they are still referenced. The model is unusable then."""
    if optimizer is not None:
        optimizer.state.clear()
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)
        parameter.grad = None
    empty_cache()
