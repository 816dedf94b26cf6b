"""Where did every source tensor go? Pairs the tensors of a source with those of the checkpoint made from it.

A source tensor passes through byte for byte, became a quantized module, was cast, renamed, reshaped or stacked, or
was one of a stack of experts that was split. What was dropped must have been dropped by a step of the record.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

from tensorsurgeon.errors import SurgeonError
from tensorsurgeon.models.experts import numbered
from tensorsurgeon.tensors.names import Pattern
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec
from tensorsurgeon.verifying.described import Described, Module
from tensorsurgeon.verifying.findings import Findings
from tensorsurgeon.verifying.made import MadeTensor
from tensorsurgeon.verifying.parts import MARKERS
from tensorsurgeon.verifying.recipes import Call

# Rows of a stacked expert tensor: which linear each part of them is.
_STACKED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
}
# What a quantized module is made of; a bias belongs to no layout.
_CODED = MARKERS | {"weight"}


class Part(NamedTuple):
    """Rows ``first`` to ``first + rows`` of a tensor seen as [-1, last axis]."""

    name: str
    first: int
    rows: int


class SameBytes(NamedTuple):
    """These rows of the source, or what the recipe makes of it, are those rows of the checkpoint, byte for byte."""

    source: Part | MadeTensor
    target: Part


class SameWeight(NamedTuple):
    """A weight that is stored in another way; either side is rows of a float tensor or a quantized module, the source
    perhaps what the recipe makes of it."""

    name: str
    source: Part | Module | MadeTensor
    target: Part | Module
    shape: tuple[int, int]


Pair = SameBytes | SameWeight


class Pairing(NamedTuple):
    """``lost`` are source tensors without a place in the checkpoint, ``new`` tensors of it without an origin."""

    pairs: list[Pair]
    lost: list[TensorSpec]
    new: list[TensorSpec]


def pair_tensors(
    source: SpecMap, source_modules: Described, target: SpecMap, target_modules: Described, findings: Findings
) -> Pairing:
    """Account for every tensor of both by name, from headers alone."""
    pairs: list[Pair] = []
    lost: list[TensorSpec] = []
    explained: set[str] = set()
    for name, spec in source.items():
        module = source_modules.modules.get(spec.module)
        if module is not None and name.rpartition(".")[2] in _CODED and not _is_kept(module, target_modules):
            # The tensors of a quantized module stand or fall together; its first one speaks for all.
            if name == next(f"{module.name}.{local}" for local in module.tensors if local != "bias"):
                found = list(_of_module(module, target, target_modules))
                pairs += found
                lost += [] if found else [spec]
                explained.update(n for pair in found for n in names_in(pair, target_modules))
            continue
        found = list(_of_tensor(spec, target, target_modules, findings))
        pairs += found
        explained.update(n for pair in found for n in names_in(pair, target_modules))
        if not found:
            lost.append(spec)
    new = [
        spec
        for name, spec in target.items()
        if name not in explained and (spec.module not in target_modules.stored or name.rpartition(".")[2] not in _CODED)
    ]
    claimed = {
        m for pair in pairs if isinstance(pair, SameWeight) and isinstance(pair.target, Module) for m in (pair.target.name,)
    }
    # A module whose faults are known already has no pair, and its source is not lost either.
    broken = target_modules.stored.keys() - target_modules.modules.keys()
    in_order = sorted(broken)
    lost = [spec for spec in lost if not _went_into(spec, broken, in_order)]
    new += [
        spec
        for name, spec in target.items()
        if spec.module in target_modules.modules and spec.module not in claimed and name not in explained
    ]
    return Pairing(pairs, lost, new)


def _is_kept(module: Module, target: Described) -> bool:
    """Whether a quantized module is quantized in the same way in the checkpoint: then its bytes are the same too."""
    other = target.modules.get(module.name)
    return other is not None and other.claim == module.claim and dict(other.tensors) == dict(module.tensors)


def _went_into(spec: TensorSpec, modules: set[str], in_order: list[str]) -> bool:
    if spec.module in modules:
        return True
    parent, _, leaf = spec.name.removesuffix(".weight").rpartition(".")
    if len(spec.shape) != 3 or leaf not in _STACKED:
        return False
    at = bisect_left(in_order, f"{parent}.")
    return at < len(in_order) and in_order[at].startswith(f"{parent}.")


def names_in(pair: Pair, modules: Described) -> Iterator[str]:
    """The tensors of the checkpoint that a pair explains."""
    if isinstance(pair.target, Part):
        yield pair.target.name
    else:
        yield from (spec.name for local, spec in pair.target.tensors.items() if local in _CODED)


def _of_module(module: Module, target: SpecMap, modules: Described) -> Iterator[Pair]:
    """A quantized module of the source: stored in another layout, or as a float weight again, perhaps in a stack."""
    name = module.name
    other = modules.modules.get(name)
    if other is not None:
        yield SameWeight(name, module, other, module.shape)
        return
    spec = target.get(f"{name}.weight")
    if spec is not None and _is_float(spec) and spec.shape == module.shape:
        yield SameWeight(name, module, Part(spec.name, 0, module.shape[0]), module.shape)
        return
    place = _place_in_stack(f"{name}.weight", module.shape, target)
    if place is not None:
        yield SameWeight(name, module, place, module.shape)


def _of_tensor(spec: TensorSpec, target: SpecMap, modules: Described, findings: Findings) -> Iterator[Pair]:
    name = spec.name
    found = target.get(name)
    if found is not None and not (spec.module in modules.stored and name.endswith(".weight")):
        if found.dtype is spec.dtype and found.numel == spec.numel:
            if found.shape != spec.shape:
                findings.note("reshaped", name, f"{list(spec.shape)} became {list(found.shape)}")
            # Compared as one row, since the rows of both need not be equally long.
            yield SameBytes(Part(name, 0, -1), Part(name, 0, -1))
        elif found.shape == spec.shape and _is_float(found) and _is_float(spec):
            yield SameWeight(
                name, Part(name, 0, spec.rows), Part(name, 0, spec.rows), (spec.rows, spec.numel // max(spec.rows, 1))
            )
        return
    if name.endswith(".weight") and len(spec.shape) == 2 and _is_float(spec):
        module = modules.modules.get(spec.module)
        if module is not None:
            if module.shape == spec.shape:
                yield SameWeight(module.name, Part(name, 0, spec.shape[0]), module, module.shape)
            else:
                findings.fault(
                    "source-shape",
                    module.name,
                    f"holds a weight {list(module.shape)}, but the source has {name} {list(spec.shape)}",
                )
            return
        place = _place_in_stack(name, (spec.shape[0], spec.shape[1]), target)
        if place is not None and target[place.name].dtype is spec.dtype:
            yield SameBytes(Part(name, 0, spec.shape[0]), place)
            return
    if found is not None and found == spec:
        yield SameBytes(Part(name, 0, -1), Part(name, 0, -1))
        return
    if len(spec.shape) == 3 and _is_float(spec):
        yield from _of_stack(spec, target, modules, findings)


def _of_stack(spec: TensorSpec, target: SpecMap, modules: Described, findings: Findings) -> Iterator[Pair]:
    """Stacked experts [E, rows, K] that became one linear per expert."""
    parent, _, leaf = spec.name.removesuffix(".weight").rpartition(".")
    parts = _STACKED.get(leaf)
    experts, rows, columns = spec.shape
    if parts is None or rows % len(parts):
        return
    size = rows // len(parts)
    pairs: list[Pair] = []
    missing: list[str] = []
    for expert in range(experts):
        for number, part in enumerate(parts):
            name = f"{parent}.{expert}.{part}"
            origin = Part(spec.name, expert * rows + number * size, size)
            weight = target.get(f"{name}.weight")
            module = modules.modules.get(name)
            if module is not None and module.shape == (size, columns):
                pairs.append(SameWeight(name, origin, module, module.shape))
            elif module is not None or name in modules.stored:
                if module is not None:
                    findings.fault(
                        "source-shape",
                        name,
                        f"holds a weight {list(module.shape)}, but expert {expert} of {spec.name} has {[size, columns]}",
                    )
            elif weight is not None and weight.shape == (size, columns) and weight.dtype is spec.dtype:
                pairs.append(SameBytes(origin, Part(weight.name, 0, size)))
            elif weight is not None and weight.shape == (size, columns) and _is_float(weight):
                pairs.append(SameWeight(name, origin, Part(weight.name, 0, size), (size, columns)))
            else:
                missing.append(name)
    if pairs:
        yield from pairs
        for name in missing:
            findings.fault("missing-tensor", f"{name}.weight", f"is missing; the source has it in {spec.name}")


def _place_in_stack(name: str, shape: tuple[int, int], target: SpecMap) -> Part | None:
    """Where ``x.experts.3.up_proj.weight`` [I, H] lies in ``x.experts.gate_up_proj`` [E, 2 I, H]."""
    expert = numbered(name.removesuffix(".weight"))
    if expert is None:
        return None
    experts, number, leaf = expert
    for stacked, parts in _STACKED.items():
        spec = target.get(f"{experts}.{stacked}")
        if (
            leaf in parts
            and spec is not None
            and spec.shape[1:] == (shape[0] * len(parts), shape[1])
            and int(number) < spec.shape[0]
        ):
            first = int(number) * spec.shape[1] + parts.index(leaf) * shape[0]
            return Part(spec.name, first, shape[0])
    return None


def _is_float(spec: TensorSpec) -> bool:
    return spec.dtype.is_float and spec.dtype.bits >= 16


def dropped_by_record(calls: list[Call], lost: list[TensorSpec]) -> dict[str, str]:
    """Lost tensors that a drop or keep step of the recorded recipe took out: name -> that step."""
    reasons: dict[str, str] = {}
    for call in calls:
        if call.name not in ("Drop", "Keep"):
            continue
        try:
            where, exclude = (tuple(map(Pattern.parse, call.fields.get(key) or ())) for key in ("where", "exclude"))
        except (SurgeonError, TypeError):
            continue
        for spec in lost:
            selected = any(p.match(spec.name) is not None for p in where) and not any(
                p.match(spec.name) is not None for p in exclude
            )
            if selected == (call.name == "Drop"):
                reasons.setdefault(spec.name, call.name.lower())
    return reasons
