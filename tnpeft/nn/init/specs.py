"""Initial values as rules or tensors, from what a factorization names."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnpeft.networks import NetworkError
from tnpeft.scaling.starts import Spec


def start(value: Any, label: str) -> Spec | Tensor:
    """Return a start from a text, a nested list, or a numpy or torch array.

    Raises:
        NetworkError: the text names an unknown start, or the array holds numbers that are not finite.

    >>> start("kaiming", "A"), start([1, 2], "w")
    (Spec(name='kaiming', numbers=()), tensor([1., 2.]))
    """
    if label.startswith("~"):
        raise NetworkError(
            f"{label} repeats the start of {label[1:]}", remedy=f"name a start of {label[1:]!r} instead"
        )
    if isinstance(value, str):
        return Spec.parse(value, label)
    try:
        array = value.detach().cpu() if isinstance(value, Tensor) else np.asarray(value)
        tensor = torch.as_tensor(array).to(torch.float32, copy=True)
    except (TypeError, ValueError) as error:
        raise NetworkError(f"factor {label!r} cannot start so: {error}", remedy="pass a rectangular array") from None
    if not torch.isfinite(tensor).all():
        raise NetworkError(f"the start of factor {label!r} is not finite", remedy="pass an array of finite numbers")
    return tensor
