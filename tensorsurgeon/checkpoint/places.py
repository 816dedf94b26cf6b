"""Where the tensors of a checkpoint lie, in its canonical order; as numbers, for half a million tensors are not rare."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple, overload

from tensorsurgeon.checkpoint.header import ShardHeader
from tensorsurgeon.tensors.names import canonical_order
from tensorsurgeon.tensors.spec import TensorSpec


class Location(NamedTuple):
    """Where a tensor's bytes lie: which shard, first byte in that file."""

    shard: int
    offset: int


class Locations(Sequence[Location]):
    """The place of each tensor, by its number in the checkpoint's order."""

    def __init__(self, shards: array[int], offsets: array[int]) -> None:
        self._shards, self._offsets = shards, offsets

    @overload
    def __getitem__(self, number: int) -> Location: ...
    @overload
    def __getitem__(self, number: slice) -> Locations: ...
    def __getitem__(self, number: int | slice) -> Location | Locations:
        if isinstance(number, slice):
            return Locations(self._shards[number], self._offsets[number])
        return Location(self._shards[number], self._offsets[number])

    def __len__(self) -> int:
        return len(self._shards)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Locations) and (self._shards, self._offsets) == (other._shards, other._offsets)

    __hash__ = None  # type: ignore[assignment]


def in_order(shards: Sequence[ShardHeader], owner: Mapping[str, int]) -> tuple[list[TensorSpec], Locations]:
    """All tensors in the canonical order, and where they lie."""
    at = {spec.name: number for shard in shards for number, spec in enumerate(shard.specs)}
    found: list[TensorSpec] = []
    numbers, offsets = array("l"), array("q")
    for name in canonical_order(owner):
        number, place = owner[name], at[name]
        found.append(shards[number].specs[place])
        numbers.append(number)
        offsets.append(shards[number].offsets[place])
    return found, Locations(numbers, offsets)
