"""Every tensor of the checkpoint against what the recorded recipe says it should hold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.planning.resolving import Piece, Task
from tensorsurgeon.planning.rewriting import op_name
from tensorsurgeon.tensors.spec import TensorSpec
from tensorsurgeon.verifying.against import Pair, Pairing, Part, SameBytes, SameWeight
from tensorsurgeon.verifying.described import Described, Module
from tensorsurgeon.verifying.findings import Findings
from tensorsurgeon.verifying.lineage import Lineage, PlannedTensor

# Steps whose outputs are rounded: compared as values, and not byte for byte.
_ROUNDED = ("Cast", "Dequantize")
_CODED = ("Quantize", "Repack")


def pair_by_plan(
    plan: Plan, source: TensorReader, source_modules: Described, target: TensorReader, modules: Described, findings: Findings
) -> Pairing:
    """Each tensor that the plan makes, with the bytes or the weight it should hold; faults for what is not there."""
    lineage = Lineage(plan, source, source_modules)
    pairs: list[Pair] = []
    coded: dict[str, list[Task]] = defaultdict(list)
    for name, spec in plan.specs.items():
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
        pieces = plan.resolved.contents[name]
        makers = {lineage.step_of(lineage.task_of(p)[0]) for p in pieces if p.origin < 0}
        if makers & {*_CODED}:
            coded[spec.module] += [lineage.task_of(p)[0] for p in pieces if p.origin < 0]
        elif not lineage.can_compute(pieces):
            findings.note("not-judged", name, f"is made by {' and '.join(sorted(makers))}, which is not computed here again")
        elif pieces:
            pairs += _of_float(spec, pieces, makers, lineage, source_modules)
            if len(pieces) == 1 and pieces[0].origin >= 0:
                origin = lineage.source_name(pieces[0])
                if origin != name and origin not in plan.specs:
                    findings.note("renamed", origin, f"is {name} here")
    for module, tasks in coded.items():
        pairs += _of_module(module, tasks, lineage, source_modules, modules, findings)
    new = [spec for name, spec in target.specs.items() if name not in plan.specs]
    _note_dropped(plan, lineage, findings)
    return Pairing(pairs, [], new)


def _of_float(
    spec: TensorSpec, pieces: tuple[Piece, ...], makers: set[str], lineage: Lineage, source: Described
) -> Iterator[Pair]:
    if not lineage.steps_behind(pieces) & {*_ROUNDED} or not spec.dtype.is_float or spec.dtype.bits < 16:
        yield SameBytes(PlannedTensor(lineage, spec, pieces), Part(spec.name, 0, -1))
        return
    if makers == {"Dequantize"} and (decoded := list(_decoded(spec, pieces, lineage, source))):
        yield from decoded
        return
    planned = PlannedTensor(lineage, spec, pieces)
    if makers == {"Cast"} and all(piece.origin < 0 for piece in pieces):
        # The values before rounding say more than those after it.
        tasks = [lineage.task_of(piece)[0] for piece in pieces]
        before = tasks[0].rewrite.inputs[0].spec
        inputs = [piece for task in tasks for piece in task.inputs[0]]
        if before.shape == spec.shape and sum(piece.nbytes for piece in inputs) == before.nbytes:
            planned = PlannedTensor(lineage, before, inputs)
    yield SameWeight(spec.name, planned, Part(spec.name, 0, spec.rows), planned.shape)


def _decoded(spec: TensorSpec, pieces: tuple[Piece, ...], lineage: Lineage, source: Described) -> Iterator[Pair]:
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
    name: str, tasks: list[Task], lineage: Lineage, source: Described, modules: Described, findings: Findings
) -> Iterator[Pair]:
    """A quantized module: the weight that its codes were made from, whatever it was called and wherever it lay."""
    module = modules.modules.get(name)
    if module is None:
        # Its own faults say so.
        return
    origin: PlannedTensor | Module | None
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


def _weight_of(name: str, tasks: list[Task], lineage: Lineage) -> PlannedTensor | None:
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
    return PlannedTensor(lineage, spec, pieces)


def _note_dropped(plan: Plan, lineage: Lineage, findings: Findings) -> None:
    """Source tensors of which nothing goes into the output: a step of the recipe left them out."""
    used = {piece.origin for pieces in plan.resolved.contents.values() for piece in pieces}
    used.update(piece.origin for task in plan.resolved.tasks for pieces in task.inputs for piece in pieces)
    by_step = {
        region.spec.name: op_name(step)
        for step, rewrites in zip(plan.steps, plan.rewrites, strict=True)
        for rewrite in rewrites
        if not rewrite.outputs
        for region in rewrite.inputs
    }
    for number, (name, spec) in enumerate(plan.source.specs.items()):
        if number not in used and spec.nbytes:
            findings.note("dropped", name, f"left out by a {by_step.get(name, 'drop')} step of surgeon.json")
