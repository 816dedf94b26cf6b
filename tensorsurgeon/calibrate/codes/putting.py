"""Quantized weights put in the place of a layer's own, so that what comes next sees what a reader of the output will see."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from tensorsurgeon.calibrate.codes.assembly import scale_rows
from tensorsurgeon.calibrate.codes.linears import Part
from tensorsurgeon.calibrate.walk.lines import lines_of
from tensorsurgeon.calibrate.walk.workers import run_parallel
from tensorsurgeon.machine.files import make_durable
from tensorsurgeon.quant.rtn.backend import choose_backend
from tensorsurgeon.quant.rtn.plain_torch import tensor_of
from tensorsurgeon.quant.scheme import Quantized, Scheme
from tensorsurgeon.tensors.dtypes import F32


def put_back(
    model: nn.Module,
    parts: Sequence[Part],
    schemes: Mapping[int, Scheme],
    codes: Mapping[int, Quantized],
    *,
    workers: int,
    stop: threading.Event,
) -> None:
    """Overwrite the layer's weights by what a reader of the output will compute with; ``codes`` by the linear's number."""

    def put(number: int) -> None:
        part = parts[number]
        found, scheme = codes[part.linear], schemes[part.linear]
        rows = slice(part.start, part.stop)
        some = found._replace(
            codes=found.codes[rows], scale=found.scale[scale_rows(rows, scheme)],
            zero_point=None if found.zero_point is None else found.zero_point[rows],
        )  # fmt: skip
        weight = tensor_of(choose_backend("auto", scheme, F32).dequantize(some, scheme, F32))
        parameter = model.get_parameter(part.lines.name)
        lines_of(parameter, part.lines).copy_(weight)

    run_parallel(len(parts), put, workers=workers, stop=stop)


def write_codes(path: Path, codes: Mapping[int, Quantized]) -> None:
    """Codes for other processes to put back; they see all of it when this returns."""
    found = {number: tuple(None if array is None else _tensor(array) for array in one) for number, one in codes.items()}
    with open(path, "wb") as file:
        torch.save(found, file)
        file.flush()
        make_durable(file.fileno())


def read_codes(path: Path, schemes: Mapping[int, Scheme]) -> dict[int, Quantized]:
    """What ``write_codes`` wrote; the file is mapped, and has to stay as long as the codes are used."""
    found = torch.load(path, mmap=True, weights_only=True)
    made = {}
    for number, (codes, *beside) in found.items():
        array = codes.numpy()
        if schemes[number].type == "fp8":
            array = array.view(ml_dtypes.float8_e4m3fn)
        scale, zero_point, global_scale = (None if part is None else part.numpy() for part in beside)
        assert scale is not None
        made[number] = Quantized(array, scale, zero_point, global_scale)
    return made


def _tensor(array: np.ndarray) -> Tensor:
    """FP8 as its bytes."""
    return tensor_of(array.view(np.uint8) if array.dtype == ml_dtypes.float8_e4m3fn else array)
