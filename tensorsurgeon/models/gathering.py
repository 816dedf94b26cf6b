"""The way back from experts one by one to the stacks that a model's class wants: the inverse of ``stacks.py``, form by form.

The family's table says the form where there is one, else what transformers' class was found to hold (``asked/``). Classes
that gather experts stored one by one get them so: nothing here is asked of those.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from tensorsurgeon.errors import MissingTensorError, SpecError
from tensorsurgeon.models.asked.answers import stacks_wanted
from tensorsurgeon.models.describe import describe_model
from tensorsurgeon.models.experts import STACKED_PARTS, is_expert_list
from tensorsurgeon.models.families import Stack
from tensorsurgeon.models.stacks import BIAS_ENDINGS, layer_cuts
from tensorsurgeon.tensors.dtypes import WEIGHT_DTYPES
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec

_ONE: Final = re.compile(r"(.+)\.(\d+)\.([^.]+)\.(weight|bias)")

Parts = tuple[TensorSpec, ...]


class Gathered(NamedTuple):
    """A stack and what goes into it: for each expert in turn the tensors of its parts."""

    whole: TensorSpec
    stack: Stack
    experts: tuple[Parts, ...]
    is_bias: bool


def stacks_to_gather(specs: SpecMap, always: bool = False) -> list[Gathered]:
    """The stacks that the model's class wants and the checkpoint has one by one, in file order.

    ``always``: also the usual stacks, which the classes of transformers make themselves while they load. Experts of which any
    tensor is no float (codes) stay as they are. MissingTensorError where some experts of a list lack what others have.
    """
    lists = _numbered(specs)
    return [gathered for at, tensors in lists.items() for gathered in _of_list(specs, at, tensors, always)]


_OfList = dict[str, dict[str, dict[int, TensorSpec]]]


def _numbered(specs: SpecMap) -> dict[str, _OfList]:
    """Path of a list -> weight or bias -> part -> number -> tensor."""
    found: dict[str, _OfList] = defaultdict(lambda: {"weight": defaultdict(dict), "bias": defaultdict(dict)})
    for name, spec in specs.items():
        match = _ONE.fullmatch(name)
        if match is not None:
            at, number, part, leaf = match.groups()
            found[at][leaf][part][int(number)] = spec
    return found


def _of_list(specs: SpecMap, at: str, tensors: _OfList, always: bool) -> Iterator[Gathered]:
    for prefix, stack in _forms(specs, at, tensors["weight"], always):
        if not set(stack.parts) <= tensors["weight"].keys():
            continue
        weights = _experts(at, tensors["weight"], stack)
        if any(spec.dtype not in WEIGHT_DTYPES for parts in weights for spec in parts):
            continue
        name = f"{prefix}{stack.tensor}"
        yield Gathered(_whole(name, weights, stack, False), stack, weights, False)
        if set(stack.parts) & tensors["bias"].keys():
            biases = _experts(at, tensors["bias"], stack)
            ending = BIAS_ENDINGS[name.endswith(".weight")]
            yield Gathered(_whole(name.removesuffix(".weight") + ending, biases, stack, True), stack, biases, True)


def _forms(specs: SpecMap, at: str, weights: Mapping[str, object], always: bool) -> Iterator[tuple[str, Stack]]:
    """What stands before the names of a list's stacks, and each stack."""
    family = describe_model(specs).family
    if family is not None and family.experts:
        layer = next(
            (layer for layer, inside in layer_cuts(f"{at}.0") if any(inside == f"{s.into}.0" for s in family.experts)), None
        )
        if layer is not None:
            yield from ((f"{layer}.", stack) for stack in family.experts if at == f"{layer}.{stack.into}")
            return
    wanted = stacks_wanted(specs.config)
    if (wanted is None and not always) or not is_expert_list(at):
        return
    axes, interleaved = wanted or (("out", "in"), False)
    usual = STACKED_PARTS if "gate_proj" in weights else {"up_proj": ("up_proj",), "down_proj": ("down_proj",)}
    for leaf, parts in usual.items():
        yield f"{at}.", Stack(leaf, "", parts, axes, False, interleaved and len(parts) > 1)


def _experts(at: str, tensors: Mapping[str, Mapping[int, TensorSpec]], stack: Stack) -> tuple[Parts, ...]:
    numbers = sorted(set().union(*(tensors.get(part, {}) for part in stack.parts)))
    found = []
    for number in range(numbers[-1] + 1):
        parts = [tensors.get(part, {}).get(number) for part in stack.parts]
        if None in parts:
            raise MissingTensorError(
                f"{at}.{number}: has no {stack.parts[parts.index(None)]} to stack as {stack.tensor}, which other experts of "
                "this layer have; all of them must be there"
            )
        found.append(tuple(part for part in parts if part is not None))
    first = found[0][0]
    for parts_of_one in found:
        for spec in parts_of_one:
            if spec[1:] != first[1:]:
                raise SpecError(f"{spec} cannot be stacked with {first}: dtype and shape must agree")
    return tuple(found)


def _whole(name: str, experts: tuple[Parts, ...], stack: Stack, is_bias: bool) -> TensorSpec:
    dtype, shape = experts[0][0][1:]
    out = shape[0] * len(stack.parts)
    if is_bias:
        return TensorSpec(name, dtype, (len(experts), out))
    rows, columns = (out, shape[1]) if stack.axes == ("out", "in") else (shape[1], out)
    return TensorSpec(name, dtype, (len(experts) * rows, columns) if stack.flat else (len(experts), rows, columns))
