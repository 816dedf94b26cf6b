"""The slope of a layer's output error by its weights, for one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# A parameter by full name, and the expert whose matrix of it was used by itself; None: all of it.
Place = tuple[str, int | None]


def slopes_of(forward: Callable[[], Tensor], target: Tensor, parameters: Mapping[str, Tensor]) -> dict[Place, Tensor]:
    """Gradients of the squared error of what ``forward`` returns, summed; parameters that were not used have none.

    ``parameters`` want gradients (``requires_grad``). A forward that takes one expert's matrix after another out of a stack has a
    gradient for each that it took: torch would make one of the whole stack for every one of them.
    """
    stacked = {id(value): name for name, value in parameters.items() if value.ndim == 3}
    with torch.enable_grad():
        with _OneByOne(stacked) as experts:
            made = forward()
        error = (made.float() - target.float()).square().sum()
    places: list[Place] = [(name, None) for name in parameters]
    places += experts.taken
    found = torch.autograd.grad(error, [*parameters.values(), *experts.taken.values()], allow_unused=True)
    # A gradient may lie in memory as another's transpose; lines are cut out of what lies as its parameter does.
    return {place: slope.contiguous() for place, slope in zip(places, found, strict=True) if slope is not None}


class _OneByOne(TorchFunctionMode):
    """Hands out the matrix of an expert as a tensor of its own, over the same elements; of one thread."""

    def __init__(self, stacked: Mapping[int, str]) -> None:
        super().__init__()
        self._stacked = stacked
        self.taken: dict[Place, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is Tensor.__getitem__ and id(args[0]) in self._stacked:
            index = args[1]
            is_number = isinstance(index, Tensor) and index.ndim == 0 and not index.dtype.is_floating_point
            if is_number or (isinstance(index, int) and not isinstance(index, bool)):
                place = (self._stacked[id(args[0])], int(index) % len(args[0]))
                if place not in self.taken:
                    self.taken[place] = args[0].detach()[place[1]].requires_grad_()
                return self.taken[place]
        return func(*args, **(kwargs or {}))
