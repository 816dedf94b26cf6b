"""What a transform says, and how one step's statement changes the set of tensors.

A transform states its rewrites once, as values; names, sizes, units and memory follow from them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from tensorsurgeon.errors import NameCollisionError, PlanError, RecipeError, SpecError
from tensorsurgeon.formats.coding import each_object_once, stored_in, written_by
from tensorsurgeon.tensors.spec import Region, SpecMap, TensorSpec

Array = np.ndarray


class Rewrite(NamedTuple):
    """These regions become those regions.

    Several rewrites may fill one output tensor; together they tile it exactly. A rewrite without outputs drops its
    inputs, one without inputs adds a tensor. ``moves_bytes``: the inputs' bytes in order are the outputs' bytes in order,
    so no array is ever made. ``detail``: what the step found out when it planned and neither names nor shapes show (how
    a module is stored, under which scheme it is written): a frozen value, handed back to it in ``apply``, so that a step
    keeps nothing between the two and a worker elsewhere needs nothing else.
    """

    inputs: tuple[Region, ...]
    outputs: tuple[Region, ...]
    moves_bytes: bool = False
    detail: Hashable = None


class Transform(Protocol):
    """Anything that can plan from specs alone and apply what it planned."""

    def plan(self, specs: SpecMap) -> tuple[Rewrite, ...]:
        """Every rewrite of this step; raises PlanError where the tensors do not fit."""
        ...

    def apply(self, rewrite: Rewrite, inputs: Sequence[Array]) -> Sequence[Array]:
        """One array per output region. Pure, deterministic, thread-safe; leaves its inputs alone."""
        ...


def reads_floats(step: Transform) -> bool:
    """Whether a step takes float weights and makes codes of them; a class says so by ``reads_floats = True``."""
    return bool(getattr(type(step), "reads_floats", False))


def writes_floats(step: Transform) -> bool:
    """Whether a step makes floats of all that is quantized; a class says so by ``writes_floats = True``."""
    return bool(getattr(type(step), "writes_floats", False))


def op_name(step: Transform) -> str:
    """What a recipe calls a step: ``split_experts`` of the class ``SplitExperts``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(step).__name__).lower()


def is_reversible(step: Transform) -> bool:
    """Whether another transform could restore what this one read; a class says so by ``reversible = True``."""
    return bool(getattr(type(step), "reversible", False))


def scratch_bytes(step: Transform, rewrite: Rewrite) -> int:
    """What ``apply`` holds at its fullest beside the rewrite's inputs and outputs, as the step's class says; 0 if it does not."""
    stated = getattr(type(step), "scratch_bytes", None)
    return 0 if stated is None else int(stated(step, rewrite))


class Chain:
    """Transforms in order; what a list of transforms and a named transform are."""

    def __init__(self, steps: Sequence[Transform | Chain], name: str | None = None) -> None:
        self.steps = tuple(steps)
        self.name = name


AnyTransform = Transform | Chain | Sequence["AnyTransform"]


def steps_of(transform: AnyTransform) -> tuple[Transform, ...]:
    """The single steps of a transform, a chain, or a list of either."""
    return tuple(_walk(transform))


def _walk(transform: AnyTransform) -> Iterator[Transform]:
    if isinstance(transform, Chain):
        for step in transform.steps:
            yield from _walk(step)
    elif isinstance(transform, list | tuple):
        for step in transform:
            yield from _walk(step)
    elif hasattr(transform, "plan") and hasattr(transform, "apply"):
        yield transform
    else:
        raise RecipeError(f"not a transform: {transform!r}")


def advance(specs: SpecMap, rewrites: Sequence[Rewrite]) -> SpecMap:
    """The tensors after one step: the only place where specs are threaded forward.

    Every rewritten tensor leaves and its outputs stand where its first input stood, so that the order never
    depends on how the source was sharded. Raises if outputs collide with each other or with what stays, if
    rewrites leave part of a tensor behind, or do not tile their outputs.
    """
    if not rewrites:
        return specs
    tiles = _Tiles()
    made: dict[str, TensorSpec] = {}
    # By the name of the first input: what stands in its place. What has no input stands at the end.
    standing: dict[str | None, list[TensorSpec]] = defaultdict(list)
    for rewrite in rewrites:
        read, written = rewrite[:2]
        for region in read:
            if region[1] is None:
                tiles.whole.add(region[0][0])
            else:
                tiles.read(region)
        anchor = read[0][0][0] if read else None
        for region in written:
            spec, start, _ = region
            known = made.get(spec[0])
            if known is None:
                made[spec[0]] = spec
                standing[anchor].append(spec)
            elif start is None or known != spec or spec not in tiles.written:
                raise NameCollisionError(
                    f"{spec.name}: two rewrites make a tensor of this name ({known} and {spec}, the latter from "
                    f"{anchor}); make the templates tell them apart"
                )
            if start is not None:
                tiles.write(region)
    for name in ("", "__metadata__"):
        if name in made:
            raise NameCollisionError(f"{name!r} cannot be the name of a tensor; change the template that makes it")
    tiles.check()
    result = SpecMap(config=specs.config)
    for name, spec in specs.items():
        if name in standing:
            for output in standing[name]:
                result[output.name] = output
        elif name not in tiles.whole and name not in tiles.reads:
            if name in made:
                raise NameCollisionError(f"{name}: a rewrite makes a tensor of this name, but one exists and stays")
            result[name] = spec
    for output in standing.get(None, ()):
        result[output.name] = output
    result.unpacked = _unpacked(specs, rewrites)
    return result


def details_of(rewrites: Sequence[Rewrite]) -> list[Hashable]:
    """The details of a step's rewrites, each object once: many thousands of rewrites share a few."""
    return each_object_once([rewrite[3] for rewrite in rewrites])


def _unpacked(specs: SpecMap, rewrites: Sequence[Rewrite]) -> frozenset[str] | None:
    """The weights that come from codes: those just unpacked, those that were moved or cut in the dtype that they had, those that
    nothing touched."""
    made: set[str] = set()
    is_unpacking = False
    for rewrite in rewrites if any(map(stored_in, details_of(rewrites))) else ():
        if rewrite.detail is not None and stored_in(rewrite.detail) is not None:
            is_unpacking = True
            if written_by(rewrite.detail) is None:
                made |= {region.spec.name for region in rewrite.outputs}
    if specs.unpacked is None:
        return frozenset(made) if is_unpacking else None
    touched: set[str] = set()
    for rewrite in rewrites:
        names = {region.spec.name for region in rewrite.inputs}
        touched |= names
        if names & specs.unpacked and (rewrite.moves_bytes or _keeps_dtype(rewrite)):
            made |= {region.spec.name for region in rewrite.outputs}
    return frozenset(made | (specs.unpacked - touched))


def _keeps_dtype(rewrite: Rewrite) -> bool:
    """Whether values only change places: what is rounded or made codes of gets another dtype."""
    regions = (*rewrite.inputs, *rewrite.outputs)
    return written_by(rewrite.detail) is None and len({region.spec.dtype for region in regions}) == 1


class _Tiles:
    """Partial regions of one step: inputs must be read wholly, outputs filled exactly."""

    def __init__(self) -> None:
        self.whole: set[str] = set()
        self.reads: dict[str, tuple[TensorSpec, list[tuple[int, int]]]] = {}
        self.written: dict[TensorSpec, list[tuple[int, int]]] = defaultdict(list)

    def read(self, region: Region) -> None:
        spec, start, stop = region
        assert start is not None
        assert stop is not None
        if spec.name in self.reads:
            self.reads[spec.name][1].append((start, stop))
        else:
            self.reads[spec.name] = spec, [(start, stop)]

    def write(self, region: Region) -> None:
        assert region.start is not None
        assert region.stop is not None
        self.written[region.spec].append((region.start, region.stop))

    def check(self) -> None:
        for spec, ranges in self.written.items():
            _check_row_bytes(spec)
            position = 0
            for start, stop in sorted(ranges):
                if start != position:
                    fault = "twice" if start < position else "never"
                    raise PlanError(f"{spec.name}: rows {min(start, position)} to {max(start, position)} are {fault} filled")
                position = stop
            if position != spec.rows:
                raise PlanError(f"{spec.name}: rows {position} to {spec.rows} are never filled")
        for spec, ranges in self.reads.values():
            _check_row_bytes(spec)
            if spec.name in self.whole:
                continue
            position = 0
            for start, stop in sorted(ranges):
                if start > position:
                    break
                position = max(position, stop)
            if position < spec.rows:
                raise PlanError(f"{spec.name}: rows {position} onwards would be lost; a tensor leaves only when a rule drops it")


def _check_row_bytes(spec: TensorSpec) -> None:
    """Elements narrower than a byte can be cut between rows only if each row fills whole bytes."""
    if (spec.shape[-1] if len(spec.shape) > 1 else 1) * spec.dtype.bits % 8:
        raise SpecError(f"{spec}: a row does not fill whole bytes, so this tensor cannot be cut into rows or joined from them")
