"""Experts that the source stacks in its family's own form and the checkpoint has one by one, compared without a record.

Where each expert lies is said by ``stacked``. The usual stacks, whose experts are runs of rows, need none of this (``against``).
"""

from __future__ import annotations

from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.errors import SurgeonError
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec
from tensorsurgeon.verifying.against import Pair, Pairing, Part, SameBytes, SameWeight, names_in, pair_tensors
from tensorsurgeon.verifying.described import Described
from tensorsurgeon.verifying.findings import Findings
from tensorsurgeon.verifying.layouts.mxfp4_blocks import BLOCKS
from tensorsurgeon.verifying.made import MadeTensor
from tensorsurgeon.verifying.stacked import SCALES, DecodedStack, Stacks


def pair_with_stacks(
    source: TensorReader, source_modules: Described, target: SpecMap, modules: Described, findings: Findings
) -> Pairing:
    """``pair_tensors``, the experts of unusual stacks one by one."""
    try:
        stacks = Stacks(source)
    except SurgeonError:
        # A stack that nobody knows: it is lost or found as a whole.
        stacks = None
    taken = set() if stacks is None else _taken(stacks, source.specs, target)
    if stacks is None or not taken:
        return pair_tensors(source.specs, source_modules, target, modules, findings)
    pairs: list[Pair] = []
    lost: list[TensorSpec] = []
    made: list[MadeTensor] = []
    for name in sorted(taken):
        made += [DecodedStack(stacks, name)] if name in target else stacks.experts(name)
    for tensor in made:
        spec = tensor.spec
        pair = _pair(tensor, target, modules)
        if pair is not None:
            pairs.append(pair)
        elif spec.module in modules.modules:
            shape = list(modules.modules[spec.module].shape)
            findings.fault("source-shape", spec.module, f"holds a weight {shape}, but the source has it as {list(spec.shape)}")
        elif spec.module not in modules.stored:
            lost.append(spec)
    gone = taken | {name + ending for name in taken & stacks.coded.keys() for ending in (BLOCKS, SCALES)}
    rest = SpecMap((spec for name, spec in source.specs.items() if name not in gone), source.specs.config)
    others = pair_tensors(rest, source_modules, target, modules, findings)
    explained = {name for pair in pairs for name in names_in(pair, modules)}
    new = [spec for spec in others.new if spec.name not in explained]
    return Pairing([*others.pairs, *pairs], [*others.lost, *lost], new)


def _taken(stacks: Stacks, source: SpecMap, target: SpecMap) -> set[str]:
    """Stacks that ``pair_tensors`` cannot pair: those in MXFP4 that are no codes any more, and split ones of unusual form."""
    taken = {name for name in stacks.coded if name + BLOCKS not in target}
    for name, stacked in stacks.stacked.items():
        is_usual = not stacked.stack.tensor and stacked.stack.axes == ("out", "in")
        if name in source and name not in target and not is_usual:
            taken.add(name)
    return taken & (stacks.stacked.keys() | (stacks.coded.keys() & target.keys()))


def _pair(planned: MadeTensor, target: SpecMap, modules: Described) -> Pair | None:
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
