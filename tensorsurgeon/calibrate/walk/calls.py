"""What a decoder layer is called with: what is the same for every text, and slots for what is not.

A layer may be called with more than hidden states and masks: with what an earlier layer returned beside its states
(GLM-5's chosen tokens), with something made of the text before the first layer (Gemma 3n's inputs per layer, Zamba's
embeddings), or with an empty dictionary that layers fill for each other (keys and values that Gemma's layers share).
Which is which shows when a forward is recorded twice, with different texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tensorsurgeon.calibrate.walk.instead import ROUND_INSTEAD
from tensorsurgeon.errors import PlanError


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands in a call for a value of one batch; ``empty`` is the container that layers fill, None for a value."""

    key: str
    empty: Any = field(default=None, compare=False)


class Promise:
    """Stands for what a layer returns beside its hidden states, while nobody has run the layer."""

    def __init__(self, layer: int, place: str) -> None:
        self.layer = layer
        self.place = place


class Call(NamedTuple):
    """What a layer is called with beside its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def leaves(self) -> Iterator[tuple[str, Any]]:
        """Every value and where it lies."""
        for number, value in enumerate(self.args):
            yield from leaves(value, str(number))
        for name, value in self.kwargs.items():
            yield from leaves(value, name)

    def changed(self, change: Callable[[str, Any], Any]) -> Call:
        """The same call with other values; ``change`` is told where each lies."""
        args = tuple(changed(value, change, str(number)) for number, value in enumerate(self.args))
        return Call(args, {name: changed(value, change, name) for name, value in self.kwargs.items()})


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The values inside tuples, lists and dictionaries, and where they lie; an empty list or mapping is a value."""
    if isinstance(value, tuple | list) and value:
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{place}.{number}")
    elif isinstance(value, Mapping) and value:
        for key in value:
            yield from leaves(value[key], f"{place}.{key}")
    else:
        yield place, value


def changed(value: Any, change: Callable[[str, Any], Any], place: str = "") -> Any:
    """The same tuples, lists and dictionaries with other values inside."""
    if isinstance(value, tuple | list) and value:
        inner = [changed(each, change, f"{place}.{number}") for number, each in enumerate(value)]
        if isinstance(value, list):
            return inner
        return type(value)(*inner) if hasattr(value, "_fields") else tuple(inner)
    if isinstance(value, Mapping) and value:
        made = {key: changed(value[key], change, f"{place}.{key}") for key in value}
        return made if type(value) is dict else type(value)(made)  # type: ignore[call-arg]
    return change(place, value)


def with_slots(first: Mapping[int, Call], second: Mapping[int, Call], replies: Mapping[int, int], model: str) -> dict[int, Call]:
    """The calls of two texts, by layer, as one call per layer with slots where they differ.

    ``replies``: the layer by the identity of the hidden states that it returned in the first forward. PlanError if the two
    do not call the same layers, or differ in what is no tensor.
    """
    if list(first) != list(second):
        raise _depends(model)
    slots: dict[int, Slot] = {}
    calls = {}
    for layer, call in first.items():
        theirs = dict(second[layer].leaves())

        def slotted(place: str, value: Any, theirs: dict[str, Any] = theirs) -> Any:
            if isinstance(value, Promise):
                return Slot(made_key(value.layer, value.place))
            if id(value) in replies:
                return Slot(made_key(replies[id(value)], ""))
            if isinstance(value, MutableMapping) and not value:
                return slots.setdefault(id(value), Slot(f"box{len(slots)}", value))
            if place in theirs and same(value, theirs[place]):
                return value
            if not isinstance(value, Tensor) or not isinstance(theirs.get(place), Tensor):
                raise _depends(model)
            return slots.setdefault(id(value), Slot(f"text{len(slots)}"))

        calls[layer] = call.changed(slotted)
    return calls


def made_key(layer: int, place: str) -> str:
    """The key of what a layer returned: its states, or what lies at ``place`` beside them."""
    return f"made{layer}{place}"


def slots_of(calls: Mapping[int, Call]) -> dict[str, Slot]:
    """The slots of all calls by key."""
    return {leaf.key: leaf for call in calls.values() for _, leaf in call.leaves() if isinstance(leaf, Slot)}


def of_text(known: Mapping[int, Call], found: Mapping[int, Call], model: str) -> dict[str, Tensor]:
    """What a text puts into the slots, by key; PlanError where its calls differ in anything else."""
    values: dict[str, Tensor] = {}
    if list(known) != list(found):
        raise _depends(model)
    for layer, call in found.items():
        mine = dict(call.leaves())
        for place, leaf in known[layer].leaves():
            if isinstance(leaf, Slot):
                if leaf.key.startswith("text"):
                    values[leaf.key] = mine[place]
            elif place not in mine or not same(leaf, mine[place]):
                raise _depends(model)
    return values


def same(first: Any, second: Any) -> bool:
    """Whether two values are equal, tensors by dtype, shape and every element."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first is second or (first.dtype == second.dtype and torch.equal(first, second))
    return type(first) is type(second) and bool(first == second)


def _depends(model: str) -> PlanError:
    return PlanError(
        f"{model}: what its layers are called with depends on the text in a way that cannot be kept, so it cannot be walked "
        "layer by layer",
        remedy=ROUND_INSTEAD,
    )
