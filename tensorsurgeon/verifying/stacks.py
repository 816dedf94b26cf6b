"""Experts that the source stacks in its family's own form and the checkpoint has one by one, compared without a record.

Where each expert lies is planned by splitting the source, which moves no weight; what is computed on the way is computed by
``lineage``. The usual stacks, whose experts are runs of rows, need none of this (``against``).
"""

from __future__ import annotations

from typing import NamedTuple

from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.errors import SurgeonError
from tensorsurgeon.models.stacks import stacked_tensors
from tensorsurgeon.ops.dequantize import Dequantize
from tensorsurgeon.ops.split_experts import SplitExperts
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.planning.rewriting import Transform
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec
from tensorsurgeon.verifying.against import Pair, Pairing, Part, SameBytes, SameWeight, names_in, pair_tensors
from tensorsurgeon.verifying.described import Described
from tensorsurgeon.verifying.dialects import quantization_of
from tensorsurgeon.verifying.findings import Findings
from tensorsurgeon.verifying.layouts.mxfp4_blocks import BLOCKS
from tensorsurgeon.verifying.lineage import Lineage, PlannedTensor


class _Split(NamedTuple):
    """The source with its stacks split: what became of them, and the rest by name as it is."""

    lineage: Lineage
    made: list[TensorSpec]
    rest: SpecMap


def pair_with_stacks(
    source: TensorReader, source_modules: Described, target: SpecMap, modules: Described, findings: Findings
) -> Pairing:
    """``pair_tensors``, the experts of unusual stacks one by one."""
    split = _split(source, source_modules, target)
    if split is None:
        return pair_tensors(source.specs, source_modules, target, modules, findings)
    pairs: list[Pair] = []
    lost: list[TensorSpec] = []
    for spec in split.made:
        planned = PlannedTensor(split.lineage, spec, split.lineage.plan.resolved.contents[spec.name])
        pair = _pair(planned, target, modules)
        if pair is not None:
            pairs.append(pair)
        elif spec.module in modules.modules:
            shape = list(modules.modules[spec.module].shape)
            findings.fault("source-shape", spec.module, f"holds a weight {shape}, but the source has it as {list(spec.shape)}")
        elif spec.module not in modules.stored:
            lost.append(spec)
    others = pair_tensors(split.rest, source_modules, target, modules, findings)
    explained = {name for pair in pairs for name in names_in(pair, modules)}
    new = [spec for spec in others.new if spec.name not in explained]
    return Pairing([*others.pairs, *pairs], [*others.lost, *lost], new)


def _split(source: TensorReader, modules: Described, target: SpecMap) -> _Split | None:
    config = quantization_of(source.specs.config)
    coded = isinstance(config, dict) and config.get("quant_method") == "mxfp4"
    steps: list[Transform] = [Dequantize(dtype="F32")] if coded else []
    try:
        stacks = stacked_tensors(source.specs)
        coded_stacks = [name.removesuffix(BLOCKS) for name in source.specs if name.endswith(BLOCKS) and name not in target]
        kept = {name for name in (*stacks, *coded_stacks) if name in target}
        kept |= {name for name, stacked in stacks.items() if not stacked.stack.tensor and stacked.stack.axes == ("out", "in")}
        if stacks.keys() <= kept and not coded_stacks:
            return None
        exclude = tuple(f"maybe:{name}" for name in sorted(kept))
        steps.append(SplitExperts(where=("maybe:role:expert", "maybe:role:mtp.expert"), exclude=exclude))
        plan = make_plan(steps, source.checkpoint)
    except SurgeonError:
        # A stack that nobody knows: it is lost or found as a whole.
        return None
    made = [spec for name, spec in plan.specs.items() if name not in source.specs]
    rest = SpecMap((spec for name, spec in source.specs.items() if name in plan.specs), source.specs.config)
    return _Split(Lineage(plan, source, modules), made, rest)


def _pair(planned: PlannedTensor, target: SpecMap, modules: Described) -> Pair | None:
    spec = planned.spec
    module = modules.modules.get(spec.module)
    if module is not None and spec.name.endswith(".weight"):
        return SameWeight(module.name, planned, module, module.shape) if module.shape == spec.shape else None
    found = target.get(spec.name)
    if found is None or found.shape != spec.shape:
        return None
    if found.dtype is spec.dtype:
        return SameBytes(planned, Part(spec.name, 0, -1))
    return SameWeight(spec.name, planned, Part(spec.name, 0, spec.rows), planned.shape)
