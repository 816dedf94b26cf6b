"""Every tensor of the checkpoint against what the recorded recipe says it should hold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress

from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.errors import SurgeonError
from tensorsurgeon.planning.resolving import Piece, Task
from tensorsurgeon.planning.rewriting import op_name
from tensorsurgeon.tensors.spec import TensorSpec
from tensorsurgeon.verifying.against import Pair, Pairing, Part, SameBytes, SameWeight
from tensorsurgeon.verifying.described import Described, Module
from tensorsurgeon.verifying.findings import Findings
from tensorsurgeon.verifying.lineage import Lineage, PlannedTensor, Replay
from tensorsurgeon.verifying.made import MadeTensor
from tensorsurgeon.verifying.stacked import Stacks

# Steps whose outputs are rounded: compared as values, and not byte for byte.
_ROUNDED = ("Cast", "Dequantize")
_CODED = ("Quantize", "Repack")
# Where no step but the splitting itself gives names, an expert's name says which expert it is.
_NAMES_STAY = {"split_experts", "quantize", "dequantize", "round", "cast", "drop", "keep", "expect"}


class _Lineage(Lineage):
    """What a recipe makes; of stacks that it splits, what this room says itself that their experts are."""

    def __init__(self, replay: Replay, source: TensorReader, modules: Described) -> None:
        super().__init__(replay, source, modules)
        self._stacks: Stacks | None = None
        steps = {op_name(step) for step in replay.steps}
        if "split_experts" in steps and steps <= _NAMES_STAY:
            # One that nobody here knows is taken as the recipe has it.
            with suppress(SurgeonError):
                self._stacks = Stacks(source)

    def made(self, spec: TensorSpec, pieces: Sequence[Piece], *, as_values: bool) -> MadeTensor:
        """A planned tensor; ``as_values``: it is compared as numbers, so that its type may be another."""
        planned = PlannedTensor(self, spec, pieces)
        own = None if self._stacks is None else self._stacks.part_named(spec.name)
        is_same = own is not None and own.spec.shape == spec.shape and own.name == planned.name
        return own if own is not None and is_same and (as_values or own.spec == spec) else planned


def pair_by_plan(
    replay: Replay, source: TensorReader, source_modules: Described, target: TensorReader, modules: Described, findings: Findings
) -> Pairing:
    """Each tensor that the recipe makes, with the bytes or the weight it should hold; faults for what is not there."""
    lineage = _Lineage(replay, source, source_modules)
    pairs: list[Pair] = []
    coded: dict[str, list[Task]] = defaultdict(list)
    for name, spec in replay.specs.items():
        found = target.specs.get(name)
        if found is None:
            findings.fault(
                "missing-tensor", name, f"is not here; the recorded recipe makes it as {spec.dtype.name}{list(spec.shape)}"
            )
            continue
        if found != spec:
            findings.fault(
                "other-tensor", name,
                f"is {found.dtype.name}{list(found.shape)}; the recorded recipe makes it as {spec.dtype.name}{list(spec.shape)}",
            )  # fmt: skip
            continue
        pieces = replay.resolved.contents[name]
        makers = {lineage.step_of(lineage.task_of(p)[0]) for p in pieces if p.origin < 0}
        if makers & {*_CODED}:
            coded[spec.module] += [lineage.task_of(p)[0] for p in pieces if p.origin < 0]
        elif not lineage.can_compute(pieces):
            findings.note("not-judged", name, f"is made by {' and '.join(sorted(makers))}, which is not computed here again")
        elif pieces:
            pairs += _of_float(spec, pieces, makers, lineage, source_modules)
            if len(pieces) == 1 and pieces[0].origin >= 0:
                origin = lineage.source_name(pieces[0])
                if origin != name and origin not in replay.specs:
                    findings.note("renamed", origin, f"is {name} here")
    for module, tasks in coded.items():
        pairs += _of_module(module, tasks, lineage, source_modules, modules, findings)
    new = [spec for name, spec in target.specs.items() if name not in replay.specs]
    _note_dropped(replay, source, findings)
    return Pairing(pairs, [], new)


def _of_float(
    spec: TensorSpec, pieces: tuple[Piece, ...], makers: set[str], lineage: _Lineage, source: Described
) -> Iterator[Pair]:
    if not lineage.steps_behind(pieces) & {*_ROUNDED} or not spec.dtype.is_float or spec.dtype.bits < 16:
        yield SameBytes(lineage.made(spec, pieces, as_values=False), Part(spec.name, 0, -1))
        return
    if makers == {"Dequantize"} and (decoded := list(_decoded(spec, pieces, lineage, source))):
        yield from decoded
        return
    planned = lineage.made(spec, pieces, as_values=True)
    if makers == {"Cast"} and all(piece.origin < 0 for piece in pieces):
        # The values before rounding say more than those after it.
        tasks = [lineage.task_of(piece)[0] for piece in pieces]
        before = tasks[0].rewrite.inputs[0].spec
        inputs = [piece for task in tasks for piece in task.inputs[0]]
        if before.shape == spec.shape and sum(piece.nbytes for piece in inputs) == before.nbytes:
            planned = lineage.made(before, inputs, as_values=True)
    yield SameWeight(spec.name, planned, Part(spec.name, 0, spec.rows), planned.shape)


def _decoded(spec: TensorSpec, pieces: tuple[Piece, ...], lineage: _Lineage, source: Described) -> Iterator[Pair]:
    """Decoded weights one by one, also where several fill one tensor; nothing if any of them is cut."""
    pairs: list[Pair] = []
    row = 0
    for piece in pieces:
        rewrite = lineage.task_of(piece)[0].rewrite
        module = source.modules.get(rewrite.inputs[0].spec.module)
        if module is None or piece.nbytes != rewrite.outputs[0].spec.nbytes or module.shape[1] != spec.shape[-1]:
            return
        pairs.append(SameWeight(module.name, module, Part(spec.name, row, module.shape[0]), module.shape))
        row += module.shape[0]
    yield from pairs


def _of_module(
    name: str, tasks: list[Task], lineage: _Lineage, source: Described, modules: Described, findings: Findings
) -> Iterator[Pair]:
    """A quantized module: the weight that its codes were made from, whatever it was called and wherever it lay."""
    module = modules.modules.get(name)
    if module is None:
        # Its own faults say so.
        return
    origin: MadeTensor | Module | None
    if lineage.step_of(tasks[0]) == "Repack":
        origin = source.modules.get(tasks[0].rewrite.inputs[0].spec.module)
    else:
        origin = _weight_of(name, tasks, lineage)
    if origin is None:
        findings.note("not-judged", name, "has codes whose weight is not computed here again")
    elif origin.shape != module.shape:
        findings.fault(
            "source-shape", name, f"holds a weight {list(module.shape)}, but the recipe quantizes {list(origin.shape)}"
        )
    else:
        yield SameWeight(name, origin, module, module.shape)


def _weight_of(name: str, tasks: list[Task], lineage: _Lineage) -> MadeTensor | None:
    """The weight before it was quantized: rows of it are the inputs of one task each, or it is the input of one."""
    made_as = {region.spec.module for task in tasks for region in task.rewrite.outputs}
    rows: dict[int, tuple[Piece, ...]] = {}
    spec: TensorSpec | None = None
    for task in tasks:
        for region, pieces in zip(task.rewrite.inputs, task.inputs, strict=True):
            # A task may quantize what engines fuse; one name tells its parts apart, unless it changed afterwards.
            if len(task.rewrite.inputs) == 1 or region.spec.module == name:
                rows[region.start or 0] = pieces
                spec = region.spec
    if spec is None or (len(made_as) > 1 and spec.module != name):
        return None
    pieces = tuple(piece for start in sorted(rows) for piece in rows[start])
    if sum(piece.nbytes for piece in pieces) != spec.nbytes or not lineage.can_compute(pieces):
        return None
    return lineage.made(spec, pieces, as_values=True)


def _note_dropped(replay: Replay, source: TensorReader, findings: Findings) -> None:
    """Source tensors of which nothing goes into the output: a step of the recipe left them out."""
    used = {piece.origin for pieces in replay.resolved.contents.values() for piece in pieces}
    used.update(piece.origin for task in replay.resolved.tasks for pieces in task.inputs for piece in pieces)
    by_step = {
        region.spec.name: op_name(step)
        for step, rewrites in zip(replay.steps, replay.resolved.rewrites, strict=True)
        for rewrite in rewrites
        if not rewrite.outputs
        for region in rewrite.inputs
    }
    for number, (name, spec) in enumerate(source.specs.items()):
        if number not in used and spec.nbytes:
            findings.note("dropped", name, f"left out by a {by_step.get(name, 'drop')} step of surgeon.json")
