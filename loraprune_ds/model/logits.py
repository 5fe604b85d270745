"""Turns the product of a head into the logits of a causal LM, by a factor, a divisor or a soft cap.

Most families do nothing. The table of families names the config fields of the others.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from loraprune_ds.errors import UserError
from loraprune_ds.model.family import FAMILIES, family_name


@dataclass(frozen=True)
class LogitsTransform:
    """Describes what happens to the product. None stands for nothing.

    Attributes:
        scale: a factor.
        divisor: divides.
        softcap: c of c · tanh(logits / c), the last of the three.
    """

    scale: float | None = None
    divisor: float | None = None
    softcap: float | None = None

    def apply_(self, product: Tensor) -> Tensor:
        """Turns the head's product into logits, in place. It rounds exactly as transformers' own models do."""
        if self.divisor is not None:
            product.div_(self.divisor)
        if self.scale is not None:
            product.mul_(self.scale)
        if self.softcap is not None:
            product.div_(self.softcap).tanh_().mul_(self.softcap)
        return product

    def uncap_(self, gradient: Tensor, logits: Tensor) -> None:
        """Turns the gradient by logits into that by what the cap was put on, in place: times 1 - (logits / c)².

        Overwrites `logits`, so that no third tensor of this size is made.
        """
        if self.softcap is not None:
            gradient.addcmul_(gradient, logits.div_(self.softcap).square_(), value=-1)

    def unscale(self, gradient: Tensor) -> Tensor:
        """Turns the gradient by the scaled product into that by the product. Sums of it can be turned as well."""
        if self.divisor is not None:
            gradient = gradient / self.divisor
        return gradient if self.scale is None else gradient * self.scale


@dataclass(frozen=True, eq=False)
class Head:
    """Holds what makes logits of final hidden states. It is frozen.

    Attributes:
        weight: (vocabulary, hidden_size), whole.
    """

    weight: Tensor
    transform: LogitsTransform

    def logits(self, hidden: Tensor) -> Tensor:
        """Maps (tokens, hidden_size) to (tokens, vocabulary), as the stock model does and in its dtype."""
        return self.transform.apply_(hidden @ self.weight.t())


def logits_transform(config: Any) -> LogitsTransform:
    """Reads the transform of a model from its config, an object of transformers. That has every default."""
    family = FAMILIES[family_name(config.model_type)]

    def value(field: str | None, nothing: float | None) -> float | None:
        found = None if field is None else getattr(config, field)
        return None if found is None or found == nothing else float(found)

    return LogitsTransform(value(family.logit_scale, 1), value(family.logit_divisor, 1), value(family.softcap, None))


def output_head(model: PreTrainedModel) -> nn.Linear:
    """Returns the head of a causal LM.

    Raises:
        UserError: it has a bias, which no loss here adds.
    """
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    if head.bias is not None:
        raise UserError(f"{type(model).__name__}: lm_head has a bias; such a head is not supported")
    return head
