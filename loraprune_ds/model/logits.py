"""Turns the product of a head into the logits of a causal LM, with the factor, divisor or soft cap of some families."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from loraprune_ds.errors import UserError
from loraprune_ds.model.family import FAMILIES, family_name


@dataclass(frozen=True)
class LogitsTransform:
    scale: float | None = None
    divisor: float | None = None
    softcap: float | None = None  # c of c · tanh(logits / c), applied last

    def apply_(self, product: Tensor) -> Tensor:
        """Turns the head's product into logits, in place and with the same rounding as transformers' models."""
        if self.divisor is not None:
            product.div_(self.divisor)
        if self.scale is not None:
            product.mul_(self.scale)
        if self.softcap is not None:
            product.div_(self.softcap).tanh_().mul_(self.softcap)
        return product

    def uncap_(self, gradient: Tensor, logits: Tensor) -> None:
        """Multiplies a gradient by the cap's slope 1 - (logits / c)², in place. Overwrites `logits` to save memory."""
        if self.softcap is not None:
            gradient.addcmul_(gradient, logits.div_(self.softcap).square_(), value=-1)

    def unscale(self, gradient: Tensor) -> Tensor:
        """Multiplies a gradient (or a sum of gradients) by the slope of factor and divisor."""
        if self.divisor is not None:
            gradient = gradient / self.divisor
        return gradient if self.scale is None else gradient * self.scale


@dataclass(frozen=True, eq=False)
class Head:
    """Computes logits from final hidden states. It is frozen."""

    weight: Tensor  # (vocabulary, hidden_size), gathered
    transform: LogitsTransform

    def logits(self, hidden: Tensor) -> Tensor:
        """Maps (tokens, hidden_size) to (tokens, vocabulary), as the stock model does and in its dtype."""
        return self.transform.apply_(hidden @ self.weight.t())


def logits_transform(config: Any) -> LogitsTransform:
    """Reads the transform from a config object of transformers, which has all defaults."""
    family = FAMILIES[family_name(config.model_type)]

    def value(field: str | None, nothing: float | None) -> float | None:
        setting = None if field is None else getattr(config, field)
        return None if setting is None or setting == nothing else float(setting)

    return LogitsTransform(value(family.logit_scale, 1), value(family.logit_divisor, 1), value(family.softcap, None))


def output_head(model: PreTrainedModel) -> nn.Linear:
    """Returns the head of a causal LM. Refuses a bias, which the losses would not add."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    if head.bias is not None:
        raise UserError(f"{type(model).__name__}: lm_head has a bias; such a head is not supported")
    return head
