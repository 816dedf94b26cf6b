"""Find the tensors that belong together by name: parts of one whole, numbered slices of one stack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from tensorsurgeon.errors import MissingTensorError, SpecError
from tensorsurgeon.models.selecting import selected
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec

# The largest model has some hundred experts in a tensor; a header can claim billions that take no byte.
_MAX_PIECES: Final = 1_000_000

Fields = tuple[tuple[str, str], ...]


def parts_by_fields(specs: SpecMap, patterns: Sequence[str]) -> dict[Fields, list[TensorSpec]]:
    """For each set of field values, the tensors that match the patterns, in the order of the patterns.

    Raises MissingTensorError where some of the parts exist and others do not.
    """
    found: dict[Fields, dict[int, TensorSpec]] = {}
    for position, pattern in enumerate(patterns):
        for name, fields in selected(specs, (pattern,)).items():
            parts = found.setdefault(tuple(sorted(fields.items())), {})
            if position in parts:
                raise SpecError(
                    f"{name} and {parts[position].name} both match {pattern!r} with {fields or 'no fields'}, so nothing tells "
                    "which belongs to which whole; make the pattern capture what differs"
                )
            parts[position] = specs[name]
    for key, parts in found.items():
        for position, pattern in enumerate(patterns):
            if position not in parts:
                have = next(iter(parts.values()))
                raise MissingTensorError(
                    f"{have.name} has no counterpart {pattern!r} with {dict(key)}; all parts must exist to be joined"
                )
    return {key: [parts[i] for i in range(len(patterns))] for key, parts in found.items()}


def stacks_by_fields(specs: SpecMap, where: Sequence[str], index: str = "index") -> dict[Fields, list[TensorSpec]]:
    """For each set of the other fields, the tensors numbered by field ``index``, from 0 without gaps."""
    found: dict[Fields, dict[int, TensorSpec]] = {}
    for name, fields in selected(specs, tuple(where)).items():
        if not fields.get(index, "").isdecimal() or len(fields[index]) > 18:
            raise SpecError(f"{name}: the field {{{index}}} must be a number, found {fields.get(index)!r}")
        key = tuple(sorted((k, v) for k, v in fields.items() if k != index))
        numbered = found.setdefault(key, {})
        number = int(fields[index])
        if number in numbered:
            raise SpecError(
                f"{name} and {numbered[number].name} are both number {number} of the same stack; make the pattern capture "
                "what differs"
            )
        numbered[number] = specs[name]
    stacks = {}
    for key, numbered in found.items():
        for number in range(len(numbered)):
            if number not in numbered:
                have = next(iter(numbered.values()))
                raise MissingTensorError(f"number {number} of {len(numbered)} is missing beside {have.name}")
        stacks[key] = [numbered[i] for i in range(len(numbered))]
    return stacks


def check_alike(parts: Sequence[TensorSpec], but_axis: int | None = None) -> None:
    """Raise SpecError unless all parts have one dtype and one shape (but for the size of one axis)."""

    def form(spec: TensorSpec) -> tuple[object, ...]:
        shape: Mapping[int, int] = dict(enumerate(spec.shape))
        return (spec.dtype.name, len(spec.shape), *(n for axis, n in shape.items() if axis != but_axis))

    for part in parts[1:]:
        if form(part) != form(parts[0]):
            raise SpecError(f"{part} cannot be joined with {parts[0]}: dtype and shape must agree")


def check_pieces(spec: TensorSpec, count: int) -> None:
    """Raise SpecError where a tensor would be cut into, or made of, more pieces than can be planned one by one."""
    if count > _MAX_PIECES:
        raise SpecError(f"{spec.name}: {list(spec.shape)} would be cut into {count} pieces; at most {_MAX_PIECES} can be planned")
