"""Refuses compiled models, by torch or by accelerate."""

from typing import Any

import torch
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DynamoBackend
from torch import nn

from loraprune_ds.errors import UserError, require

COMPILED = "compiled code keeps the sizes from before a cut"


def check_accelerate() -> None:
    """Raises UserError if accelerate compiles every model that it prepares, by its settings or environment."""
    plugin = AcceleratorState().dynamo_plugin if is_initialized() else None
    backend = DynamoBackend.NO if plugin is None else plugin.backend
    require(
        backend == DynamoBackend.NO,
        f"accelerate compiles the model by its dynamo backend {backend.value}, and {COMPILED}; "
        "leave it out of ACCELERATE_DYNAMO_BACKEND, accelerate's config and Accelerator",
    )


def check_not_compiled(model: nn.Module) -> None:
    """Raises UserError if torch.compile has compiled a module in place, or wraps it."""
    for name, module in model.named_modules():
        require(
            not _is_compiled(module),
            f"{name or type(module).__name__} is compiled by torch.compile, and {COMPILED}; "
            "train without torch.compile",
        )


def _is_compiled(module: nn.Module) -> bool:
    optimized: Any = torch._dynamo.OptimizedModule
    return isinstance(module, optimized) or module._compiled_call_impl is not None


@torch.compiler.disable  # torch takes an error in compiled code for code that it cannot compile
def refuse_compiled() -> None:
    raise UserError(
        f"the forward pass is compiled by torch.compile, and {COMPILED}; train without torch.compile"
    )
