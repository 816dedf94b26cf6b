"""Are the numbers beside the codes possible? Scales, zero points, padding and order of inputs, module by module.

Only small tensors are read, but for FP8 weights, whose codes can be NaN. Codes of a group are read where its scale
is zero, which is a fault only if they are not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

import numpy as np

from tensorsurgeon.checkpoint.tensor_reader import CHUNK_BYTES, TensorReader
from tensorsurgeon.machine.threads import in_threads
from tensorsurgeon.verifying.bits import unpack
from tensorsurgeon.verifying.described import Module
from tensorsurgeon.verifying.findings import Findings
from tensorsurgeon.verifying.layouts import stored_weight

# Signed full-range scales are negative for about half of all groups; a flipped sign is rare.
_SIGNED_SHARE: Final = 0.1
# Where the checkpoint's other modules have positive scales, one module's are signed by chance's rules or not at all.
_SIGNED_MODULE: Final = (0.2, 0.8)
_FEWEST: Final = 16


class ScaleFacts(NamedTuple):
    """What only the whole checkpoint can judge: negative scales and NVFP4's global ones."""

    module: str
    scales: int
    negative: int
    first_negative: str
    global_scale: float | None


def check_values(reader: TensorReader, modules: Iterable[Module], findings: Findings, workers: int) -> dict[str, float]:
    """Check each module; NVFP4 global scales by module, for the siblings to be compared."""

    def check(module: Module) -> ScaleFacts:
        return _check(reader, module, findings)

    facts = list(in_threads(check, modules, workers))
    _judge_signs(facts, findings)
    return {f.module: f.global_scale for f in facts if f.global_scale is not None}


def _judge_signs(facts: list[ScaleFacts], findings: Findings) -> None:
    total, negative = sum(f.scales for f in facts), sum(f.negative for f in facts)
    signed = [f for f in facts if f.scales >= _FEWEST and _SIGNED_MODULE[0] <= f.negative / f.scales <= _SIGNED_MODULE[1]]
    is_signed = negative > total * _SIGNED_SHARE
    if is_signed or signed:
        where = f"{negative} of {total}" if is_signed else f"those of {len(signed)} modules: {sum(f.negative for f in signed)}"
        findings.note("signed-scales", "scales", f"{where} are negative, as full-range grids have them")
    if is_signed:
        return
    expected = {f.module for f in signed}
    for found in facts:
        if found.negative and found.module not in expected:
            findings.fault(
                "negative-scale",
                found.first_negative,
                f"is negative, as are {found.negative} of the {found.scales} scales of this module, "
                "and no tool of this format writes such scales",
            )


def _check(reader: TensorReader, module: Module, findings: Findings) -> ScaleFacts:
    claim, name = module.claim, module.name
    scale_name = f"{name}.{claim.scale_name}"
    global_scale = None
    if claim.layout == "nvfp4":
        global_scale = float(reader.array(f"{name}.weight_global_scale")[0])
        if not np.isfinite(global_scale) or global_scale <= 0:
            findings.fault("scale", f"{name}.weight_global_scale", f"is {global_scale:g}, expected a positive number")
    raw = reader.array(scale_name)
    if claim.layout == "mxfp4":
        _fault_first(findings, "scale", scale_name, raw.view(np.uint8) == 255, raw, "is the exponent 255, which is not a number")
        return ScaleFacts(name, raw.size, 0, scale_name, None)
    scale = raw.astype(np.float32)
    _fault_first(findings, "scale", scale_name, ~np.isfinite(scale), scale, "is not finite")
    if (scale == 0).any():
        _check_zero_scales(reader, module, findings)
    _check_zero_points(reader, module, findings)
    _check_padding(reader, module, findings)
    _check_order(reader, module, findings)
    if claim.layout == "plain" and claim.code_dtype.is_float:
        _check_fp8_codes(reader, module, findings)
    for extra in ("input_scale", "input_global_scale"):
        if extra in module.tensors:
            values = reader.array(f"{name}.{extra}").astype(np.float32)
            _fault_first(
                findings, "scale", f"{name}.{extra}", ~np.isfinite(values) | (values <= 0), values, "is not a positive number"
            )
    negative = scale < 0
    if claim.layout == "nvfp4" and negative.any():
        _fault_first(findings, "negative-scale", scale_name, negative, scale, "is negative, which no FP4 scale is")
        negative = np.zeros(1, bool)
    count = int(np.count_nonzero(negative))
    first = f"{scale_name}{_position(negative)}" if count else scale_name
    return ScaleFacts(name, scale.size, count, first, global_scale)


def _position(wrong: np.ndarray) -> str:
    return str([int(axis[0]) for axis in np.nonzero(wrong)]) if wrong.ndim else ""


def _fault_first(findings: Findings, kind: str, name: str, wrong: np.ndarray, values: np.ndarray, fault: str) -> None:
    """One fault for a tensor: its first wrong value, and how many there are."""
    count = int(np.count_nonzero(wrong))
    if count:
        value = values[wrong].reshape(-1)[0] if values.ndim else values
        more = f" ({count} of {wrong.size} are)" if count > 1 else ""
        findings.fault(kind, f"{name}{_position(wrong)}", f"{value} {fault}{more}")


def _check_zero_scales(reader: TensorReader, module: Module, findings: Findings) -> None:
    """A zero scale reads every weight of its group as zero; right only if the codes say so too."""
    weight = stored_weight(reader, module.name, module.claim, module.shape)
    rows, columns = module.shape
    block = module.claim.block or (1, 1)
    lost = 0
    first = ""
    step = max(1, CHUNK_BYTES // (4 * columns))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        codes = weight.codes(start, stop).astype(np.float32)
        if module.claim.block is not None:
            scale = np.repeat(weight.scale[np.arange(start, stop) // block[0]], block[1], axis=1)[:, :columns]
        else:
            scale = weight.scale if len(weight.scale) == 1 else weight.scale[start:stop]
            scale = np.repeat(scale, columns // scale.shape[1], axis=1)
        if weight.zero_point is not None:
            codes -= np.repeat(weight.zero_point[start:stop], columns // weight.zero_point.shape[1], axis=1)
        wrong = (scale == 0) & (codes != 0)
        count = int(np.count_nonzero(wrong))
        if count and not first:
            row, column = (int(axis[0]) for axis in np.nonzero(wrong))
            first = f"output {start + row}, input {column}"
        lost += count
    if lost:
        findings.fault(
            "zero-scale",
            f"{module.name}.{module.claim.scale_name}",
            f"has zeros where {lost} codes are not zero (first at {first}); those weights are lost",
        )


def _check_zero_points(reader: TensorReader, module: Module, findings: Findings) -> None:
    claim, name = module.claim, module.name
    if claim.layout in ("gptq", "awq") and claim.symmetric:
        _check_constant_zeros(reader, module, findings)
    elif "weight_zero_point" in module.tensors and claim.symmetric:
        zeros = reader.array(f"{name}.weight_zero_point")
        _fault_first(
            findings, "zero-point", f"{name}.weight_zero_point", zeros != 0, zeros, "is not zero, but the config says symmetric"
        )


def _check_constant_zeros(reader: TensorReader, module: Module, findings: Findings) -> None:
    """Zero points of symmetric weights are half the range; what they look like one lower tells v1 from v2."""
    claim, name = module.claim, f"{module.name}.qzeros"
    words = reader.array(name)
    rows = module.shape[0]
    stored = unpack(words, claim.num_bits, rows)
    wanted = (1 << (claim.num_bits - 1)) - claim.zero_offset
    other = wanted + (1 if claim.zero_offset else -1)
    if (stored == wanted).all():
        return
    if (stored == other).all():
        versions = (
            ("v1, which stores one less,", "v2, which stores them as they are")
            if claim.zero_offset
            else ("v2, which stores them as they are,", "v1, which stores one less")
        )
        findings.fault(
            "gptq-version",
            name,
            f"all zero points are stored as {other}; the config says {versions[0]} and then the middle is {wanted}; "
            f"these are words of {versions[1]}",
        )
        return
    wrong = stored != wanted
    _fault_first(
        findings,
        "zero-point",
        name,
        wrong,
        stored,
        f"is stored where the config says symmetric and every zero point is stored as {wanted}",
    )


def _check_padding(reader: TensorReader, module: Module, findings: Findings) -> None:
    """Bits behind the last code of a row are zero; others are codes of a wider weight that were cut off."""
    claim, (rows, columns) = module.claim, module.shape
    if claim.layout == "ct-packed" and columns * claim.num_bits % 32:
        used = columns * claim.num_bits % 32
        name = f"{module.name}.weight_packed"
        step = max(1, CHUNK_BYTES // reader.specs[name].row_bytes)
        for start in range(0, rows, step):
            last = reader.rows(name, start, min(start + step, rows))[:, -1].view(np.uint32)
            wrong = last >> np.uint32(used) != 0
            if wrong.any():
                row = start + int(np.flatnonzero(wrong)[0])
                findings.fault("padding", name, f"row {row} has bits set behind its {columns} codes of {claim.num_bits} bits")
                break
    if claim.layout == "ct-packed" and not claim.symmetric and rows * claim.num_bits % 32:
        name = f"{module.name}.weight_zero_point"
        tail = reader.array(name)[-1].view(np.uint32) >> np.uint32(rows * claim.num_bits % 32)
        if tail.any():
            findings.fault("padding", name, f"has bits set behind the zero points of its {rows} outputs")


def _check_order(reader: TensorReader, module: Module, findings: Findings) -> None:
    """``g_idx``: the group of each input. Without desc_act it counts up; with it, any group may come anywhere."""
    claim = module.claim
    if "g_idx" not in module.tensors:
        return
    name = f"{module.name}.g_idx"
    order = reader.array(name)
    columns = module.shape[1]
    size = columns if claim.group_size < 1 else claim.group_size
    if claim.desc_act:
        _fault_first(
            findings, "g-idx", name, (order < 0) | (order >= columns // size), order, f"is no group; there are {columns // size}"
        )
        return
    wrong = order != np.arange(columns, dtype=order.dtype) // size
    _fault_first(findings, "g-idx", name, wrong, order, "is not the input's own group, but the config says desc_act false")


def _check_fp8_codes(reader: TensorReader, module: Module, findings: Findings) -> None:
    """E4M3 has two NaN codes and no infinity; one NaN makes every output that it reaches NaN."""
    name = f"{module.name}.weight"
    nbytes = reader.specs[name].nbytes
    for start in range(0, nbytes, CHUNK_BYTES):
        codes = reader.bytes_of(name, start, min(CHUNK_BYTES, nbytes - start))
        wrong = (codes & 0x7F) == 0x7F
        if wrong.any():
            at = start + int(np.flatnonzero(wrong)[0])
            findings.fault("nan", name, f"the code at row {at // module.shape[1]}, column {at % module.shape[1]} is NaN")
            return
