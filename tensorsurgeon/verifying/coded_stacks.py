"""gpt-oss as it is published: stacks of experts in MXFP4, ``X_blocks`` U8 [E, R, G, 16] beside ``X_scales`` U8 [E, R, G].

They are no modules by name, so nothing that is judged module by module sees them. Read expert by expert; of the codes only the
largest of each group counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np

from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec
from tensorsurgeon.verifying.claims import TOP, Claims
from tensorsurgeon.verifying.findings import Findings
from tensorsurgeon.verifying.layouts.fp4 import powers_of_two
from tensorsurgeon.verifying.layouts.mxfp4_blocks import BLOCKS, SCALES, largest_of_blocks

_EXPERTS: Final = ("num_local_experts", "num_experts")


def read(config: Mapping[str, Any], specs: SpecMap, findings: Findings) -> Claims | None:
    """Fault what headers show: parts that are missing or do not fit. None, for no module of the checkpoint is quantized."""
    stems = {name.removesuffix(end) for name in specs for end in (BLOCKS, SCALES) if name.endswith(end)}
    if not stems:
        findings.fault("config", f"config.json {TOP}.quant_method", f"says mxfp4, but no tensor's name ends in {BLOCKS}")
    for stem in stems:
        _check_stack(stem, specs, findings)
    return None


def _check_stack(stem: str, specs: SpecMap, findings: Findings) -> None:
    blocks, scales = (specs.get(stem + end) for end in (BLOCKS, SCALES))
    for spec, other, end in ((blocks, scales, SCALES), (scales, blocks, BLOCKS)):
        if spec is not None and other is None:
            findings.fault("missing-tensor", stem + end, f"is missing, beside {spec}; without it no expert of it can be read")
    if blocks is None or scales is None:
        return
    if not _are_codes(blocks):
        findings.fault("shape", blocks.name, f"is {blocks}; codes of MXFP4 are U8 [experts, rows, groups, 16]")
    elif not _are_exponents(scales, blocks):
        findings.fault("shape", scales.name, f"is {scales}; beside {blocks} exponents are U8 {list(blocks.shape[:-1])}")
    else:
        experts = next((n for key in _EXPERTS if (n := specs.config_value(key)) is not None), blocks.shape[0])
        if blocks.shape[0] != experts:
            findings.fault("shape", blocks.name, f"holds {blocks.shape[0]} experts, but config.json says {experts}")
    if stem in specs:
        findings.fault("stored-twice", stem, f"is there as floats beside {blocks.name}; engines read one of the two")


def _are_codes(blocks: TensorSpec) -> bool:
    return blocks.dtype.name == "U8" and len(blocks.shape) == 4 and blocks.shape[-1] == 16


def _are_exponents(scales: TensorSpec, blocks: TensorSpec) -> bool:
    return scales.dtype.name in ("U8", "F8_E8M0") and scales.shape == blocks.shape[:-1]


def check_coded_stacks(reader: TensorReader, findings: Findings, workers: int) -> None:
    """Exponents that are no number or make one that BF16 cannot hold, and experts whose weights are all zero."""
    specs = reader.specs
    pairs = ((specs[name], specs.get(name.removesuffix(BLOCKS) + SCALES)) for name in specs if name.endswith(BLOCKS))
    found = [(b, s) for b, s in pairs if s is not None and _are_codes(b) and _are_exponents(s, b)]
    jobs = [(blocks, scales, expert) for blocks, scales in found for expert in range(blocks.shape[0])]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda job: _check_expert(reader, findings, *job), jobs))


def _check_expert(reader: TensorReader, findings: Findings, blocks: TensorSpec, scales: TensorSpec, expert: int) -> None:
    _, rows, groups = scales.shape
    exponents = _of_expert(reader, scales, expert, rows * groups).reshape(rows, groups)
    wrong = np.argwhere(exponents == 255)
    if len(wrong):
        row, group = map(int, wrong[0])
        where = f"{scales.name}[{expert}, {row}, {group}]"
        findings.fault("scale", where, f"is 255, which is no number, as {len(wrong)} of this expert's are: every answer is NaN")
        return
    largest = largest_of_blocks(_of_expert(reader, blocks, expert, rows * groups * 16).reshape(rows, groups, 16))
    with np.errstate(over="ignore"):
        values = largest * powers_of_two(exponents)
    if not largest.any():
        findings.fault("zero-weight", f"{blocks.name}[{expert}]", "every weight of this expert is zero")
    elif not np.isfinite(values).all():
        findings.fault("scale", f"{scales.name}[{expert}]", "makes weights that are too large for a float")


def _of_expert(reader: TensorReader, spec: TensorSpec, expert: int, nbytes: int) -> np.ndarray:
    return reader.bytes_of(spec.name, expert * nbytes, nbytes).view(np.uint8)
