"""Modules of stacked experts, however they are stacked, and what goes into their projections.

transformers computes experts in one module whose parameters hold all of them: ``[E, out, in]`` as a rule, transposed in
gpt-oss and Llama 4, below each other in DBRX. What an expert does between its projections is the module's own business:
where the usual interface does not say it, the module is run on that expert and stopped at its second product.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from inspect import signature
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tensorsurgeon.calibrate.walk.instead import ROUND_INSTEAD
from tensorsurgeon.calibrate.walk.recording import own_forward
from tensorsurgeon.errors import PlanError

logger = logging.getLogger(__name__)

_FIRST: Final[tuple[tuple[str, ...], ...]] = (("gate_up_proj",), ("gate_proj", "up_proj"), ("up_proj",))
# DBRX: gate, up and down below each other, rows of hidden size.
_FLAT: Final = ("w1", "v1", "w2")
_PRODUCTS: Final = {"linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "_grouped_mm", "grouped_mm"}


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """A module of ``experts`` stacked experts that is called with hidden states and chosen experts.

    ``firsts`` and ``down`` are parameters, by names below the module; ``turned`` where experts are stored [in, out], which the
    down projection is in ``flat`` ones too, below each other. ``copies``: how often each token is handed to the module, 0
    where it is handed over once with its choice. ``hidden`` and ``inner`` are the features that go into the projections.
    """

    name: str
    module: nn.Module
    firsts: tuple[str, ...]
    down: str
    experts: int
    hidden: int
    inner: int
    router: str | None
    turned: bool = False
    flat: bool = False
    copies: int = 0

    @property
    def first_name(self) -> str:
        """The input of the first projections: the full name of the first of their parameters."""
        return f"{self.name}.{self.firsts[0]}"

    @property
    def down_name(self) -> str:
        """The parameter of the down projection, by full name."""
        return f"{self.name}.{self.down}"

    @property
    def why_cold(self) -> str:
        """Why experts that the router sends little to are not topped up, where no router is known."""
        return "hands experts only what the router scaled for them" if self.copies else "its router was not found"

    @property
    def parameters(self) -> dict[str, tuple[int, int]]:
        """By full name: outputs of one expert, and the rows of a matrix whose columns those are (0: they are rows)."""
        found = {}
        for leaf in (*self.firsts, self.down):
            is_turned = self.turned or (self.flat and leaf == self.down)
            shape = self.module.get_parameter(leaf).shape
            rows = shape[0] // self.experts if self.flat else shape[-2]
            found[f"{self.name}.{leaf}"] = (shape[-1], rows) if is_turned else (rows, 0)
        return found

    def called_with(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Inputs [t, hidden] and chosen experts [t, k] of a call, -1 for none; PlanError if it is called with other things."""
        given = [*args, *kwargs.values()]
        if self.copies:
            return _gathered(given[0].view(self.experts, -1, self.hidden), self.copies)
        if len(given) < 2 or given[1].ndim != 2 or given[1].is_floating_point():
            raise PlanError(f"{self.name}: its experts are not called with hidden states and chosen experts")
        return given[0].reshape(-1, given[0].shape[-1]), given[1]

    def down_inputs(self, expert: int, hidden: Tensor) -> Tensor:
        """What the down projection of an expert sees [t, inner] where its first ones see ``hidden`` [t, hidden]."""
        if not len(hidden):
            return hidden.new_empty(0, self.inner)
        module: Any = self.module
        up = self.module.get_parameter(self.firsts[0])
        if len(self.firsts) == 1 and not self.turned and not getattr(module, "has_bias", False):
            is_gated = up.shape[1] != self.inner and getattr(module, "has_gate", True)
            if not is_gated or hasattr(module, "_apply_gate"):
                projected = nn.functional.linear(hidden, up[expert])
                made: Tensor = module._apply_gate(projected) if is_gated else module.act_fn(projected)
                return made
        # Classes without transformers' common interface want more than one choice.
        choices = 1 if hasattr(module, "_apply_gate") else 2
        index = torch.full((len(hidden), choices), expert, device=hidden.device)
        weights = torch.ones(index.shape, dtype=hidden.dtype, device=hidden.device)
        try:
            with own_forward(type(module).__name__, f"in {self.name}"), _Catching(module.get_parameter(self.down)):
                if self.copies:
                    _only(module, expert, self.experts)(hidden)
                else:
                    module(hidden, index, weights)
        except _Caught as caught:
            # Choice by choice: what comes after the first is the same again.
            return caught.inputs.reshape(-1, self.inner)[: len(hidden)]
        raise PlanError(f"{self.name}: runs an expert without its {self.down}; it cannot be calibrated", remedy=ROUND_INSTEAD)


def find_stacks(layer_name: str, layer: nn.Module) -> list[ExpertStack]:
    """The modules of stacked experts in a layer."""
    return [stack for local, module in layer.named_modules() for stack in _stack(layer_name, layer, local, module)]


def _stack(layer_name: str, layer: nn.Module, local: str, module: nn.Module) -> Iterator[ExpertStack]:
    held = {name: value for name, value in module._parameters.items() if value is not None}
    name = f"{layer_name}.{local}"
    if all(leaf in held and held[leaf].ndim == 2 for leaf in _FLAT) and len({held[leaf].shape for leaf in _FLAT}) == 1:
        # The module around it is called with the choice, and knows how many there are.
        path, _, leaf = local.rpartition(".")
        around: Any = layer.get_submodule(path)
        experts = int(getattr(around, "num_experts", 0))
        if experts > 1 and held["w2"].shape[0] % experts == 0:
            hidden = held["w2"].shape[1]
            router = _router_of(layer, path, {experts}, hidden)
            inner = held["w2"].shape[0] // experts
            down = f"{leaf}.w2"
            firsts: tuple[str, ...] = (f"{leaf}.w1", f"{leaf}.v1")
            yield ExpertStack(f"{layer_name}.{path}", around, firsts, down, experts, hidden, inner, router, flat=True)
        return
    firsts = next((names for names in _FIRST if all(leaf in held for leaf in names)), ())
    if "down_proj" not in held or not firsts or any(held[leaf].ndim != 3 for leaf in (*firsts, "down_proj")):
        return
    up, down_shape = held[firsts[-1]].shape, held["down_proj"].shape
    turned = bool(getattr(module, "is_transposed", up[2] != down_shape[1]))
    hidden, inner = (up[1], down_shape[1]) if turned else (up[2], down_shape[2])
    if down_shape[2 if turned else 1] != hidden:
        logger.warning("%s: experts of an unusual layout are rounded to nearest", name)
        return
    experts = int(down_shape[0])
    router = _router_of(layer, local, {experts, int(up[0])}, hidden)
    parent: Any = layer.get_submodule(local.rpartition(".")[0])
    # Llama 4 hands every token to every expert, scaled by its choice: zero where it is not chosen.
    copies = 0 if len(signature(module.forward).parameters) > 1 else int(getattr(parent, "top_k", 0))
    yield ExpertStack(
        name, module, firsts, "down_proj", experts, hidden, inner, None if copies else router, turned=turned, copies=copies
    )


def _router_of(layer: nn.Module, experts: str, counts: set[int], hidden: int) -> str | None:
    """The one module beside the experts whose weight has a row per expert; a child of it where it has none itself."""
    path = experts.rpartition(".")[0]
    parent, own = layer.get_submodule(path), layer.get_submodule(experts)

    def is_router(module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        return weight is not None and weight.ndim == 2 and weight.shape[0] in counts and weight.shape[1] == hidden

    found = [name for name, child in parent.named_children() if child is not own and is_router(child)]
    if not found:
        found = [
            f"{name}.{inner}" for name, child in parent.named_children() if child is not own
            for inner, module in child.named_children() if is_router(module)
        ]  # fmt: skip
    return f"{path}.{found[0]}".lstrip(".") if len(found) == 1 else None


def _gathered(rows: Tensor, copies: int) -> tuple[Tensor, Tensor]:
    """Rows [E, t, hidden] that are zero where an expert is not chosen, as inputs [t * copies, hidden] and their experts."""
    chosen = rows.any(-1).T.int()
    most, experts = chosen.topk(copies, dim=1)
    tokens = torch.arange(len(chosen), device=rows.device)[:, None]
    return rows[experts, tokens].flatten(0, 1), torch.where(most > 0, experts, -1).view(-1, 1)


def _only(module: nn.Module, expert: int, experts: int) -> nn.Module:
    """The module as if it had one expert; its parameters are views."""
    one = copy(module)
    one.__dict__ = {key: 1 if key == "num_experts" and value == experts else value for key, value in vars(module).items()}
    one._parameters = {
        name: None if value is None else nn.Parameter(value[expert : expert + 1], requires_grad=False)
        for name, value in module._parameters.items()
    }
    return one


class _Caught(BaseException):  # no error: it ends a forward early
    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.inputs = inputs


class _Catching(TorchFunctionMode):
    """Ends with ``_Caught`` at the first product with a parameter, or a part of it; of one thread."""

    def __init__(self, parameter: Tensor) -> None:
        super().__init__()
        self._storage = parameter.untyped_storage().data_ptr()

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if getattr(func, "__name__", "") in _PRODUCTS:
            values = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
            for number, value in enumerate(values[1:], 1):
                if value.untyped_storage().data_ptr() == self._storage:
                    raise _Caught(values[number - 1])
        return func(*args, **(kwargs or {}))
