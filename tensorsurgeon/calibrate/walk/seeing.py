"""What the linears of a layer, and its stacks of experts, are called with while a batch goes through it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from tensorsurgeon.calibrate.walk.stacks import ExpertStack


class Seen(NamedTuple):
    """An input, and by what it is known again within a batch."""

    tensor: Tensor
    identity: tuple[Any, ...]


class Sighting(NamedTuple):
    """Of one batch: the layer's result; by linear (or first projection of a stack) what it was called with; by stack its inputs
    and choices. ``before`` and ``fed`` are the same behind original layers, empty where these were not run."""

    result: Tensor
    seen: dict[str, list[Seen]]
    chosen: dict[str, tuple[Tensor, Tensor]]
    before: dict[str, list[Seen]]
    fed: dict[str, tuple[Tensor, Tensor]]


class Hooks:
    """Notes calls, thread by thread; ``linears`` are the modules wanted, by full name."""

    def __init__(self, linears: Mapping[str, nn.Module], stacks: Sequence[ExpertStack]) -> None:
        self._linears = dict(sorted(linears.items()))
        self.stacks = {stack.name: stack for stack in stacks}
        self._local = threading.local()

    @property
    def names(self) -> list[str]:
        """Under which inputs are noted, in a fixed order."""
        return [*self._linears, *(stack.first_name for stack in self.stacks.values())]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks in place for the length of the block."""
        handles = [module.register_forward_pre_hook(self._note(name)) for name, module in self._linears.items()]
        handles += [
            stack.module.register_forward_pre_hook(self._note_experts(stack), with_kwargs=True) for stack in self.stacks.values()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._local.seen.setdefault(name, []).append(_of(args[0]))

        return hook

    def _note_experts(self, stack: ExpertStack) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, chosen = stack.called_with(args, kwargs)
            self._local.seen.setdefault(stack.first_name, []).append(_of(hidden))
            self._local.chosen[stack.name] = (hidden, chosen)

        return hook

    def see(self, forward: Callable[[], Tensor], original: Callable[[], None] | None = None) -> Sighting:
        """Run a batch's forward; ``original`` runs the same tokens' forward behind original layers, and goes first."""
        self._local.seen, self._local.chosen = {}, {}
        if original is not None:
            original()
        before, fed = self._local.seen, self._local.chosen
        self._local.seen, self._local.chosen = {}, {}
        result = forward()
        found = Sighting(result, self._local.seen, self._local.chosen, before, fed)
        self._local.seen, self._local.chosen = {}, {}
        return found


def _of(tensor: Tensor) -> Seen:
    tensor = tensor.detach()
    return Seen(tensor, (tensor.data_ptr(), tensor.numel(), tensor.shape[-1], tensor.dtype, tensor._version))
