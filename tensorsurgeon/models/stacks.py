"""Which tensors hold the experts of a layer, and where in them each expert's linears lie.

A family's table decides where it can, then transformers' class if it holds transposed ones. Else the usual stack is taken,
``gate_up_proj`` [E, 2I, H] with the gate first and ``down_proj`` [E, H, I], and only if its shape says the same: halves of equal
size look alike however they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from tensorsurgeon.errors import SpecError
from tensorsurgeon.models.asked.answers import stacks_wanted
from tensorsurgeon.models.describe import Model, describe_model
from tensorsurgeon.models.experts import is_expert_list
from tensorsurgeon.models.families import Stack
from tensorsurgeon.models.rules import LAYERS
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec

_USUAL: Final = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
BIAS_ENDINGS: Final = ("_bias", ".bias")
"""What stands behind the path of a stack, without its ``.weight``, in the name of its biases."""


class ExpertCut(NamedTuple):
    """The detail of a rewrite that computes: how the parts of one expert lie in its slice."""

    parts: int
    transposed: bool
    interleaved: bool


class Stacked(NamedTuple):
    """A stacked tensor of a checkpoint. ``into``: the path of the numbered experts; ``is_bias``: vectors, one per expert."""

    spec: TensorSpec
    into: str
    stack: Stack
    experts: int
    is_bias: bool


def stacked_tensors(specs: SpecMap) -> dict[str, Stacked]:
    """Tensors that hold the experts of a layer, by name; SpecError if one holds them in a way that is not known."""
    model = describe_model(specs)
    tables = model.family.experts if model.family is not None else ()
    found = {}
    for name, spec in specs.items():
        if len(spec.shape) < 2 or not spec.dtype.is_float or spec.dtype.bits < 16:
            continue
        for layer, inside in layer_cuts(name):
            stacked = _of_table(model, spec, layer, inside, tables)
            if stacked is not None:
                found[name] = stacked
                break
        else:
            if len(spec.shape) == 3 and is_expert_list(spec.module):
                found[name] = _usual(model, spec)
            elif len(spec.shape) == 2 and is_expert_list(spec.module) and name.endswith("_bias"):
                weight = specs.get(name.removesuffix("_bias"))
                if weight is not None and len(weight.shape) == 3:
                    found[name] = _usual(model, weight)._replace(spec=spec, is_bias=True)
    return found


def axes_of_stack(specs: SpecMap, name: str) -> tuple[str, str] | None:
    """The axes of each expert's matrix in the float stack of this name; None if neither a table nor a class says them."""
    family = describe_model(specs).family
    for _, inside in layer_cuts(name):
        for stack in () if family is None else family.experts:
            if inside == stack.tensor:
                return stack.axes
    wanted = stacks_wanted(specs.config)
    return None if wanted is None else wanted.axes


def layer_cuts(name: str) -> Iterator[tuple[str, str]]:
    """A tensor's name cut behind each numbered layer, the first one first."""
    parts = name.split(".")
    for at, part in enumerate(parts[1:-1], 1):
        if part.isdigit() and LAYERS.search(parts[at - 1]):
            yield ".".join(parts[: at + 1]), ".".join(parts[at + 1 :])


def _of_table(model: Model, spec: TensorSpec, layer: str, inside: str, tables: tuple[Stack, ...]) -> Stacked | None:
    for stack in tables:
        if inside == stack.tensor:
            return _checked(model, Stacked(spec, f"{layer}.{stack.into}", stack, _count(model, spec, stack), False))
        for ending in BIAS_ENDINGS:
            if inside == stack.tensor.removesuffix(".weight") + ending and len(spec.shape) == 2:
                return Stacked(spec, f"{layer}.{stack.into}", stack, spec.shape[0], True)
    return None


def _count(model: Model, spec: TensorSpec, stack: Stack) -> int:
    return model.expert_count if stack.flat else spec.shape[0]


def _checked(model: Model, stacked: Stacked) -> Stacked:
    spec, stack = stacked.spec, stacked.stack
    if stack.flat and not stacked.experts:
        raise SpecError(f"{spec}: experts below each other, but neither config.json nor a router says how many there are")
    if len(spec.shape) != (2 if stack.flat else 3) or (stack.flat and spec.shape[0] % stacked.experts):
        raise SpecError(f"{spec}: no stack of {stacked.experts} experts as {_table(model)} describes it")
    hidden = model.sizes.hidden
    down = stack.parts[0] in ("down_proj", "w2")
    rows, columns = _matrix(stacked)
    out, in_ = (rows, columns) if stack.axes == ("out", "in") else (columns, rows)
    found = out if down else in_
    if hidden and found != hidden:
        raise SpecError(
            f"{spec}: {_table(model)} says that each expert is stored {list(stack.axes)}, but then hidden_size ({hidden}) would "
            f"be {found}"
        )
    if out % len(stack.parts):
        raise SpecError(f"{spec}: {out} rows cannot be cut into {' and '.join(stack.parts)}")
    return stacked


def _table(model: Model) -> str:
    return "the family's table" if model.family is None else f"the table of {model.family.name}"


def _matrix(stacked: Stacked) -> tuple[int, int]:
    shape = stacked.spec.shape
    return (shape[0] // stacked.experts, shape[1]) if stacked.stack.flat else (shape[1], shape[2])


def _usual(model: Model, spec: TensorSpec) -> Stacked:
    """A stack that no table names, as transformers' class holds it, or if its shape says that it is the usual one."""
    parts = _USUAL.get(spec.name.rpartition(".")[2])
    if parts is None:
        raise SpecError(f"{spec}: a stack of experts, but not known is which linears it holds, and how")
    wanted_form = stacks_wanted(model.config)
    if wanted_form is not None and wanted_form.axes == ("in", "out"):
        stack = Stack(spec.name.rpartition(".")[2], "", parts, wanted_form.axes, False, wanted_form.interleaved)
        return _checked(model, Stacked(spec, spec.module, stack, spec.shape[0], False))
    experts, hidden, inner = model.expert_count, model.sizes.hidden, model.sizes.expert_width
    if not (experts and hidden and inner):
        raise SpecError(
            f"{spec.name}: config.json has no num_experts, hidden_size or moe_intermediate_size, so the layout of the fused "
            "tensors cannot be checked; put config.json beside the weights"
        )
    down = parts == ("down_proj",)
    wanted = (experts, hidden, inner) if down else (experts, len(parts) * inner, hidden)
    if spec.shape != wanted:
        out, in_ = (f"hidden_size {hidden}", f"{inner}") if down else (f"{len(parts)}*{inner}", f"hidden_size {hidden}")
        said = f"{experts} experts x {out} x {in_}"
        turned = spec.shape == (wanted[0], wanted[2], wanted[1])
        raise SpecError(
            f"{spec.name}: expected num_experts x out x in ({said}), found {list(spec.shape)}"
            + ("; it is stored transposed, and no table of a family says how its parts lie: transpose it first" if turned else "")
        )
    return Stacked(spec, spec.module, Stack("", "", parts), experts, False)
